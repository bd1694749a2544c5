"""One training step of the 5 x 768 baseline on one CPU core: ours against PyTorch eager.

Both do the whole published step: augmentation, smoothing, forward, CTC, backward, clipping, AdamW
with three groups. Each has its own process on the same core. They step alternately, so that other
load affects both. Ours uses huge pages like `b2txt`, if Linux leaves that to the program.
`--huge-pages both` or `neither` makes the two alike.

Usage: python benchmarks/train_step.py [--batch 16] [--bins 1000] [--runs 9]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

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
from b2txt_jax.training.step import init_state, make_train_step

DAYS = 45


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
    """The published step in plain PyTorch, float32."""

    def __init__(self, config: Config):
        model, optimizer = config.model, config.optimizer
        self.config = config
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
        taps = torch.tensor(gaussian_taps(config.signal.smooth_std, config.signal.smooth_size))
        self.kernel = taps.view(1, 1, -1).repeat(512, 1, 1)

    def step(self, batch: Batch) -> float:
        """Run one optimizer step and return the loss."""
        model, signal = self.config.model, self.config.signal
        x, bins, day, labels, length = (torch.from_numpy(np.asarray(a)) for a in batch[:5])
        x = x + torch.randn_like(x) * signal.white_noise_std
        x = x + torch.randn(len(x), 1, 512) * signal.constant_offset_std
        cut = int(torch.randint(0, signal.random_cut, ()))
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
        log_probs = logits.log_softmax(2).permute(1, 0, 2)
        losses = functional.ctc_loss(log_probs, labels, frames, length, reduction="none")
        loss = losses.mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_norm)
        self.optimizer.step()
        return float(loss)


def our_steps(config: Config, batch: Batch) -> Callable[[], float]:
    """Compile the step. Return a function that runs one step and returns the loss."""
    state = init_state(config, DAYS)
    step = jax.jit(make_train_step(config, DAYS), donate_argnums=0).lower(state, batch).compile()

    def one() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics.loss)

    return one


def serve_steps(who: str, batch: int, bins: int) -> None:
    """Run one step for each line of the input and print its seconds."""
    torch.set_num_threads(1)
    config = load_config("configs/nejm_baseline.py", ["--config.model.dtype=float32"])
    data = random_batch(batch, bins)
    if who == "ours":
        one = our_steps(config, data)
    else:
        peer = Peer(config)

        def one() -> float:
            return peer.step(data)

    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        one()
        print(time.perf_counter() - started, flush=True)


def start(who: str, batch: int, bins: int, huge_pages: bool) -> subprocess.Popen[str]:
    """Start a worker and wait until it is ready."""
    command = [sys.executable, __file__, "--worker", who, f"--batch={batch}", f"--bins={bins}"]
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
    parser.add_argument("--worker", choices=("ours", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve_steps(args.worker, args.batch, args.bins)
        return

    workers = {
        "ours": start("ours", args.batch, args.bins, args.huge_pages != "neither"),
        "torch": start("torch", args.batch, args.bins, args.huge_pages == "both"),
    }
    times: dict[str, list[float]] = {name: [] for name in workers}
    for run in range(args.runs + 1):
        for name, worker in workers.items():
            times[name].append(timed_step(worker))
        if run:
            print(f"run {run}: ours {times['ours'][-1]:.2f} s, torch {times['torch'][-1]:.2f} s")
    for worker in workers.values():
        worker.communicate()
    ours, theirs = (times[name][1:] for name in workers)
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    print(
        f"B={args.batch}, T={args.bins}, float32, one core, huge pages: {args.huge_pages}: "
        f"ours {statistics.median(ours):.2f} s (least {min(ours):.2f}), PyTorch "
        f"{torch.__version__} eager {statistics.median(theirs):.2f} s (least {min(theirs):.2f}) "
        f"per step; ours is {statistics.median(ratios):.2f} times faster (median of {args.runs} "
        f"pairs, {min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
