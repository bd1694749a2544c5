"""One training step of the 5 x 768 baseline on one CPU core, or on a GPU: ours against PyTorch
eager, and with --compiled against torch.compile.

All do the whole published step: augmentation, smoothing, forward, CTC, backward, clipping, AdamW
with three groups. Each has its own process on the same core, or on the same GPU, of whose memory
ours takes three tenths. They step alternately, so that other load affects all. Ours uses huge pages
like `b2txt`, if Linux leaves that to the program. `--huge-pages both` or `neither` makes them
alike.

On a GPU (`--device gpu`, which also compares with torch.compile) products are in bfloat16, PyTorch
by autocast with its parameters in float32, and a timed call runs ten steps. Ours takes the
recurrence that `auto` means there, the wavefront. `--keys model.recurrence=scan` names another.

Usage: python benchmarks/train_step.py [--device gpu] [--batch 16] [--bins 1000] [--runs 9]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

ON_GPU = "gpu" in sys.argv or "--device=gpu" in sys.argv
if ON_GPU:
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.3"  # PyTorch's processes use the same GPU
else:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX counts the cores
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import torch
from torch.nn import functional

from b2txt_jax.config import Config, load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.huge_pages import huge_page_environment
from b2txt_jax.signal.smooth import gaussian_taps
from b2txt_jax.training.sharding import jit_train_step, make_mesh, place, sharded_state

DAYS = 45
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = "bfloat16" if ON_GPU else "float32"
STEPS = 10 if ON_GPU else 1
"""Of a timed call."""


def random_batch(batch: int, bins: int) -> Batch:
    """Return trials of full length with labels of a usual length (one phoneme per 120 ms)."""
    rng = np.random.default_rng(0)
    longest = bins // 6
    arrays = (
        rng.normal(size=(batch, bins, 512)).astype(np.float32),
        np.full(batch, bins, np.int32),
        np.repeat(rng.choice(DAYS, 4, replace=False), batch // 4).astype(np.int32),
        rng.integers(1, 41, (batch, longest)).astype(np.int32),
        rng.integers(longest // 2, longest + 1, batch).astype(np.int32),
    )
    return Batch(*arrays)  # type: ignore[arg-type]


class Peer:
    """The published step in plain PyTorch."""

    def __init__(self, config: Config, compiled: bool):
        model, optimizer = config.model, config.optimizer
        self.config = config
        torch.set_default_device(DEVICE)
        self.day_weight = [torch.nn.Parameter(torch.eye(512)) for _ in range(DAYS)]
        self.day_bias = [torch.nn.Parameter(torch.zeros(1, 512)) for _ in range(DAYS)]
        self.gru = torch.nn.GRU(
            512 * model.patch_size,
            model.units,
            model.layers,
            dropout=model.rnn_dropout,
            batch_first=True,
        )
        self.head = torch.nn.Linear(model.units, model.classes)
        self.h0 = torch.nn.Parameter(torch.zeros(1, 1, model.units))
        named = [*self.gru.named_parameters(), *self.head.named_parameters()]
        biases = [value for name, value in named if "bias" in name]
        weights = [value for name, value in named if "bias" not in name] + [self.h0]
        self.parameters = [*biases, *weights, *self.day_weight, *self.day_bias]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": biases, "weight_decay": 0.0},
                {"params": [*self.day_weight, *self.day_bias], "weight_decay": 0.0},
                {"params": weights, "weight_decay": optimizer.weight_decay},
            ],
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
        )
        self.logits = torch.compile(self._logits) if compiled else self._logits
        taps = torch.tensor(gaussian_taps(config.signal.smooth_std, config.signal.smooth_size))
        self.kernel = taps.view(1, 1, -1).repeat(512, 1, 1)

    def step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Run one optimizer step and return the loss."""
        return self.cut_step(batch, int(np.random.randint(0, self.config.signal.random_cut)))

    def cut_step(self, batch: list[torch.Tensor], cut: int) -> torch.Tensor:
        """Run one optimizer step on trials without their first `cut` bins."""
        with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
            logits, frames = self.logits(*batch[:3], cut)
        # In float32 and outside the compiled part, as cuDNN's and PyTorch's own kernels have it.
        log_probs = logits.float().log_softmax(2).permute(1, 0, 2)
        losses = functional.ctc_loss(log_probs, batch[3], frames, batch[4], reduction="none")
        loss = losses.mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def _logits(
        self, x: torch.Tensor, bins: torch.Tensor, day: torch.Tensor, cut: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and valid frames."""
        model, signal = self.config.model, self.config.signal
        x = x + torch.randn_like(x) * signal.white_noise_std
        x = x + torch.randn(len(x), 1, 512, device=x.device) * signal.constant_offset_std
        x, bins = x[:, cut:], bins - cut
        x = functional.conv1d(x.permute(0, 2, 1), self.kernel, padding="same", groups=512)
        x = x.permute(0, 2, 1)
        weight = torch.stack([self.day_weight[i] for i in day])
        bias = torch.cat([self.day_bias[i] for i in day])[:, None]
        x = functional.softsign(torch.einsum("btd,bdk->btk", x, weight) + bias)
        x = functional.dropout(x, model.input_dropout)
        x = x.unfold(1, model.patch_size, model.patch_stride).permute(0, 1, 3, 2).flatten(2)
        h0 = self.h0.expand(model.layers, len(x), model.units).contiguous()
        logits = self.head(self.gru(x, h0)[0])
        frames = (bins - model.patch_size) // model.patch_stride + 1
        return logits, frames


def our_steps(config: Config, batch: Batch) -> Callable[[], float]:
    """Compile the step as training does. Return a function that runs STEPS steps and returns the
    last loss."""
    mesh = make_mesh(1, jax.devices()[:1])
    state, placed = sharded_state(config, DAYS, mesh), place(batch, mesh)
    step = jit_train_step(config, DAYS, mesh).lower(state, placed).compile()

    def one() -> float:
        nonlocal state
        for _ in range(STEPS):
            state, metrics = step(state, placed)
        return float(metrics.loss)

    return one


def serve_steps(who: str, batch: int, bins: int, keys: list[str]) -> None:
    """Run STEPS steps for each line of the input and print the seconds of one."""
    torch.set_num_threads(1)
    if ON_GPU and who == "ours" and jax.default_backend() != "gpu":
        raise SystemExit(
            f"JAX sees no GPU but {jax.devices()}: install the extra `cuda` and run b2txt doctor"
        )
    if ON_GPU and who != "ours" and not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} sees no GPU: install a build with CUDA")
    keys = [f"model.dtype={DTYPE}", *keys]
    config = load_config("nejm_baseline", [f"--config.{key}" for key in keys])
    data = random_batch(batch, bins)
    if who == "ours":
        one = our_steps(config, data)
    else:
        peer = Peer(config, who == "compiled")
        held = [torch.from_numpy(np.asarray(value)).to(DEVICE) for value in data[:5]]
        for cut in range(config.signal.random_cut):
            peer.cut_step(held, cut)  # torch.compile compiles each anew

        def one() -> float:
            for _ in range(STEPS):
                loss = peer.step(held)
            return float(loss)  # waits for the GPU

    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        one()
        print((time.perf_counter() - started) / STEPS, flush=True)


def start(args: argparse.Namespace, who: str, huge_pages: bool) -> subprocess.Popen[str]:
    """Start a worker and wait until it is ready."""
    command = [sys.executable, __file__, "--worker", who, f"--device={args.device}"]
    command += [f"--batch={args.batch}", f"--bins={args.bins}", "--keys", *args.keys]
    environment = {**os.environ, **(huge_page_environment() if huge_pages else {})}
    pipe = subprocess.PIPE
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        raise SystemExit(f"the worker '{who}' ended before its first step; its message is above")
    return worker


def timed_step(worker: subprocess.Popen[str]) -> float:
    """Return the seconds of one step."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16, help="trials, a multiple of 4")
    parser.add_argument("--bins", type=int, default=1000, help="of 20 ms per trial")
    parser.add_argument("--runs", type=int, default=9, help="counted steps of each, after one more")
    parser.add_argument("--huge-pages", choices=("ours", "both", "neither"), default="ours")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile")
    smaller = "configuration keys, such as model.units=64 for a trial of this script"
    parser.add_argument("--keys", nargs="*", default=[], help=smaller)
    parser.add_argument("--worker", choices=("ours", "eager", "compiled"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve_steps(args.worker, args.batch, args.bins, args.keys)
        return

    peers = ["eager", *(["compiled"] if args.compiled or ON_GPU else [])]
    workers = {"ours": start(args, "ours", args.huge_pages != "neither")}
    workers |= {name: start(args, name, args.huge_pages == "both") for name in peers}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for run in range(args.runs + 1):
        for name, worker in workers.items():
            times[name].append(timed_step(worker))
        if run:
            shown = ", ".join(f"{name} {1e3 * times[name][-1]:.1f}" for name in workers)
            print(f"run {run}: {shown} ms")
    for worker in workers.values():
        worker.communicate()
    ours = times.pop("ours")[1:]
    where = jax.devices()[0].device_kind if ON_GPU else "one core"
    print(
        f"B={args.batch}, T={args.bins}, {DTYPE}, {where}, huge pages: {args.huge_pages}: ours "
        f"{1e3 * statistics.median(ours):.1f} ms per step (least {1e3 * min(ours):.1f})"
    )
    for name, (_, *theirs) in times.items():
        ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
        print(
            f"PyTorch {torch.__version__} {name} {1e3 * statistics.median(theirs):.1f} ms (least "
            f"{1e3 * min(theirs):.1f}): ours is {statistics.median(ratios):.2f} times faster "
            f"(median of {args.runs} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
