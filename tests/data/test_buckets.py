import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b2txt_jax.data.batches.buckets import (
    buckets_of_data,
    choose_buckets,
    share_of_batches,
    share_of_epochs,
)
from b2txt_jax.data.batches.plan import epoch_plan, plan

LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 30)), min_size=1, max_size=9)


def rounded(length, multiple):
    return -(-length // multiple) * multiple


def expected_bins(buckets, bins, weights):
    """Of batches whose longest trial has bins[i] with probability weights[i]."""
    return sum(w * min(b for b in buckets if b >= n) for n, w in zip(bins, weights, strict=True))


def smallest_expectation(bins, weights, count, multiple):
    """By trying every set of at most `count` sizes that holds all."""
    sizes = sorted({rounded(n, multiple) for n in bins})
    return min(
        expected_bins((*chosen, sizes[-1]), bins, weights)
        for k in range(min(count, len(sizes)))
        for chosen in itertools.combinations(sizes[:-1], k)
    )


@given(LENGTHS, st.integers(1, 5), st.sampled_from([1, 3, 8]), st.data())
def test_no_set_of_buckets_has_less_padding(lengths, count, multiple, data):
    bins = sorted(n for n, _ in lengths)
    weights = np.array(
        data.draw(st.lists(st.integers(0, 9), min_size=len(bins), max_size=len(bins)))
    )
    weights = weights / max(1, weights.sum())

    def share(sizes):
        return np.array([weights[np.array(bins) <= size].sum() for size in sizes])

    buckets = choose_buckets(lengths, count, multiple, share)
    got = expected_bins([b for b, _ in buckets], bins, weights)
    assert got == pytest.approx(smallest_expectation(bins, weights, count, multiple))


@given(LENGTHS, st.integers(1, 5), st.sampled_from([1, 3, 8]))
def test_buckets_ascend_in_multiples_and_a_label_never_forces_a_larger_one(
    lengths, count, multiple
):
    buckets = choose_buckets(lengths, count, multiple)
    assert 1 <= len(buckets) <= count
    assert list(buckets) == sorted(set(buckets))
    assert all(size % multiple == 0 for bucket in buckets for size in bucket)
    assert [label for _, label in buckets] == sorted(label for _, label in buckets)
    for bins, labels in lengths:
        first = next(bucket for bucket in buckets if bins <= bucket[0])
        assert labels <= first[1]


def test_buckets_that_would_save_nothing_are_not_made():
    assert choose_buckets([(100, 10)] * 50 + [(97, 9)], 6, 16) == ((112, 16),)
    everything_is_longest = choose_buckets(
        [(16, 1), (32, 2), (48, 3)], 3, 16, lambda sizes: (sizes >= 48).astype(float)
    )
    assert everything_is_longest == ((48, 16),)


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 2),
)
def test_the_share_of_batches_that_fit_is_that_of_counting_all_batches(days, per_batch, per_day):
    drawn = [day for day in days if day]
    if len(drawn) < per_batch:
        with pytest.raises(ValueError, match=f"needed {per_batch}"):
            share_of_batches(days, per_batch, per_day)
        return
    sizes = np.arange(0, 11)
    total = np.zeros(len(sizes))
    choices = list(itertools.combinations(drawn, per_batch))
    for chosen in choices:
        rows = [day for day in chosen for _ in range(per_day)]
        longest = np.array([max(batch) for batch in itertools.product(*rows)])
        total += [np.mean(longest <= size) for size in sizes]
    got = share_of_batches(days, per_batch, per_day)(sizes)
    np.testing.assert_allclose(got, total / len(choices), atol=1e-12)


def test_the_padding_told_is_that_of_the_batches_that_training_draws():
    random = np.random.default_rng(0)
    days = [
        [(int(n), int(n) // 9) for n in random.gamma(6, scale, 40) + 80]
        for scale in (60, 90, 120, 150, 75)
    ]
    choice = buckets_of_data(days, [(300, 30)] * 5, 3, 4)
    padded = real = 0
    for step in range(4000):
        rows = plan(7, step, [len(day) for day in days], 3, 4)
        bins = [days[day][trial][0] for day, trial in rows]
        padded += next(b for b, _ in choice.buckets if b >= max(bins)) * len(bins)
        real += sum(bins)
    assert choice.training_padding == pytest.approx(1 - real / padded, abs=0.01)
    in_one = buckets_of_data(days, [(300, 30)] * 5, 3, 4, count=1)
    assert choice.training_padding < in_one.training_padding


@given(st.lists(st.integers(1, 10), min_size=1, max_size=7), st.integers(1, 8))
def test_the_share_of_epochs_that_fits_is_that_of_counting_all_batches(bins, rows):
    batches = list(itertools.combinations(bins, min(rows, len(bins))))
    sizes = np.arange(0, 12)
    counted = np.mean([[max(batch) <= size for size in sizes] for batch in batches], axis=0)
    np.testing.assert_allclose(share_of_epochs(bins, rows)(sizes), counted, atol=1e-12)


def test_the_padding_told_of_epochs_is_that_of_their_batches():
    random = np.random.default_rng(0)
    days = [
        [(int(n), int(n) // 9) for n in random.gamma(6, scale, count) + 80]
        for scale, count in ((60, 90), (150, 20))
    ]
    choice = buckets_of_data(days, [(300, 30)] * 5, 3, 4, "epochs")
    padded = real = 0
    for step in range(4000):
        rows = epoch_plan(7, step, [len(day) for day in days], 12)
        bins = [days[day][trial][0] for day, trial in rows]
        padded += next(b for b, _ in choice.buckets if b >= max(bins)) * len(bins)
        real += sum(bins)
    assert choice.training_padding == pytest.approx(1 - real / padded, abs=0.01)


def test_buckets_for_random_batches_lie_where_the_longest_of_many_trials_lies():
    random = np.random.default_rng(1)
    bins = random.gamma(6, 100, 500).astype(int) + 100
    day = [(int(n), 1) for n in bins]
    alone = choose_buckets(day, 4, 16)
    together = buckets_of_data([day], [], 1, 64, count=4).buckets
    assert alone[0][0] < np.median(bins) < np.quantile(bins, 0.9) < together[0][0]


def test_a_folder_for_evaluation_alone_gets_buckets_for_its_trials():
    choice = buckets_of_data([[], []], [(40, 0), (50, 0), (400, 0)], 4, 16)
    assert choice.buckets == ((48, 16), (64, 16), (400, 16))
    assert choice.evaluation_padding == pytest.approx(1 - 490 / 512)
    with pytest.raises(ValueError, match="no trials"):
        buckets_of_data([[]], [], 4, 16)
