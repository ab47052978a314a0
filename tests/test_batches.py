"""If the batch contract breaks, results depend on the number of ranks, and no scaling experiment means anything."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchreg.core.batches import BatchPlan

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
    )


def rows_by_step(plan, rank, start, stop):
    """What one rank is given in each step, from its blocks."""
    steps = {}
    for block in plan.blocks(rank, start, stop):
        everything = np.arange(plan.num_rows)[block.rows]
        place = 0
        for number, sizes in enumerate(block.micro_batch_sizes):
            if isinstance(block.rows, slice):
                place = 0
            steps[block.first_step + number] = everything[place : place + sum(sizes)]
            place += sum(sizes)
            assert len(sizes) >= 1
            assert all(size <= (plan.micro_batch_size or plan.num_rows) for size in sizes)
    return steps


@given(plan=plans(), start=st.integers(0, 150), count=st.integers(1, 40))
def test_ranks_together_have_exactly_the_rows_of_the_step(plan, start, count):
    ranks = [rows_by_step(plan, rank, start, start + count) for rank in range(plan.world_size)]
    for step in range(start, start + count):
        shards = [rows[step] for rows in ranks]
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
        np.testing.assert_array_equal(np.concatenate(shards), plan.samples_of_step(step))


@given(plan=plans(), start=st.integers(0, 150), count=st.integers(1, 40))
def test_step_rows_counts_the_rows_over_all_ranks(plan, start, count):
    for block in plan.blocks(0, start, start + count):
        for number, num_samples in enumerate(block.num_samples):
            assert num_samples == len(plan.samples_of_step(block.first_step + number))


@given(plan=plans(), world_size=st.integers(1, 9), step=st.integers(0, 300))
def test_rows_of_a_step_do_not_depend_on_the_world_size(plan, world_size, step):
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


def test_shares_of_551_rows_on_4_ranks():
    # 551 = 4 · 137 + 3: three ranks have 138 rows, the last 137.
    plan = BatchPlan.derive(551, 4, sampling="full")
    shards = [plan.shard(551, rank) for rank in range(4)]
    assert [shard.stop - shard.start for shard in shards] == [138, 138, 138, 137]
    assert plan.local_batch_size == 138


def test_a_share_may_be_empty_and_still_takes_part():
    plan = BatchPlan.derive(10, 4, global_batch_size=3)
    (block,) = plan.blocks(3, 0, 1)
    assert block.micro_batch_sizes == [[0]]
    assert block.num_samples == [3]


def test_weak_scaling_derives_the_global_batch():
    plan = BatchPlan.derive(551, 4, local_batch_size=64, micro_batch_size=24)
    # 64 rows in pieces of 24: 24 + 24 + 16, so three forwards make a step.
    assert (plan.global_batch_size, plan.accumulation_steps) == (256, 3)
    assert BatchPlan.derive(551, 2).global_batch_size == 128


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"global_batch_size": 600}, ["600", "551", "global_batch_size"]),
        ({"local_batch_size": 64}, ["64 rows a rank × 9 ranks", "576", "551"]),
        ({"global_batch_size": 64, "local_batch_size": 64}, ["one of them"]),
    ],
)
def test_sizes_that_cannot_fit_are_refused_with_all_numbers(sizes, parts):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is checked below
        BatchPlan.derive(551, 9, **sizes)
    assert all(part in str(refused.value) for part in parts)
