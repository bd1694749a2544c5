"""Checkpoints of a run: the latest full state, to go on from, and the best parameters, to decode
with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from b2txt_jax.errors import UserError
from b2txt_jax.model.decoder import Params
from b2txt_jax.training.step import TrainState


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing or cannot be read."""


@dataclass(frozen=True)
class BestScore:
    """The best validation so far; a lower PER wins, at equal PER the lower loss (NEJM reference,
    section 4)."""

    per: float
    loss: float
    step: int

    def beats(self, other: BestScore | None) -> bool:
        """Whether this score replaces `other`."""
        return other is None or (self.per, self.loss) < (other.per, other.loss)


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run in `workdir` has saved a full state to go on from."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints" / "latest").glob("*"))


class Checkpoints:
    """`WORKDIR/checkpoints/latest` and `WORKDIR/checkpoints/best`, written in the background by
    Orbax."""

    def __init__(self, workdir: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        folder = workdir.absolute() / "checkpoints"
        self._latest = ocp.CheckpointManager(folder / "latest", options=options)
        self._best = ocp.CheckpointManager(folder / "best", options=options)

    def latest_step(self) -> int | None:
        """The step of the latest full state, if there is one."""
        step: int | None = self._latest.latest_step()
        return step

    def save_latest(self, step: int, state: TrainState, best: BestScore | None) -> None:
        """Saves the full state; returns before it is on disk."""
        if self._latest.latest_step() != step:
            extra = {"best": asdict(best) if best else None}
            self._latest.save(step, args=_arguments(state._asdict(), extra))

    def save_best(self, step: int, params: Params, best: BestScore) -> None:
        """Saves the parameters of the best validation; returns before they are on disk.

        Raises:
          CheckpointError: Orbax declined to save.
        """
        for stale in self._best.all_steps():
            # Of steps that were lost when the run was killed and are now done again.
            if stale >= step:
                self._best.delete(stale)
        if not self._best.save(step, args=_arguments(params, {"best": asdict(best)}), force=True):
            raise CheckpointError(f"the best parameters of step {step} were not saved; try again")

    def restore_latest(self, like: TrainState) -> tuple[TrainState, BestScore | None]:
        """Restores the full state, with the shapes and placement of `like`.

        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        tree, extra = _restore(self._latest, like._asdict())
        best = extra["best"]
        return TrainState(**tree), BestScore(**best) if best else None

    def restore_best(self, like: Params) -> tuple[Params, BestScore]:
        """Restores the best parameters.

        Raises:
          CheckpointError: there are none, or they cannot be read.
        """
        tree, extra = _restore(self._best, like)
        return tree, BestScore(**extra["best"])

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        self._latest.wait_until_finished()
        self._best.wait_until_finished()

    def close(self) -> None:
        """Waits and releases Orbax's threads."""
        self._latest.close()
        self._best.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _arguments(tree: Any, extra: dict[str, Any]) -> ocp.args.Composite:
    return ocp.args.Composite(tree=ocp.args.StandardSave(tree), extra=ocp.args.JsonSave(extra))


def _restore(manager: ocp.CheckpointManager, like: Any) -> tuple[Any, dict[str, Any]]:
    step = manager.latest_step()
    if step is None:
        raise CheckpointError(
            f"{manager.directory} holds no checkpoint; train first, or give the run's folder as "
            "--workdir"
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    arguments = ocp.args.Composite(
        tree=ocp.args.StandardRestore(abstract), extra=ocp.args.JsonRestore()
    )
    try:
        restored = manager.restore(step, args=arguments)
    # Orbax raises many kinds for damaged files; each is re-raised with the folder and what to do.
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {manager.directory / str(step)} cannot be read ({error}); its files "
            "are damaged or belong to another model: restore them, or train into a new --workdir"
        ) from error
    return restored.tree, restored.extra
