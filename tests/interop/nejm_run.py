"""A published training run in plain PyTorch, from the reference's description: model, optimizer,
schedule, and the two files that it leaves.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from b2txt_jax.cli import main

ARGS = {
    "model": {
        "n_input_features": 6,
        "n_units": 5,
        "rnn_dropout": 0.4,
        "rnn_trainable": True,
        "n_layers": 2,
        "patch_size": 3,
        "patch_stride": 2,
        "input_network": {
            "n_input_layers": 1,
            "input_layer_sizes": [6],
            "input_trainable": True,
            "input_layer_dropout": 0.2,
        },
    },
    "gpu_number": "1",
    "mode": "train",
    "use_amp": False,
    "init_from_checkpoint": False,
    "init_checkpoint_path": "None",
    "early_stopping": False,
    "num_training_batches": 50,
    "lr_scheduler_type": "cosine",
    "lr_max": 0.005,
    "lr_min": 0.0001,
    "lr_decay_steps": 40,
    "lr_warmup_steps": 4,
    "lr_max_day": 0.003,
    "lr_min_day": 0.0002,
    "lr_decay_steps_day": 30,
    "lr_warmup_steps_day": 2,
    "beta0": 0.9,
    "beta1": 0.999,
    "epsilon": 0.1,
    "weight_decay": 0.001,
    "weight_decay_day": 0,
    "seed": 10,
    "grad_norm_clip_value": 10,
    "batches_per_train_log": 2,
    "batches_per_val_step": 5,
    "dataset": {
        "data_transforms": {
            "white_noise_std": 1.0,
            "constant_offset_std": 0.2,
            "random_walk_std": 0.0,
            "random_walk_axis": -1,
            "static_gain_std": 0.0,
            "random_cut": 3,
            "smooth_kernel_size": 100,
            "smooth_data": True,
            "smooth_kernel_std": 2,
        },
        "batch_size": 4,
        "n_classes": 41,
        "days_per_batch": 2,
        "feature_subset": None,
        "dataset_dir": "somewhere/hdf5_data_final",
        "sessions": ["t15.2023.08.11", "t15.2023.08.13", "t15.2023.08.18"],
        "dataset_probability_val": [0, 1, 1],
    },
}


def args_with(**changes) -> dict:
    """ARGS with `section__name=value` changed; `...` takes the setting out."""
    args = copy.deepcopy(ARGS)
    for path, value in changes.items():
        *parents, name = path.split("__")
        place = args
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[name]
        else:
            place[name] = value
    return args


class GRUDecoder(nn.Module):
    """day layer, patches, GRU, head (reference, section 3)."""

    def __init__(self, args: dict):
        super().__init__()
        model = args["model"]
        features, days = model["n_input_features"], len(args["dataset"]["sessions"])
        self.size, self.stride = model["patch_size"], model["patch_stride"]
        self.day_weights = nn.ParameterList(torch.eye(features) for _ in range(days))
        self.day_biases = nn.ParameterList(torch.zeros(1, features) for _ in range(days))
        self.gru = nn.GRU(
            features * self.size, model["n_units"], model["n_layers"], batch_first=True
        )
        self.out = nn.Linear(model["n_units"], args["dataset"]["n_classes"])
        self.h0 = nn.Parameter(torch.zeros(1, 1, model["n_units"]))
        # Every parameter away from its special start, so that a mix-up cannot hide.
        for name, parameter in self.named_parameters():
            noise = torch.randn(parameter.shape)
            if name.startswith("day_"):
                parameter.data += 0.3 * noise / parameter.shape[-1] ** 0.5
            else:
                parameter.data = noise / parameter.shape[-1] ** 0.5

    def forward(self, x: torch.Tensor, day: int) -> torch.Tensor:
        """Smoothed features [1, T, D] -> logits [P, classes]."""
        x = nn.functional.softsign(x @ self.day_weights[day] + self.day_biases[day])
        frames = (x.shape[1] - self.size) // self.stride + 1
        x = torch.stack(
            [x[0, k * self.stride : k * self.stride + self.size].flatten() for k in range(frames)]
        )
        h0 = self.h0[0].repeat(self.gru.num_layers, 1)
        return self.out(self.gru(x, h0)[0])


class Run:
    """Model, AdamW with the published groups, warm-up and cosine."""

    def __init__(self, args: dict, seed: int = 0):
        torch.manual_seed(seed)
        self.args = args
        self.model = GRUDecoder(args)
        named = list(self.model.named_parameters())
        biases = [p for n, p in named if "gru.bias" in n or "out.bias" in n]
        days = [p for n, p in named if "day_" in n]
        others = [p for n, p in named if not any(k in n for k in ("gru.bias", "out.bias", "day_"))]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": biases, "weight_decay": 0, "group_type": "bias"},
                {
                    "params": days,
                    "lr": args["lr_max_day"],
                    "weight_decay": args["weight_decay_day"],
                    "group_type": "day_layer",
                },
                {"params": others, "group_type": "other"},
            ],
            lr=args["lr_max"],
            betas=(args["beta0"], args["beta1"]),
            eps=args["epsilon"],
            weight_decay=args["weight_decay"],
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, [self._factor(""), self._factor("_day"), self._factor("")]
        )

    def _factor(self, which: str):
        peak, floor = self.args[f"lr_max{which}"], self.args[f"lr_min{which}"]
        decay, warmup = self.args[f"lr_decay_steps{which}"], self.args[f"lr_warmup_steps{which}"]

        def factor(step: int) -> float:
            if step < warmup:
                return step / max(1, warmup)
            progress = min(1, (step - warmup) / max(1, decay - warmup))
            return floor / peak + (1 - floor / peak) * 0.5 * (1 + math.cos(math.pi * progress))

        return factor

    def step(self, gradient: dict[str, np.ndarray]) -> None:
        """One update; parameters that are not in `gradient` have none, as absent days do."""
        for name, parameter in self.model.named_parameters():
            parameter.grad = torch.tensor(gradient[name]) if name in gradient else None
        torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.args["grad_norm_clip_value"], foreach=False
        )
        self.optimizer.step()
        self.scheduler.step()

    def random_gradient(self, seed: int, days: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Of every parameter but the day layers of other days."""
        random = np.random.default_rng(seed)
        drawn = {
            name: random.normal(size=parameter.shape).astype(np.float32)
            for name, parameter in self.model.named_parameters()
        }
        return {
            name: value
            for name, value in drawn.items()
            if not name.startswith("day_") or int(name.rpartition(".")[2]) in days
        }

    def checkpoint(self, prefix: str = "") -> dict:
        """What the published trainer saves."""
        weights = self.model.state_dict()
        return {
            "model_state_dict": type(weights)((prefix + k, v) for k, v in weights.items()),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "val_PER": 0.25,
            "val_loss": np.float64(12.5),
        }

    def save(self, folder: Path, prefix: str = "") -> Path:
        """Writes the output folder and returns it."""
        return save(folder, self.checkpoint(prefix), self.args)


def save(folder: Path, checkpoint: object, args: dict) -> Path:
    """Writes checkpoint/best_checkpoint and checkpoint/args.yaml."""
    (folder / "checkpoint").mkdir(parents=True)
    torch.save(checkpoint, folder / "checkpoint/best_checkpoint")
    (folder / "checkpoint/args.yaml").write_text(yaml.safe_dump(args))
    return folder


def error_of(capsys, *command: object) -> str:
    """What `b2txt convert` prints as its one line of error."""
    capsys.readouterr()
    assert main(["convert", *map(str, command)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 1000
    return lines[0]
