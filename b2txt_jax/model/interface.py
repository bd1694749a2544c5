"""What a model is to the rest of the package: one object with settings, parameters and a loss.

Training, inference, streaming, compilation and checkpoints use a model through `Model` alone.
docs/your_own_model.md shows one from outside the package.
"""

from __future__ import annotations

import abc
import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from b2txt_jax.config import ConfigError, ModelSettings, model_class
from b2txt_jax.segments import Segments

Params = dict[str, Any]
"""Nested dict of float32 arrays."""
Bins = TypeVar("Bins", int, Array)
MeanCTC = Callable[[Array, Array], Array]
"""(logits [B, P, C], frames [B], or [B, S] of rows of several trials) -> the mean CTC loss (ln) of
the trials that can be aligned."""

Rules = tuple[tuple[str, PartitionSpec], ...]
"""(regular expression for the end of a parameter's path such as `head/weight`, axes that it is
split over), of which the first match counts."""

DATA, MODEL = "data", "model"
"""The mesh's axes: DATA splits the rows of a batch, MODEL large parameters."""


class Output(NamedTuple):
    """What a model makes of a batch."""

    logits: Array
    """float32 [B, P, C]."""
    frames: Array
    """int32 [B], valid frames. [B, S] of rows of several trials."""
    aux: dict[str, Array] = {}  # noqa: RUF012
    """What the model's own loss needs besides, or, from `validate`, further logits by name."""


class Stream(NamedTuple):
    """Decoding of a recording under way, chunk after chunk, equal to decoding the whole."""

    start: Callable[[Params, int], Any]
    """(params, rows) -> the state before the first chunk."""
    step: Callable[[Params, Array, Array, Any], tuple[Array, Any]]
    """(params, x [B, T, D], day [B], state) -> (logits [B, P, C], state): the next smoothed bins of
    every row -> the frames that they complete, P from 0 on."""


