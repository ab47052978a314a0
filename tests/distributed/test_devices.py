"""If these fail, ranks on CPUs leave some of them idle, or crowd each other."""

import os

import pytest

from torchreg.distributed.devices import own_cpus, threads_for

ALL = 0xFFFF  # sixteen CPUs


@pytest.mark.parametrize(
    ("own", "of_node", "threads"),
    [
        (ALL, [ALL] * 4, 4),  # nobody is bound: 16 for 4
        (0x000F, [0x000F, 0x00F0, 0x0F00, 0xF000], 4),  # each has four for itself
        (0x00FF, [0x00FF, 0x00FF, 0xFF00, 0xFF00], 4),  # two sockets, two ranks on each
        (0b01, [0b01, 0b10, 0b01, 0b10], 1),  # four ranks on two CPUs
        (ALL, [ALL], 16),
    ],
)
def test_ranks_share_only_the_cpus_that_they_have_in_common(own, of_node, threads):
    assert threads_for(own, of_node) == threads


def test_a_bound_process_knows_its_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3}, raising=False)
    assert own_cpus() == 0b1001


def test_where_a_system_binds_nobody_all_cpus_are_everybodys(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on a Mac
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert own_cpus() == 0b111
