"""Checkpoints of a run: the latest full state, to resume, and the best parameters, to decode."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from b2txt_jax.errors import UserError
from b2txt_jax.model.interface import Params
from b2txt_jax.training.checksum import checksums, text_checksum
from b2txt_jax.training.step import TrainState

RAW, EMA = "raw", "ema"
"""Weights that a run can be used with: those that the optimizer steps, and their moving average."""
WEIGHTS = (RAW, EMA)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, cannot be read, or cannot be written."""


@dataclass(frozen=True)
class BestScore:
    """The best validation so far. A lower PER wins, at equal PER the lower loss (NEJM reference,
    section 4).

    Attributes:
      per: phoneme error rate.
      loss: mean CTC loss (ln).
      step: at which it was measured.
      validations_since: that found nothing better.
      ema: the best validation of the averaged weights, with `train.ema`.
    """

    per: float
    loss: float
    step: int
    validations_since: int = 0
    ema: BestScore | None = None

    @classmethod
    def of(cls, saved: dict[str, Any]) -> BestScore:
        """Return what `asdict` made a dict of. Older ones lack `ema`."""
        ema = saved.get("ema")
        return cls(**{**saved, "ema": cls.of(ema) if ema else None})

    def beats(self, other: BestScore | None) -> bool:
        """Return whether this score replaces `other`."""
        return other is None or (self.per, self.loss) < (other.per, other.loss)


def has_checkpoint(workdir: Path) -> bool:
    """Return whether a run in `workdir` has saved a full state to resume from."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints" / "latest").glob("*"))


class Checkpoints:
    """`latest`, `best` and, with averaged weights, `best_ema` in `WORKDIR/checkpoints`, written in
    the background by Orbax.

    Orbax reads a flipped bit of a weight as another weight, so checksums are saved too.
    """

    def __init__(self, workdir: Path, read_only: bool = False, ema: bool = False):
        """`read_only` leaves the folder as it is, for use beside a training. `ema`: the run has
        averaged weights."""
        folder = workdir.absolute() / "checkpoints"

        def manager(name: str, kept: int) -> ocp.CheckpointManager:
            # Both save in the background at once: without a prefix, their barriers between
            # processes share one name, and the second one to arrive fails.
            apart = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=kept,
                create=not read_only,
                read_only=read_only,
                multiprocessing_options=apart,
            )
            return ocp.CheckpointManager(folder / name, options=options)

        # Two of the latest: when a disk damages one, the run goes on from the one before.
        self._latest = manager("latest", 2)
        self._best = {RAW: manager("best", 1)}
        if ema:
            self._best[EMA] = manager("best_ema", 1)
        self._started: dict[ocp.CheckpointManager, int] = {}

    def prepare(self, state: TrainState) -> None:
        """Compile what saving needs, so that saves compile nothing."""
        checksums(_tree(state))
        checksums(state.params)

    def latest_step(self) -> int | None:
        """Return the step of the latest full state, if there is one."""
        step: int | None = self._latest.latest_step()
        return step

    def save_latest(self, step: int, state: TrainState, best: BestScore | None) -> None:
        """Save the full state. Return before it is on disk.

        Raises:
          CheckpointError: this save, or the one before it, failed.
        """
        if self._latest.latest_step() != step:
            best_score = asdict(best) if best else None
            with self._naming(step, self._latest):
                self._latest.save(step, args=_arguments(_tree(state), best_score))

    def save_best(self, step: int, params: Params, best: BestScore, weights: str = RAW) -> None:
        """Save the parameters of the best validation. Return before they are on disk.

        Args:
          step: of the optimizer.
          params: the weights themselves or their average.
          best: their score.
          weights: which they are, RAW or EMA. Each has a best checkpoint of its own.

        Raises:
          CheckpointError: this save, or the one before it, failed.
        """
        manager = self._best[weights]
        with self._naming(step, manager):
            for stale in manager.all_steps():
                # Left by steps that were lost when the run was killed and are now repeated.
                if stale >= step:
                    manager.delete(stale)
            saved = manager.save(step, args=_arguments(params, asdict(best)), force=True)
        if not saved:
            raise CheckpointError(f"the best parameters of step {step} were not saved; try again")

    def restore_latest(self, like: TrainState) -> tuple[TrainState, BestScore | None]:
        """Restore the full state, with the shapes and placement of `like`.

        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        tree, best = _restore(self._latest, _tree(like))
        return TrainState(**tree), BestScore.of(best) if best else None

    def restore_best(self, like: Params, weights: str = RAW) -> tuple[Params, BestScore]:
        """Restore the best parameters, RAW or EMA.

        Raises:
          CheckpointError: there are none, or they cannot be read.
        """
        tree, best = _restore(self._best[weights], like)
        return tree, BestScore.of(best)

    def wait(self) -> None:
        """Wait until everything that was saved is on disk.

        Raises:
          CheckpointError: a save failed.
        """
        for manager in (self._latest, *self._best.values()):
            with self._naming(None, manager):
                manager.wait_until_finished()

    @contextmanager
    def _naming(self, step: int | None, manager: ocp.CheckpointManager) -> Iterator[None]:
        """Turn a failed save into an error that names the step, the folder and what is left.

        Saves end in the background, so the next call raises for a failure: the step that was in
        flight is named too. `step` is the one that this call starts to save. None: it only waits.
        """
        before = self._started.get(manager)
        if step is not None:
            self._started[manager] = step
        try:
            yield
        # Orbax raises many kinds; each is re-raised with what a user needs to know.
        except Exception as error:
            folder = Path(manager.directory)
            free = shutil.disk_usage(folder).free / 2**20
            kept = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
            tried = sorted({at for at in (before, step) if at is not None} - set(kept))
            raise CheckpointError(
                f"saving step {' or '.join(map(str, tried))} in {folder} failed "
                f"({type(error).__name__}: {_first_line(error)}); {free:.0f} MB are free there. "
                f"Complete checkpoints that are left: steps {kept or 'none'}. Make room, then "
                "start the same command: it goes on from the last one"
            ) from error

    def close(self) -> None:
        """Wait, and release Orbax's threads."""
        for manager in (self._latest, *self._best.values()):
            manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing raises for a failed save once more; the error being raised names it already.
        quietly = contextlib.nullcontext() if kind is None else contextlib.suppress(Exception)
        with quietly:
            self.close()


