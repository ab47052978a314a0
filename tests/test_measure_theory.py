"""If this fails, the measurement of the theory reports that all is met when it is not."""

import importlib.util
import sys

import numpy as np
import pytest

from .conftest import ROOT


@pytest.mark.parametrize(
    ("met", "all_met"), [(True, True), (False, False), (np.True_, True), (np.False_, False), (None, True)]
)
def test_one_row_that_is_not_met_is_enough(met, all_met, capsys):
    spec = importlib.util.spec_from_file_location("measure_theory", ROOT / "scripts/measure_theory.py")
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "measure_theory", script)  # its dataclasses look themselves up
        spec.loader.exec_module(script)
    report = script.Report()
    report.row("before", met=True)
    report.row("this", met=met)
    report.row("after", met=True)
    assert report.all_met is all_met
    assert ("**NO**" in capsys.readouterr().out) == (not all_met)
