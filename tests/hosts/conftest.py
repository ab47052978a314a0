"""Make-believe nodes, where this machine can have them."""

import pytest

from ..fault_matrix import matrix


@pytest.fixture
def nodes():
    made = matrix.Nodes()
    if reason := made.missing():
        pytest.skip(f"two nodes cannot be made of this machine: {reason}")
    with made.up(2):
        yield made
