"""A Transformer without day layers, small enough for a test."""

import dataclasses

from b2txt_jax.config import Config, load_config
from b2txt_jax.inference.run import Run
from b2txt_jax.training.step import init_state


def transformer_config(days, features: int) -> Config:
    config = load_config("transformer_demo")
    small = {"width": 16, "layers": 1, "heads": 2, "head_width": 8, "feedforward": 16}
    data = dataclasses.replace(config.data, sessions=tuple(days), feature_count=features)
    model = dataclasses.replace(config.model, **small)
    return dataclasses.replace(config, data=data, model=model)


def small_transformer(days, features: int) -> Run:
    """Return a run with fresh parameters."""
    config = transformer_config(days, features)
    return Run(config, init_state(config, len(days)).params, 0)
