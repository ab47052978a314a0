"""If the plan of batches breaks, results depend on the number of ranks, and no scaling experiment means anything."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchreg.core.batches import BatchLoader, BatchPlan, shuffled

SAMPLINGS = ("shuffle", "random", "full")


@st.composite
def plans(draw):
    num_rows = draw(st.integers(1, 200))
    sampling = draw(st.sampled_from(SAMPLINGS))
    batch = None if sampling == "full" else draw(st.integers(1, num_rows))
    return BatchPlan.derive(
        num_rows,
        draw(st.integers(1, 9)),
        global_batch_size=batch,
        micro_batch_size=draw(st.none() | st.integers(1, 20)),
        sampling=sampling,
        seed=draw(st.integers(0, 5)),
        reproducible=draw(st.booleans()),
    )


def batches(plan, rank, start, stop):
    """This rank's batches of a table whose rows are their own numbers, (row, −row)."""
    rows = torch.arange(plan.num_rows, dtype=torch.float64)
    return list(BatchLoader(plan, rank, rows[:, None], -rows).iterate(start, stop))


def samples_of(batch):
    return np.concatenate([x[:, 0].numpy() for x, _ in batch.micro_batches])


@given(plan=plans(), start=st.integers(0, 150), count=st.integers(1, 40))
def test_ranks_together_have_exactly_the_samples_of_the_step(plan, start, count):
    ranks = [batches(plan, rank, start, start + count) for rank in range(plan.world_size)]
    for step, of_ranks in enumerate(zip(*ranks, strict=True), start=start):
        shards = [samples_of(batch) for batch in of_ranks]
        unit = plan.micro_batch_size if plan.reproducible else 1
        units = [math.ceil(len(shard) / unit) for shard in shards]
        assert max(units) - min(units) <= 1
        np.testing.assert_array_equal(np.concatenate(shards), plan.samples_of_step(step))
        assert {(batch.step, batch.num_samples) for batch in of_ranks} == {(step, len(plan.samples_of_step(step)))}


@given(plan=plans(), start=st.integers(0, 150), count=st.integers(1, 40))
def test_micro_batches_are_as_small_as_asked_for_and_y_belongs_to_x(plan, start, count):
    for batch in batches(plan, plan.world_size - 1, start, start + count):
        assert len(batch.micro_batches) >= 1
        for x, y in batch.micro_batches:
            assert len(x) <= (plan.micro_batch_size or plan.num_rows)
            assert torch.equal(x[:, 0], -y)


@given(plan=plans(), step=st.integers(0, 150))
def test_reproducible_micro_batches_are_the_same_whichever_rank_has_them(plan, step):
    if not plan.reproducible:
        return
    found = {}
    for rank in range(plan.world_size):
        (batch,) = batches(plan, rank, step, step + 1)
        for position, (x, _) in enumerate(batch.micro_batches, start=batch.first_micro_batch):
            if len(x):
                found[position] = x[:, 0].tolist()
    samples, size = plan.samples_of_step(step).tolist(), plan.micro_batch_size
    assert found == {i: samples[i * size : (i + 1) * size] for i in range(-(-len(samples) // size))}
    assert max(found) < plan.num_micro_batches


@given(plan=plans(), world_size=st.integers(1, 9), step=st.integers(0, 300))
def test_samples_of_a_step_do_not_depend_on_the_world_size(plan, world_size, step):
    other = BatchPlan(
        plan.num_rows, world_size, plan.global_batch_size, plan.micro_batch_size, plan.sampling, plan.seed
    )
    np.testing.assert_array_equal(plan.samples_of_step(step), other.samples_of_step(step))


@given(plan=plans(), epoch=st.integers(0, 4))
def test_every_row_counts_exactly_once_an_epoch(plan, epoch):
    if plan.sampling == "random":
        return
    first = epoch * plan.steps_per_epoch
    rows = np.concatenate([plan.samples_of_step(first + i) for i in range(plan.steps_per_epoch)])
    np.testing.assert_array_equal(np.sort(rows), np.arange(plan.num_rows))


@given(plan=plans(), step=st.integers(0, 300))
def test_no_row_is_twice_in_a_step(plan, step):
    rows = plan.samples_of_step(step)
    assert len(set(rows.tolist())) == len(rows)


def test_epochs_and_seeds_differ():
    plan = BatchPlan.derive(551, 1, global_batch_size=551)
    other_seed = BatchPlan.derive(551, 1, global_batch_size=551, seed=1)
    assert not np.array_equal(plan.samples_of_step(0), plan.samples_of_step(1))
    assert not np.array_equal(plan.samples_of_step(0), other_seed.samples_of_step(0))


def test_shards_of_551_samples_on_4_ranks():
    # 551 = 4 · 137 + 3: three ranks have 138 samples, the last 137.
    plan = BatchPlan.derive(551, 4, sampling="full")
    shards = [plan.shard(551, rank) for rank in range(4)]
    assert [shard.stop - shard.start for shard in shards] == [138, 138, 138, 137]
    assert plan.local_batch_size == 138


def test_a_rank_without_samples_takes_part_with_an_empty_micro_batch():
    plan = BatchPlan.derive(10, 4, global_batch_size=3)
    (batch,) = batches(plan, 3, 0, 1)
    assert [len(x) for x, _ in batch.micro_batches] == [0]
    assert batch.num_samples == 3


def test_weak_scaling_derives_the_global_batch():
    plan = BatchPlan.derive(551, 4, local_batch_size=64, micro_batch_size=24)
    # 64 samples in micro-batches of 24: 24 + 24 + 16, so three forwards make a step.
    assert (plan.global_batch_size, plan.accumulation_steps) == (256, 3)
    assert BatchPlan.derive(551, 2).global_batch_size == 128


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"global_batch_size": 600}, ["600", "551", "global_batch_size"]),
        ({"local_batch_size": 64}, ["64 samples × 9 ranks", "576", "551"]),
        ({"global_batch_size": 64, "local_batch_size": 64}, ["one of them"]),
        # 0 is not "unset": it would train with another size, or end in a division by 0, without a word.
        ({"global_batch_size": 0}, ["global_batch_size is 0", "at least 1"]),
        ({"local_batch_size": 0}, ["local_batch_size is 0", "at least 1"]),
        ({"micro_batch_size": 0}, ["micro_batch_size is 0", "at least 1"]),
        ({"local_batch_size": -8}, ["local_batch_size is -8", "at least 1"]),
    ],
)
def test_sizes_that_cannot_fit_are_refused_with_all_numbers(sizes, parts):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is checked below
        BatchPlan.derive(551, 9, **sizes)
    assert all(part in str(refused.value) for part in parts)


