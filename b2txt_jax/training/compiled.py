"""The steps, compiled ahead for every shape that batches can have, and batches on their way to the
devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from b2txt_jax.config import Config
from b2txt_jax.data.batches.layout import Shape
from b2txt_jax.data.loader import Batch, bucket_of
from b2txt_jax.data.trial import TrialRef
from b2txt_jax.model.interface import Params
from b2txt_jax.training.sharding import (
    DATA,
    abstract_state,
    batch_shardings,
    check_rows,
    jit_eval_step,
    jit_train_step,
    local_rows,
    place,
)
from b2txt_jax.training.step import EvalOutput, StepMetrics, TrainState

_PLACED_AHEAD = 2
_STOPPED_SECONDS = 0.1


def abstract_batch(shape: Shape, features: int, dtype: Any, mesh: Mesh) -> Batch:
    """Return the shapes of a batch with their placement."""
    rows: tuple[int, ...] = (shape.rows,)
    groups = segments = rows
    shared: tuple[tuple[int, ...] | None, ...] = (None, None, None)
    if shape.segments:
        segments, groups = (shape.rows, shape.segments), (mesh.shape[DATA], shape.trials)
        shared = (segments, segments, groups)
    shapes = ((*rows, shape.bins, features), segments, rows, (*groups, shape.labels), groups)
    arrays: Any = (
        size and jax.ShapeDtypeStruct(size, kind, sharding=sharding)
        for size, kind, sharding in zip(
            shapes + shared, (dtype, *[np.int32] * 7), batch_shardings(mesh), strict=True
        )
    )
    return Batch(*arrays)


def used_buckets(
    refs: Iterable[TrialRef], buckets: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the buckets of batches of evaluation, each of trials of one bucket."""
    return sorted({bucket_of([ref], buckets) for ref in refs})


class CompiledSteps:
    """One program per bucket for training and one for evaluation. Nothing compiles later."""

    def __init__(self, config: Config, days: int, mesh: Mesh, dtype: Any = np.float32):
        """`dtype`: of the features that batches bring.

        Raises:
          ConfigError: rows or parameters cannot be shared evenly by the devices, or the model or
            the signal's settings cannot be used.
        """
        self.mesh = mesh
        self.train_rows = config.data.batch_rows
        check_rows(self.train_rows, "data.days_per_batch * data.trials_per_day", mesh)
        check_rows(config.data.eval_batch_size, "data.eval_batch_size", mesh)
        self.local_train_rows = local_rows(self.train_rows, mesh)
        """Of a training batch, those that this host's devices hold."""
        self.local_eval_rows = local_rows(config.data.eval_batch_size, mesh)
        """Of an evaluation batch."""
        self._data = config.data
        self._dtype = dtype
        self._state = abstract_state(config, days, mesh)
        self._train_step = jit_train_step(config, days, mesh)
        self._eval_step = jit_eval_step(config, days, mesh, validating=True)
        self._train: dict[Shape, Any] = {}
        self._eval: dict[Shape, Any] = {}

    def compile(
        self,
        train: Iterable[Shape],
        evaluate: Iterable[tuple[int, int]],
        compiled: Callable[[], None] = lambda: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Compile these shapes' programs, several at a time.

        Args:
          train: shapes of training batches.
          evaluate: buckets of evaluation batches.
          compiled: called after each program.
          stopped: asked several times a second whether to give up.

        Returns:
          Whether all are compiled. If not, threads go on with some until the process ends.
        """
        # Tracing is Python and one at a time; the compiler uses all the cores.
        lowered = []
        for shape in train:
            if stopped():
                return False
            lowered.append((self._train, shape, self._lowered(shape)))
        for bucket in evaluate:
            if stopped():
                return False
            shape = Shape(self._data.eval_batch_size, *bucket)
            program = self._eval_step.lower(self._state.params, self._batch(shape))
            lowered.append((self._eval, shape, program))

        def finish(programs: dict[Shape, Any], shape: Shape, it: Any) -> None:
            programs[shape] = it.compile()
            compiled()

        # With several processes every one must compile in the same order.
        workers = 1 if jax.process_count() > 1 else 4
        pool = ThreadPoolExecutor(workers)
        try:
            under_way = {pool.submit(finish, *item) for item in lowered}
            while under_way and not stopped():
                done, under_way = wait(under_way, _STOPPED_SECONDS, FIRST_EXCEPTION)
                for one in done:
                    one.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return not under_way

    def _batch(self, shape: Shape) -> Batch:
        return abstract_batch(shape, self._data.feature_count, self._dtype, self.mesh)

    def _lowered(self, shape: Shape) -> Any:
        return self._train_step.lower(self._state, self._batch(shape))

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Run one step on a placed batch. The state is donated.

        A shape that no batch of the sample had, and that no compiled one stands in for, compiles
        now.
        """
        shape = _shape(batch)
        if shape not in self._train:
            self._train[shape] = self._lowered(shape).compile()
        result: tuple[TrainState, StepMetrics] = self._train[shape](state, batch)
        return result

    def eval_step(self, params: Params, batch: Batch) -> EvalOutput:
        """Compute logits and losses of all rows of a batch from this host's rows."""
        placed = place(batch, self.mesh)
        output: EvalOutput = self._eval[_shape(placed)](params, placed)
        return output

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Turn this host's rows of training batches into global arrays, some batches ahead of their
        use."""
        waiting: deque[Batch] = deque()
        for batch in batches:
            waiting.append(place(batch, self.mesh))
            if len(waiting) > _PLACED_AHEAD:
                yield waiting.popleft()
        yield from waiting


def _shape(batch: Batch) -> Shape:
    rows, bins, _ = batch.features.shape
    if batch.slot is None:
        return Shape(rows, bins, batch.labels.shape[1])
    return Shape(rows, bins, batch.labels.shape[2], batch.bins.shape[1], batch.slot.shape[1])
