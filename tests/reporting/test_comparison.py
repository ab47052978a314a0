"""If these fail, an upgrade that made every step slower, or wrong, passes CI; or noise alone stops a good one."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from torchreg.cli import main
from torchreg.reporting.analysis import analyse, write_data
from torchreg.reporting.comparison import compare, judged
from torchreg.scaling.records import read_records

from ..scaling.statistics_script import measure_statistics as measured
from .synthetic import Campaign, Machine, set_check, write_launch

OLD = Campaign(num_features=(1,), combinations=(("sgd", "ddp"),), num_blocks=8, ranks_per_node=(1, 2))
NUM_POINTS = 2 + 2  # 256 rows, and 64 a rank, at 1 and at 2 ranks


def slower(factor, **changes):
    """The campaign again, another time, on a machine whose every part takes so many times as long."""
    machine = OLD.machine
    times = {field: getattr(machine, field) * factor for field in ("alpha_s", "beta_s_per_byte", "serial_s", "row_s")}
    return replace(OLD, machine=replace(machine, **times), seed=1, **changes)


def outcomes(old, new, **options):
    comparison = compare(Path(old), Path(new), **options)
    return [row["outcome"] for row in comparison["rows"]], comparison["is_regression"]


def as_report(folder):
    records = read_records([folder])
    return write_data(analyse(records), records, folder / "report")[0]


@pytest.mark.parametrize(
    ("factor", "outcome", "is_regression"),
    [(1.2, "regression", True), (1.0, "same", False), (0.8, "faster", False)],
)
def test_a_step_that_takes_longer_beyond_noise_and_threshold_is_a_regression(factor, outcome, is_regression, capsys):
    # Noise of 2 % over 8 launches each: the ratio is known to 2 to 3 %.
    OLD.write(Path("old"))
    slower(factor, num_blocks=12).write(Path("new"))
    found, is_shown = outcomes("old", "new")
    assert len(found) == NUM_POINTS
    assert is_shown is is_regression
    assert set(found) <= {outcome, "not clear", "not slower", "same"}
    assert outcome in found
    for row in compare(Path("old"), Path("new"))["rows"]:
        assert row["ratio"]["low"] < factor < row["ratio"]["high"]
    assert main(["report", "compare", "old", "new"]) == int(is_regression)
    out = capsys.readouterr().out
    assert out.count(outcome) >= 1
    assert ("no regression beyond 5 % is shown" in out) is not is_regression
    assert ("do not cover a machine that was slower for a whole campaign" in out) is is_regression
    assert "family       4 points: Welch's t of log times, corrected by Benjamini-Hochberg" in out
    num_found = found.count("regression")
    assert f"false alarms at most 5 % of the regressions ({0.05 * num_found:.2g} of {num_found}), and any in" in out


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (1.055, 1.2, "regression"),
        (1.04, 1.06, "not clear"),
        (0.90, 1.06, "not clear"),
        (0.96, 1.04, "same"),
        (0.90, 0.99, "not slower"),  # faster, and perhaps by less than anybody asked for
        (0.90, 0.95, "faster"),  # 1 / 1.05 = 0.952
    ],
)
def test_outcomes_go_by_both_ends_of_the_interval(low, high, outcome):
    # Six times of which the two smallest are equal, and the two largest, have these as the ends of the interval of
    # their median; an old side without noise leaves them the ends of the ratio.
    path = as_report(OLD.write(Path("campaign")))
    report = json.loads(path.read_text())

    def with_step_times(name, *times, first=0):
        for point in report["groups"][0]["points"][first:]:
            point["step_times_s"] = times
        Path(name).write_text(json.dumps(report))
        return Path(name)

    middle = (low + high) / 2
    old, new = with_step_times("old.json", *[1] * 6), with_step_times("new.json", low, high, middle, high, low, middle)
    rows = compare(old, new)["rows"]
    assert {row["outcome"] for row in rows} == {outcome}
    assert [row["ratio"][end] for row in rows for end in ("low", "high")] == pytest.approx([low, high] * NUM_POINTS)
    if outcome == "regression":
        # Logarithms: mean 0.1186, standard deviation 0.0576. Student's t with 5 degrees of freedom is
        # (0.1186 − log 1.05) / (0.0576 / √6) = 2.97, which p = 0.0156 corresponds to. Of four such points each stays a
        # regression; one alone has 4 · 0.0156 = 0.062.
        assert [row["p_slower"] for row in rows] == [pytest.approx(0.0156, abs=2e-4)] * 4
        rows = compare(old, with_step_times("one.json", *[1] * 6, first=1))["rows"]
        assert sorted(row["outcome"] for row in rows) == ["not clear", "same", "same", "same"]
        assert max(row["ratio"]["low"] for row in rows) == pytest.approx(low)


def of_times(logs):
    return np.exp(logs).tolist()


def test_p_values_are_welchs_corrected_for_the_family():
    # Logarithms of 0.01 · (±1, ±3, ±5): squares sum to 70, variance 14, and the difference of two such sides has the
    # standard error 0.01 · √(14/6 + 14/6), with 10 degrees of freedom. Tables of t give the one-sided probabilities
    # 0.01, 0.025, 0.05 and 0.5 at 2.764, 2.228, 1.812 and 0. The k-th smallest of 4 is multiplied by 4/k.
    logs = 0.01 * np.array([1.0, -1, 3, -3, 5, -5])
    shifts = [math.log(1.05) + 0.01 * math.sqrt(28 / 6) * t for t in (1.812, 2.764, 0, 2.228)]
    slow = judged([(of_times(logs + shift), of_times(logs)) for shift in shifts], threshold=0.05)
    assert [row["p_slower"] for row in slow] == pytest.approx([0.05 * 4 / 3, 0.04, 0.5, 0.05], abs=2e-4)
    assert min(row["p_faster"] for row in slow) > 0.5
    fast = judged([(of_times(logs), of_times(logs + shift)) for shift in shifts], threshold=0.05)
    assert [row["p_faster"] for row in fast] == pytest.approx([row["p_slower"] for row in slow])


def test_identical_campaigns_rarely_show_a_regression():
    noise = measured.Noise(0, 0, value=0.2)
    alone, corrected, _ = measured.alarms(0, noise, campaigns=100)
    assert corrected <= 0.05 < 0.1 < alone
    assert measured.alarms(0.2, noise, campaigns=20)[1] > 0.5


def test_one_slow_point_of_48_is_found_with_six_launches():
    generator = np.random.default_rng(0)
    new, old = 0.1 * generator.standard_normal((2, 48, 6))
    new[7] += math.log(2)
    rows = judged([(of_times(one), of_times(other)) for one, other in zip(new, old, strict=True)], threshold=0.05)
    assert [number for number, row in enumerate(rows) if row["outcome"] == "regression"] == [7]


def test_sides_without_noise_can_be_compared():
    quiet, slow = of_times(np.zeros(6)), of_times(np.full(6, 0.1))
    assert [row["p_slower"] for row in judged([(quiet, quiet), (slow, quiet)], threshold=0)] == [1, 0]


def test_the_threshold_is_the_users():
    OLD.write(Path("old"))
    slower(1.2).write(Path("new"))
    assert outcomes("old", "new", threshold=0.05)[1]
    assert outcomes("old", "new", threshold=0.5) == (["same"] * NUM_POINTS, False)
    with pytest.raises(ValueError, match=r"threshold is -0.1: give a fraction of at least 0"):
        compare(Path("old"), Path("new"), threshold=-0.1)


def test_noise_alone_is_no_regression():
    folders = [replace(OLD, seed=seed, num_blocks=6).write(Path(f"{seed}")) for seed in range(10, 22)]
    pairs = list(zip(folders[::2], folders[1::2], strict=True))
    assert not [pair for pair in pairs if outcomes(*pair)[1]]


def test_too_few_launches_are_reported_and_are_no_verdict(capsys):
    OLD.write(Path("old"))
    slower(3, num_blocks=5).write(Path("new"))
    assert outcomes("old", "new") == (["too few launches"] * NUM_POINTS, False)
    assert main(["report", "compare", "old", "new"]) == 0
    assert f"({NUM_POINTS} too few launches)" in capsys.readouterr().out


def test_a_wrong_result_is_a_regression_however_fast(capsys):
    OLD.write(Path("old"))
    for record in slower(0.5).records():
        if record["launch"]["id"] == "block-03-nodes-1-ranks-2":
            set_check(record["points"][0], "the weights are half")
        write_launch(Path("new"), record)
    for new in (Path("new"), as_report(Path("new"))):
        assert main(["report", "compare", "old", str(new)]) == 1
        out = capsys.readouterr().out
        assert "verdict      regression: of the new results 1 is wrong" in out
        assert "the weights are half" in out
    # The other way round the wrong results are the old ones, which are counted and excluded.
    assert "of the old results 1 were wrong, and are excluded" in compare(Path("new"), Path("old"))["notes"]


def test_wrong_results_are_reported_where_nothing_else_can_be_compared():
    OLD.write(Path("old"))
    for record in OLD.records():
        for point in record["points"]:
            point["check_passed"] = False
        write_launch(Path("new"), record)
    comparison = compare(Path("old"), Path("new"))
    assert comparison["rows"] == []
    assert len(comparison["wrong"]) == 8 * NUM_POINTS
    assert comparison["is_regression"]


def test_what_cannot_be_run_any_more_is_a_regression():
    OLD.write(Path("old"))
    for record in OLD.records():
        launch = record["launch"]
        write_launch(
            Path("new"), record if launch["world_size"] == 1 else OLD.failure(launch["block"], 1, 2, "no route to host")
        )
    found, is_regression = outcomes("old", "new")
    assert sorted(found) == ["no result any more"] * 2 + ["same"] * 2
    assert is_regression
    # What was not asked for any more is none.
    replace(OLD, ranks_per_node=(1,)).write(Path("less"))
    found, is_regression = outcomes("old", "less")
    assert (found, is_regression) == (["same"] * 2, False)
    assert "2 points are in the old campaign only" in compare(Path("old"), Path("less"))["notes"]


def test_versions_may_differ_and_are_reported_but_machines_may_not(capsys):
    OLD.write(Path("old"))
    replace(OLD, machine=Machine(torch="2.14.0")).write(Path("upgraded"))
    comparison = compare(Path("old"), Path("upgraded"))
    assert len(comparison["rows"]) == NUM_POINTS
    assert "torch was 2.13.0 and is 2.14.0" in comparison["notes"]
    changed = {"driver": "580", "kernel": "6.4", "libfabric": None}
    for name, facts in (("driver", changed | {"driver": "550"}), ("upgraded", changed)):
        replace(OLD, machine=Machine(facts=facts)).write(Path(name))
    for one, other in (("driver", "upgraded"), (as_report(Path("driver")), as_report(Path("upgraded")))):
        comparison = compare(Path(one), Path(other))
        assert len(comparison["rows"]) == NUM_POINTS
        assert "driver was 550 and is 580" in comparison["notes"]
    for number, change in enumerate(({"name": "x"}, {"device_name": "x"}, {"dtype": "float32"})):
        replace(OLD, machine=Machine(**change)).write(Path(f"other-{number}"))
        assert main(["report", "compare", "old", f"other-{number}"]) == 2
        assert f"nothing in old and other-{number} can be compared" in capsys.readouterr().err
    # One rank has no backend: with another one, those points can still be compared.
    replace(OLD, machine=Machine(backend="nccl")).write(Path("nccl"))
    assert [row["num_nodes"] * row["ranks_per_node"] for row in compare(Path("old"), Path("nccl"))["rows"]] == [
        1,
        1,
    ]


def test_a_report_of_before_the_facts_were_kept_can_be_compared():
    report = json.loads(as_report(OLD.write(Path("old"))).read_text())
    for group in report["groups"]:
        group["versions"] = {"torch": group["versions"]["torch"]}
    Path("before.json").write_text(json.dumps(report))
    assert len(compare(Path("before.json"), Path("old"))["rows"]) == NUM_POINTS


def test_points_of_several_versions_in_one_campaign_are_excluded_not_mixed():
    OLD.write(Path("old"))
    for seed, machine in enumerate((Machine(), Machine(torch="2.14.0"))):
        for record in replace(OLD, machine=machine, seed=seed, ranks_per_node=(1, 2)).records():
            if machine.torch == "2.13.0" or record["launch"]["world_size"] == 2:
                record["launch"]["block"] += 10 * seed
                record["launch"]["id"] = f"block-{record['launch']['block']}-ranks-{record['launch']['world_size']}"
                write_launch(Path("new"), record)
    comparison = compare(Path("old"), Path("new"))
    assert [row["sync"] for row in comparison["rows"]] == ["none", "none"]
    assert any("2 points were measured with several sets of versions" in note for note in comparison["notes"])


def test_a_report_is_compared_as_its_campaign_is(capsys):
    OLD.write(Path("old"))
    slower(1.5).write(Path("new"))
    exact = compare(Path("old"), Path("new"))
    assert {row["outcome"] for row in exact["rows"]} == {"regression"}
    assert compare(as_report(Path("old")), as_report(Path("new"))) == exact
    assert main(["report", "compare", "old", "new/report/report.json", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert (content["kind"], content["is_regression"], len(content["rows"])) == ("scaling-comparison", True, NUM_POINTS)
    assert content["rows"][0]["ratio"]["low"] > 1.05


def test_what_is_no_report_or_campaign_is_one_clear_line(capsys):
    OLD.write(Path("old"))
    report = json.loads(as_report(Path("old")).read_text())
    point = report["groups"][0]["points"][0]
    broken = {
        "empty": "",
        "list": "[]",
        "other": '{"kind": "train", "schema_version": 1}',
        "cut": json.dumps(report)[:1000],
        "negative": json.dumps(report).replace(json.dumps(point["step_times_s"][0]), "-1"),
        "text": json.dumps(report).replace(json.dumps(point["step_times_s"][0]), '"fast"'),
        "nothing": json.dumps(report).replace(json.dumps(point["step_times_s"]), "[]"),
        "no groups": json.dumps({**report, "groups": 3}),
        "deep": "[" * 100_000,
    }
    for name, content in broken.items():
        Path(f"{name}.json").write_text(content)
        assert main(["report", "compare", "old", f"{name}.json"]) == 2, name
        err = capsys.readouterr().err
        assert len(err.strip().splitlines()) == 1, err
        assert f"{name}.json is no report.json that this torchreg can read" in err
    assert main(["report", "compare", "old", "nowhere"]) == 2
    assert "nowhere is no directory" in capsys.readouterr().err
    assert main(["report", "compare", "old"]) == 2
    assert "new" in capsys.readouterr().err.lower()