@given(num_rows=st.integers(1, 3_000), seed=st.integers(0, 2**64), key=st.integers(0, 2**40))
def test_a_keyed_shuffle_has_each_row_once(num_rows, seed, key):
    """Else some samples count twice in an epoch and others never."""
    rows = shuffled(np.arange(num_rows), num_rows, seed, np.array([key]))
    assert sorted(rows) == list(range(num_rows))


LARGE = {"num_rows": 100_003, "world_size": 3, "global_batch_size": 1_000, "micro_batch_size": None, "seed": 2}


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_ranks_of_a_large_table_have_the_samples_of_the_step(sampling):
    """Its rows are not listed: each rank works out its own, also across the short last batch of an epoch."""
    plan = BatchPlan(sampling=sampling, **LARGE)
    ranks = [batches(plan, rank, 99, 103) for rank in range(3)]
    for step, of_ranks in enumerate(zip(*ranks, strict=True), start=99):
        shards = [samples_of(batch) for batch in of_ranks]
        np.testing.assert_array_equal(np.concatenate(shards), plan.samples_of_step(step))
        assert len(set(plan.samples_of_step(step))) == sum(map(len, shards)) == plan.num_samples(step)
    assert plan.num_samples(100) == (3 if sampling == "shuffle" else 1_000)
    epoch = np.concatenate([plan.samples_of_step(step) for step in range(plan.steps_per_epoch)])
    assert (len(set(epoch)) == 100_003) == (sampling == "shuffle")


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_samples_of_a_large_table_are_as_good_as_random_ones(sampling):
    """Else the noise of the batches is not what theory predicts.

    The mean of B of n values drawn without replacement has the variance v/B · (n − B)/(n − 1), v that of all values
    (Cochran 1977). Its estimate from m batches has a relative standard error of about √(2/m): 4 of them are allowed.
    A permutation of n rows keeps 1 of them in place, and has 2 pairs of neighbours that were neighbours, on average;
    both are Poisson distributed.
    """
    n, size = 100_000, 50
    plan = BatchPlan(n, 1, size, None, sampling, 5)
    rows = np.array([plan.samples_of_step(step) for step in range(4_000)])  # two epochs
    values = np.arange(n) / n - 0.5  # sorted: what a weak shuffle would show
    means = values[rows].mean(axis=1)
    expected = values.var() / size * (n - size) / (n - 1)
    assert abs(means.var() / expected - 1) < 4 * np.sqrt(2 / 4_000)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 4 / np.sqrt(4_000)
    neighbours = np.abs(np.diff(rows, axis=1)) == 1
    assert neighbours.sum() < 4 + 4 * np.sqrt(4)
    if sampling == "shuffle":
        assert (rows.reshape(2, n) == np.arange(n)).sum() < 2 + 4 * np.sqrt(2)
