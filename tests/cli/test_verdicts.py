"""If these fail, a verdict is a sentence that nobody reads to its end."""

import re

import pytest

from torchreg.planning.plan import plan
from torchreg.reporting.pages import summary_lines
from torchreg.runs.config import TrainConfig
from torchreg.verification.checks import Check, verdict

from ..reporting.synthetic import Campaign, report_of, set_check

MOST_WORDS = 25


def check(text):
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        assert len(re.findall(r"[\w%]\S*", sentence)) <= MOST_WORDS, sentence


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"standardize": False, "base_learning_rate": (1e-7, 1e-1), "sampling": "random"},
        {"base_learning_rate": (9.0, 9.0)},
        {"standardize": False, "base_learning_rate": (9.0, 9.0), "sampling": "full"},
        {"standardize": False, "base_learning_rate": (9.0, 9.0), "lr_scaling": "none"},
        {"global_batch_size": 64},
        {"num_features": 17, "num_rows": 300},
        {"optimizer": "manual", "update_order": "sequential"},
    ],
)
def test_of_a_plan_and_of_its_forecasts(options):
    planned = plan(TrainConfig.of(**options), [1, 2, 4])
    check(planned.verdict)
    for row in planned.rows:
        check(row.forecast.message())


@pytest.mark.parametrize("num_failed", [0, 1, 4, 30])
def test_of_a_verification(num_failed):
    checks = [Check("bit for bit", "manual × allreduce", "FAIL", "", "")] * num_failed
    check(verdict([*checks, Check("files", "free space", "PASS", "", "")]))


@pytest.mark.parametrize("blocks", [2, 6])
@pytest.mark.parametrize("is_wrong", [False, True])
def test_of_a_report(blocks, is_wrong):
    def change(record):
        record["distributed"]["num_cpus"] = 2
        if is_wrong:
            set_check(record["points"][0], "the weights are half")
        return record

    pairs = (("sgd", "ddp"), ("manual", "allreduce"))
    report = report_of(
        Campaign(num_features=(1, 64), combinations=pairs, num_blocks=blocks, nodes=(1, 2)), change=change
    )
    assert len(summary_lines(report)) > 4
    for line in summary_lines(report):
        check(line)