class Model(abc.ABC):
    """A model of one configuration. A subclass defines `init`, `apply` and `frames`.

    Methods are pure functions: what they need besides their arguments is fixed by the constructor.
    """

    Settings: ClassVar[type[ModelSettings]] = ModelSettings
    """The frozen dataclass that the section `model` of a configuration is checked against."""
    sharding: ClassVar[Rules] = ()
    """Which parameters devices share. One without a rule is whole on every device."""
    embedding: ClassVar[str] = ""
    """Regular expression for the paths of the parameters that make frames of patches of bins. They
    are what calibration moves where days have no layers of their own. Empty: it moves everything.
    """
    variant: str = "auto"
    """Which of `variants` the settings ask for."""
    frame_bins: int = 0
    """Bins from frame to frame, for a model that takes rows of several trials: `apply` and `loss`
    then have an argument `segments`. 0: one trial a row."""
    frame_span: int = 0
    """Bins that a frame is made of, from the first on, for a model that can be pretrained. Its
    parameters then have a `head` with `weight [C, H]` and `bias [C]`. 0: it cannot."""

    def __init__(self, settings: Any, features: int, days: int) -> None:
        """`settings`: of the class `Settings`. `features`: per bin. `days`: recording days."""
        self.settings = settings
        self.features = features
        self.days = days

    @abc.abstractmethod
    def init(self, key: Array) -> Params:
        """Return fresh parameters."""

    @abc.abstractmethod
    def apply(
        self, params: Params, x: Array, bins: Array, day: Array, key: Array | None = None
    ) -> Output:
        """Compute logits: smoothed features x [B, T, D], valid bins [B], day index [B].

        Bins from `bins` on are padding. With a key, dropout and whatever else is random is on.
        """

    @abc.abstractmethod
    def frames(self, bins: Bins) -> Bins:
        """Return how many frames so many bins give. An int for an int."""

    def loss(
        self,
        params: Params,
        x: Array,
        bins: Array,
        day: Array,
        ctc: MeanCTC,
        key: Array | None = None,
        progress: Array | float = 1.0,
        segments: Segments | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Return the training loss, and scalars to log by name. Arguments as of `apply`.

        Args:
          params: of the model.
          x: smoothed features, [B, T, D].
          bins: valid bins, [B].
          day: day index, [B].
          ctc: of logits and frames.
          key: for dropout.
          progress: of the training, from 0 to 1.
          segments: where the trials of each row begin, with `frame_bins`. Bins are then [B, S].
        """
        more = {} if segments is None else {"segments": segments}
        # The name tells the model's part from others in a compiled program and in a profile.
        with jax.named_scope("model"):
            output = self.apply(params, x, bins, day, key, **more)
        return ctc(output.logits, output.frames), {}

    def validate(self, params: Params, x: Array, bins: Array, day: Array) -> Output:
        """Compute what validation looks at: `aux` holds further logits [B, P, C], each of which
        gets a phoneme error rate of its own."""
        return self.apply(params, x, bins, day)

    def stream(self) -> Stream:
        """Return the functions that decode a recording under way.

        Raises:
          ConfigError: the model cannot.
        """
        raise ConfigError(
            f"model {self.settings.name!r} decodes whole trials only; needed a model with "
            "Model.stream"
        )

    def group(self, path: str, leaf: Array) -> str:
        """Return a parameter's group in the optimizer.

        'weights' decay and 'biases' do not. 'day' is for arrays [days, ...]: its rates are the
        optimizer's day_* settings, and rows of days that a batch has not are left alone.
        """
        return "biases" if path.split("/")[-1].startswith("bias") or leaf.ndim < 2 else "weights"

    def is_embedding(self, path: str) -> bool:
        """Return whether a parameter makes frames of patches, by its path such as
        `gru/weight_ih_l0`."""
        return bool(self.embedding) and re.fullmatch(self.embedding, path) is not None

    def separated(self, params: Params) -> tuple[ModelSettings, Params] | None:
        """Return settings and parameters with which each day has rows of its own and computes what
        it did before: a calibration can then change one day alone.

        None: days have them already, or the model has no place for them.
        """
        return None

    def variants(self) -> dict[str, ModelSettings]:
        """Return settings that compute the same in other ways, by name, for `b2txt compile
        --compare`."""
        return {}

    def activation_bytes(self, rows: int, bins: int) -> int:
        """Return about how much memory a training step on a CPU takes for what lies between layers.
        0: not known."""
        return 0

    def spec(self, path: str) -> PartitionSpec:
        """Return the axes that a leaf of the training state is split over, by its path such as
        `params/gru/h0`. Moments are split as their parameter is."""
        for pattern, spec in self.sharding:
            if re.search(rf"(^|/)({pattern})$", path):
                return spec
        return PartitionSpec()


def takes_segments(model: Model) -> bool:
    """Return whether training may put several trials into a row of the model's batches.

    A model that inherits `frame_bins` may have methods of its own that know nothing of segments.
    """
    methods = (model.apply, model.loss)
    return model.frame_bins > 0 and all(
        "segments" in inspect.signature(method).parameters for method in methods
    )


_MOST_BINS = 10_000
"""Within which a model has to give its second frame."""


def first_and_further_bins(model: Model) -> tuple[int, int]:
    """Return how many bins the first frame needs, and each further one (14 and 4 as published)."""
    first = next(n for n in range(1, _MOST_BINS) if model.frames(n) == 1)
    return first, next(n for n in range(first, _MOST_BINS) if model.frames(n) == 2) - first


@functools.cache
def make_model(settings: ModelSettings, features: int, days: int) -> Model:
    """Return the model of a configuration's section `model`.

    Raises:
      ConfigError: there is no such model, or it cannot be made with these settings.
    """
    model: Model = model_class(settings.name)(settings, features, days)
    return model


def compute_dtype(settings: ModelSettings) -> jnp.dtype:
    """Return the dtype of matrix products. 'auto' is bfloat16 on an accelerator and float32 on a
    CPU, where bfloat16 is slow."""
    name = settings.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def parameter_count(params: Params) -> int:
    """Return the number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
