"""Training here and in PyTorch from the same weights on the same batches without noise."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from published import (
    PublishedDecoder,
    differences,
    distance,
    greedy,
    losses_of,
    read,
    train,
)

from b2txt_jax.config import load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.metrics import ErrorRate, error_rate, greedy_decode, total
from b2txt_jax.training.optimizer import make_optimizer
from b2txt_jax.training.step import TrainState, make_eval_step, make_train_step, model_of

DAYS, FEATURES, STEPS = 5, 12, 100
BASELINE = load_config("configs/nejm_baseline.py")
CONFIG = dataclasses.replace(
    BASELINE,
    data=dataclasses.replace(BASELINE.data, feature_count=FEATURES),
    signal=dataclasses.replace(
        BASELINE.signal, white_noise_std=0.0, constant_offset_std=0.0, random_cut=0
    ),
    model=dataclasses.replace(
        BASELINE.model,
        units=32,
        layers=2,
        input_dropout=0.0,
        rnn_dropout=0.0,
        patch_size=6,
        dtype="float32",
        recurrence="scan",
    ),
    optimizer=dataclasses.replace(
        BASELINE.optimizer,
        learning_rate=0.04,
        day_learning_rate=0.02,
        warmup_steps=10,
        day_warmup_steps=15,
        decay_steps=90,
        day_decay_steps=80,
        clip_norm=4.0,
    ),
)


def sessions(seed: int):
    """Draws batches of two of the days: each label is seen as its class's own pattern."""
    rng = np.random.default_rng(seed)
    patterns = 2 * rng.normal(size=(8, FEATURES))
    drift = np.eye(FEATURES) + 0.15 * rng.normal(size=(DAYS, FEATURES, FEATURES))

    def batch(days, rows, length=96, longest=9) -> Batch:
        features = np.zeros((rows, length, FEATURES), np.float32)
        labels = np.zeros((rows, longest), np.int32)
        sizes, bins = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        day = np.array([days[row % len(days)] for row in range(rows)], np.int32)
        for row in range(rows):
            sizes[row] = rng.integers(3, longest + 1)
            labels[row, : sizes[row]] = rng.integers(1, 8, sizes[row])
            bins[row] = 10 * sizes[row] + rng.integers(2, 6)
            shown = np.zeros((bins[row], FEATURES))
            for k in range(sizes[row]):
                shown[10 * k + 3 : 10 * k + 9] = patterns[labels[row, k]]
            noisy = shown + 0.5 * rng.normal(size=shown.shape)
            features[row, : bins[row]] = noisy @ drift[day[row]]
        return Batch(features, bins, day, labels, sizes)

    def training(steps):
        return [batch(rng.choice(DAYS, 2, replace=False), 8) for _ in range(steps)]

    return training(STEPS), batch(list(range(DAYS)), 40)


@pytest.fixture(scope="module")
def ours_and_theirs():
    """Losses, final parameters and validation data of both, after the same hundred steps."""
    batches, held_out = sessions(0)
    torch.manual_seed(0)
    decoder = PublishedDecoder(CONFIG.model, FEATURES, DAYS, torch.float32)
    start = read(decoder, FEATURES, DAYS)
    moments = make_optimizer(CONFIG.optimizer, model_of(CONFIG, DAYS).group).init(start)
    state = TrainState(np.zeros((), np.int32), start, moments)
    step = jax.jit(make_train_step(CONFIG, DAYS))
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    return losses, state.params, decoder, train(decoder, batches, CONFIG), held_out


def test_a_hundred_steps_give_the_losses_of_pytorch(ours_and_theirs):
    ours, _, _, theirs, _ = ours_and_theirs
    np.testing.assert_allclose(ours, theirs, rtol=5e-5)
    # The run must have learned something, or agreement would say little.
    assert np.mean(ours[-5:]) < 0.25 * ours[0]


def test_a_hundred_steps_give_the_parameters_of_pytorch(ours_and_theirs):
    _, params, decoder, _, _ = ours_and_theirs
    found = differences(decoder, params, gradients=False)
    assert max(found.values()) < 5e-5, found


@pytest.mark.slow
def test_both_models_have_the_same_validation_loss_and_phoneme_error_rate(ours_and_theirs):
    _, params, decoder, _, held_out = ours_and_theirs
    output = jax.jit(make_eval_step(CONFIG, DAYS))(params, held_out)
    decoder.eval()
    with torch.no_grad():
        losses, logits, frames = losses_of(decoder, held_out, CONFIG)
    np.testing.assert_allclose(output.loss, losses, rtol=1e-3)

    labels = [
        row[:size].tolist()
        for row, size in zip(held_out.labels, held_out.label_length, strict=True)
    ]
    ours = total(
        error_rate(label, greedy_decode(np.asarray(row)[:size]).tolist())
        for label, row, size in zip(labels, output.logits, output.frames, strict=True)
    )
    theirs = sum(
        distance(label, greedy(row[:size]))
        for label, row, size in zip(labels, logits, frames, strict=True)
    )
    assert ours == ErrorRate(theirs, sum(map(len, labels)))
    assert 0 < ours.rate < 0.6
