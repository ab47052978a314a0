"""Make-believe nodes, where this machine can have them."""

import pytest

from ..fault_matrix import matrix


@pytest.fixture
def nodes():
    made = matrix.Nodes()
    if reason := made.missing():
        pytest.skip(f"a broken link needs two nodes, which this machine cannot simulate: {reason}")
    assert not made.are_up(), "simulated nodes of another process, or of a killed one: `hosts down` removes them"
    with made.up(2):
        yield made