def _tree(state: TrainState) -> dict[str, Any]:
    """Return what is saved. A run without averaged weights has no entry for them."""
    return {name: value for name, value in state._asdict().items() if value is not None}


def _first_line(error: Exception) -> str:
    """Return the first line of an error: Orbax's texts run to thousands of characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:600] if lines else type(error).__name__


def _arguments(tree: Any, best: dict[str, Any] | None) -> ocp.args.Composite:
    extra: dict[str, Any] = {"best": best, "checksums": checksums(tree)}
    extra["crc32"] = _crc(extra)
    return ocp.args.Composite(tree=ocp.args.StandardSave(tree), extra=ocp.args.JsonSave(extra))


def _crc(extra: dict[str, Any]) -> int:
    """Return the checksum of everything but the checksum."""
    rest = {key: value for key, value in extra.items() if key != "crc32"}
    return text_checksum(json.dumps(rest, sort_keys=True))


def _check_sums(tree: Any, extra: dict[str, Any], folder: Path) -> None:
    """Raise ValueError when arrays or score are not those that were saved."""
    if "crc32" not in extra and "checksums" not in extra:
        warnings.warn(f"{folder} was written without checksums: it is used as it is", stacklevel=2)
        return
    if extra.get("crc32") != _crc(extra):
        raise ValueError("its score and checksums are not what was saved")
    found = checksums(tree)
    wrong = sorted(name for name, value in extra["checksums"].items() if found.get(name) != value)
    if wrong:
        raise ValueError(
            f"{', '.join(wrong[:3])}{' and others' if wrong[3:] else ''}: not what was saved, by "
            f"the checksums of {len(wrong)} of {len(found)} arrays"
        )


def _restore(manager: ocp.CheckpointManager, like: Any) -> tuple[Any, Any]:
    """Return the tree and the score of the last step."""
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
    earlier = [other for other in manager.all_steps() if other < step]
    instead = (
        f"remove that folder to go on from step {max(earlier)}"
        if earlier
        else "train into a new --workdir"
    )
    try:
        restored = manager.restore(step, args=arguments)
        _check_sums(restored.tree, restored.extra, Path(manager.directory / str(step)))
    # Orbax raises many kinds for damaged files; each is re-raised with the folder and what to do.
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {manager.directory / str(step)} cannot be read "
            f"({_first_line(error)}); its files "
            f"are damaged or belong to another model: restore them, or {instead}"
        ) from error
    return restored.tree, restored.extra["best"]
