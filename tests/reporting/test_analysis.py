"""If these fail, a reader takes a wrong number, or one without its doubts, into a proposal for node-hours."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from torchreg.cli import main
from torchreg.reporting.analysis import analyse, write_data
from torchreg.reporting.pages import summary_lines
from torchreg.reporting.verdict import bottleneck, scaling_limit
from torchreg.scaling.records import read_records
from torchreg.scaling.sources import merge

from .synthetic import Campaign, Machine, report_of, set_check, without_noise, write_launch

FACTS = ("driver", "cuda", "rocm", "oneccl", "libfabric", "fabric", "kernel", "tf32")
VISIBLE = (
    "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "CPU_BIND",
    "FI_PROVIDER", "UCX_TLS", "NCCL_IB_DISABLE", "GLOO_SOCKET_IFNAME", "CCL_ATL_TRANSPORT",
)  # fmt: skip

# A step of B samples on p ranks: 100 µs, 2.5 µs for each sample of a rank, 100 µs for each doubling of ranks.
#   strong, 160 samples  p = 1: 100 + 400 = 500    p = 2: 100 + 200 + 100 = 400    p = 4: 100 + 100 + 200 = 400
#   weak, 40 samples    p = 1: 100 + 100 = 200    p = 2: 100 + 100 + 100 = 300    p = 4: 100 + 100 + 200 = 400
EXACT = without_noise(Machine(alpha_s=100e-6, beta_s_per_byte=1e-15, serial_s=100e-6, row_s=2.5e-6, rows_s=10e-6))
ARITHMETIC = Campaign(
    EXACT, combinations=(("sgd", "ddp"),), num_features=(1,), global_batch_sizes=(160,), local_batch_sizes=(40,)
)
NOISY = Campaign(num_features=(1,), combinations=(("sgd", "ddp"),), num_blocks=8)


def series_of(report, kind, scope="within a node", group=0):
    return [one for one in report["groups"][group]["series"] if (one["kind"], one["scope"]) == (kind, scope)]


def values(series, field):
    return [point[field] and point[field]["value"] for point in series["points"]]


def test_speedup_efficiency_and_karp_flatt():
    report = report_of(ARITHMETIC)
    (strong,), (weak,) = series_of(report, "strong"), series_of(report, "weak")
    assert values(strong, "step_time_s") == pytest.approx([500e-6, 400e-6, 400e-6])
    # S = T(p0)/T(p): 500/400 twice. Efficiency S·p0/p: 1.25/2 and 1.25/4.
    assert values(strong, "speedup") == pytest.approx([1, 1.25, 1.25])
    assert values(strong, "efficiency") == pytest.approx([1, 0.625, 0.3125])
    # e = (1/S − 1/p)/(1 − 1/p): (0.8 − 0.5)/0.5 and (0.8 − 0.25)/0.75.
    assert values(strong, "karp_flatt") == [None, pytest.approx(0.6), pytest.approx(0.55 / 0.75)]
    assert values(strong, "throughput") == pytest.approx([160 / 500e-6, 160 / 400e-6, 160 / 400e-6])
    # T(p0)/T(p): 200/300 and 200/400; times p for the scaled speed-up.
    assert values(weak, "efficiency") == pytest.approx([1, 2 / 3, 0.5])
    assert values(weak, "speedup") == pytest.approx([1, 4 / 3, 2])
    assert values(weak, "karp_flatt") == [None, None, None]
    assert (strong["baseline_world_size"], strong["global_batch_size"], strong["local_batch_size"]) == (1, 160, None)
    assert (weak["baseline_world_size"], weak["global_batch_size"], weak["local_batch_size"]) == (1, None, 40)
    # The point of 160 samples on 4 ranks is in both, once among the points.
    assert strong["points"][2]["point"] == weak["points"][2]["point"]
    assert len(report["groups"][0]["points"]) == 2 + 2 + 1


def test_without_one_rank_the_baseline_is_the_smallest_world_size():
    strong, *_ = series_of(report_of(replace(ARITHMETIC, ranks_per_node=(2, 4))), "strong")
    assert strong["baseline_world_size"] == 2
    # 400 µs both: no faster on twice the ranks.
    assert values(strong, "efficiency") == pytest.approx([1, 0.5])
    assert values(strong, "karp_flatt") == [None, pytest.approx(1.0)]


def test_the_breakdown_sums_to_the_step_and_names_the_bottleneck():
    report = report_of(ARITHMETIC)
    points = {point["id"]: point for point in report["groups"][0]["points"]}
    (strong,) = series_of(report, "strong")
    last = points[strong["points"][-1]["point"]]
    parts = [last[field]["value"] for field in ("data_time_s", "compute_time_s", "exposed_time_s")]
    assert parts == pytest.approx([10e-6, 190e-6, 200e-6])
    assert sum(parts) == pytest.approx(last["step_time_s"]["value"])
    assert last["imbalance_time_s"]["value"] == pytest.approx(4e-6)  # the synthetic median rank takes 99 %
    assert last["slowest_over_median"]["value"] == pytest.approx(1 / 0.99)
    one = points[strong["points"][0]["point"]]
    assert one["exposed_time_s"] is None
    assert one["compute_time_s"]["value"] == pytest.approx(490e-6)
    # 400 − 500/4 = 275 µs are lost: 200 to exposed communication, 75 to the 100 µs of each step that do not shrink.
    bound = strong["bottleneck"]
    assert bound["cause"] == "communication"
    assert (bound["lost_s"], bound["exposed_s"], bound["compute_s"]) == pytest.approx((275e-6, 200e-6, 75e-6))


@pytest.mark.parametrize(
    ("changes", "batches", "kind", "cause", "sentence"),
    [
        # Strong: 400 + 2.5 · 160 = 800 µs on one rank, so ideally 200 on four; 400 + 100 + 2 · 10 = 520 µs are taken.
        ({"serial_s": 400e-6, "alpha_s": 10e-6}, {}, "strong", "compute",
         "compute that does not shrink, 300 µs of the 320 µs that a step takes beyond ideal scaling"),
        ({"serial_s": 0.0, "alpha_s": 1e-6, "rows_s": 1e-6}, {}, "strong", "none", "nothing"),
        # Weak: two rounds of 1 ms each come to the same step.
        ({"alpha_s": 1e-3}, {"global_batch_sizes": ()}, "weak", "communication",
         "exposed communication, 2 ms of the 2 ms that a step takes beyond ideal scaling"),
    ],
)  # fmt: skip
def test_the_bottleneck_follows_the_machine(changes, batches, kind, cause, sentence):
    report = report_of(replace(ARITHMETIC, machine=replace(EXACT, **changes), **batches))
    (series,) = series_of(report, kind)
    assert series["bottleneck"]["cause"] == cause
    assert f"What limits {kind} scaling at 4 ranks: {sentence}." in summary_lines(report)


def test_waiting_for_a_slow_rank_is_imbalance():
    def slow_rank(record):
        for point in record["points"]:
            if record["launch"]["world_size"] == 4:
                point["rank_min_s"] = point["rank_median_s"] = point["rank_max_s"] * 0.6
        return record

    report = report_of(ARITHMETIC, change=slow_rank)
    assert {one["bottleneck"]["cause"] for one in report["groups"][0]["series"]} == {"imbalance"}


def test_fits_find_the_parameters_of_the_synthetic_machine():
    machine = Machine(alpha_s=80e-6, beta_s_per_byte=2e-9, serial_s=200e-6, row_s=10e-6, launch_noise=0.01)
    report = report_of(replace(NOISY, machine=machine, ranks_per_node=(1, 2, 4, 8), num_features=(1, 64), seed=3))
    (allreduce,) = [one for one in report["groups"][0]["allreduce"] if one["world_size"] == 2]
    assert allreduce["backend"] == "gloo"
    assert [size["message_bytes"] for size in allreduce["sizes"]] == [8, 1024, 65_536, 1_048_576]
    large = allreduce["sizes"][-1]
    assert large["bandwidth"] == pytest.approx(large["message_bytes"] / large["time_s"]["value"])
    alpha, beta = allreduce["fit"]["parameters"]
    assert alpha["low"] < 80e-6 < alpha["high"]
    assert beta["low"] < 2e-9 < beta["high"]
    strong = series_of(report, "strong")[0]
    assert [model["model"] for model in strong["models"]] == ["Amdahl", "USL", "mechanistic"]
    assert [model["model"] for model in series_of(report, "weak")[0]["models"]] == ["USL", "mechanistic"]
    mechanistic = strong["models"][-1]
    assert mechanistic["identifiable"], mechanistic["why"]
    assert mechanistic["held_out_error"] < 0.1
    truth = {"c₀": 200e-6, "c₁": 10e-6, "τ": 80e-6 + 16 * 2e-9}
    for parameter in mechanistic["parameters"]:
        assert parameter["low"] < truth[parameter["symbol"]] < parameter["high"], parameter
    # Beyond 8 ranks nothing was measured; beyond 64 the curve ends, at 8 times that.
    assert [point["extrapolated"] for point in mechanistic["curve"]] == [
        point["world_size"] > 8 for point in mechanistic["curve"]
    ]
    assert mechanistic["curve"][-1]["world_size"] == 64
    assert {1, 2, 4, 8} <= {point["world_size"] for point in mechanistic["curve"]}


def test_what_the_points_do_not_determine_has_no_curve():
    for model in series_of(report_of(replace(NOISY, ranks_per_node=(1, 2))), "strong")[0]["models"]:
        if not model["identifiable"]:
            assert model["why"]
            assert model["curve"] == []
    assert not all(model["identifiable"] for model in series_of(report_of(NOISY), "strong")[0]["models"])


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"device_name": "Other CPU"},
        {"backend": "nccl"},
        {"dtype": "float32"},
        {"torch": "2.4.0"},
        {"facts": {"driver": "580"}},
    ],
)
def test_launches_that_are_not_comparable_are_never_mixed(change):
    slow = replace(NOISY, machine=replace(Machine(**change), row_s=1e-3), campaign="slow")
    report = report_of(NOISY, slow)
    assert len(report["groups"]) == 2
    alone = [analyse(read_records([Path(f"campaign-{number}")]))["groups"][0] for number in (0, 1)]
    for group in report["groups"]:
        twin = next(
            one
            for one in alone
            if all(one[key] == group[key] for key in ("machine", "device_name", "backend", "dtype", "versions"))
        )
        found = [point["step_time_s"] for point in group["points"] if point["world_size"] > 1]
        assert found == [point["step_time_s"] for point in twin["points"] if point["world_size"] > 1]
    title = report["groups"][0]["title"]
    assert f"these numbers are of {title}, the largest of 2 groups that are not comparable" in summary_lines(report)[-1]


def test_everything_that_affects_step_times_keeps_launches_apart():
    machines = [
        *(Machine(facts={fact: "other"}) for fact in FACTS),
        *(Machine(environment={name: "3,2,1,0"}) for name in VISIBLE),
    ]
    small = replace(NOISY, num_blocks=1, ranks_per_node=(2,))
    report = report_of(small, *(replace(small, machine=machine, campaign=str(machine)) for machine in machines))
    assert [group["num_launches"] for group in report["groups"]] == [1] * (1 + len(machines))


def test_launches_on_several_kinds_of_device_or_with_other_variables_are_a_group_of_their_own():
    def change(record):
        block = record["launch"]["block"]
        if block == 0:
            record["distributed"]["placements"][-1]["device_name"] = "another device"
        if block in (1, 2):
            record["campaign"]["without"] = ["NCCL_NET", "NCCL_CROSS_NIC"][:block]
        return record

    report = report_of(NOISY, change=change)
    # Of block 0 the launches of 2 and 4 ranks have both kinds of device, and that of 1 rank has the other one only.
    assert [group["num_launches"] for group in report["groups"]] == [15, 3, 3, 2, 1]
    assert report["groups"][1]["versions"]["without"] in ("NCCL_NET", "NCCL_CROSS_NIC NCCL_NET")
    assert "another device" in {group["device_name"] for group in report["groups"]}


def test_older_records_and_unknown_facts_are_read():
    # A site without libfabric, and a torchreg that did not look.
    empty, few = (replace(NOISY, machine=Machine(facts=facts), campaign="new") for facts in ({}, {"libfabric": None}))
    assert len(report_of(NOISY, empty, few)["groups"]) == 1
    differs = report_of(NOISY, replace(NOISY, machine=Machine(facts={"driver": "580"})))["provenance"]["differs"]
    values = [{"value": "580", "launches": 24}, {"value": None, "launches": 24}]
    assert {"field": "machine_facts.driver", "values": values} in differs


def test_one_rank_belongs_to_every_backend_that_it_could_have_had():
    report = report_of(NOISY, replace(NOISY, machine=Machine(backend="nccl"), campaign="other", ranks_per_node=(2, 4)))
    assert [group["backend"] for group in report["groups"]] == ["gloo", "nccl"]
    assert [series_of(report, "strong", group=number)[0]["baseline_world_size"] for number in (0, 1)] == [1, 1]


def test_steps_across_nodes_are_another_series_than_those_within_one():
    report = report_of(replace(NOISY, nodes=(1, 2), ranks_per_node=(1, 2)))
    found = {
        (one["kind"], one["scope"]): [(p["num_nodes"], p["world_size"]) for p in one["points"]]
        for one in report["groups"][0]["series"]
    }
    within, one_each, two_each = [(1, 1), (1, 2)], [(1, 1), (2, 2)], [(1, 2), (2, 4)]
    assert found == {
        (kind, scope): points
        for kind in ("strong", "weak")
        for scope, points in (
            ("within a node", within),
            ("across nodes, 1 rank a node", one_each),
            ("across nodes, 2 ranks a node", two_each),
        )
    }
    # The largest world size decides what the first screen is about.
    assert report["verdict"]["headline"]["strong"]["series"].startswith("g1-strong-across-nodes-2-ranks-a-node-")
    assert summary_lines(report)[1].startswith("Strong scaling to 4 ranks: efficiency ")


def test_series_that_form_by_coincidence_are_excluded():
    report = report_of(replace(NOISY, ranks_per_node=(1, 2, 4, 8), global_batch_sizes=(256, 512), local_batch_sizes=()))
    # Local batches of 256, 128 and 64 meet twice each, and every point is in a strong series.
    assert [one["kind"] for one in report["groups"][0]["series"]] == ["strong", "strong"]
    report = report_of(replace(NOISY, ranks_per_node=(2, 4), global_batch_sizes=(256,), local_batch_sizes=(64,)))
    assert [one["kind"] for one in report["groups"][0]["series"]] == ["strong", "weak"]


# The verdict


def efficiency(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "num_launches": 7}


def series_with(*efficiencies):
    points = [{"world_size": 1, "num_nodes": 1, "efficiency": efficiency(1, 1, 1)}]
    points += [
        {"world_size": 2**place, "num_nodes": 1, "efficiency": efficiency(*one)}
        for place, one in enumerate(efficiencies, 1)
    ]
    setting = {"optimizer": "sgd", "sync": "ddp", "num_features": 1, "global_batch_size": 256, "baseline_world_size": 1}
    return {"id": "s", "kind": "strong", "scope": "within a node", **setting, "points": points}


LIMITS = {
    "shown": ([(0.95, 0.9, 0.99), (0.7, 0.6, 0.75)], (2, 2, 2), "≥ 80 % up to 2 ranks"),
    "to the end": (
        [(0.95, 0.9, 0.99), (0.9, 0.85, 0.95)],
        (4, 4, 4),
        "≥ 80 % up to 4 ranks",
    ),
    "about": (
        [(0.95, 0.9, 0.99), (0.82, 0.78, 0.86), (0.5, 0.4, 0.6)],
        (4, 2, 4),
        "≥ 80 % up to 2 ranks, about 80 % up to 4 ranks (the interval includes 80 %)",
    ),
    "about, from below": (
        [(0.79, 0.77, 0.81), (0.5, 0.4, 0.6)],
        (1, 1, 2),
        "about 80 % at 2 ranks (the interval includes 80 %)",
    ),
    "not at all": ([(0.6, 0.5, 0.7), (0.3, 0.2, 0.4)], (1, 1, 1), "below 80 % from 2 ranks"),
    "a dip counts": ([(0.7, 0.6, 0.75), (0.9, 0.85, 0.95)], (1, 1, 1), "below 80 % from 2 ranks"),
    "too few launches": (
        [(0.9,), (0.7,)],
        (2, None, None),
        "80 % up to 2 ranks (medians)",
    ),
    "too few and bad": (
        [(0.6,)],
        (1, None, None),
        "below 80 % from 2 ranks (medians)",
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_the_scaling_limit_states_its_uncertainty(case):
    efficiencies, sizes, sentence = LIMITS[case]
    series = series_with(*efficiencies)
    limit = scaling_limit(series, 0.8)
    assert (limit["largest_efficient_world_size"], limit["shown_up_to"], limit["about_up_to"]) == sizes
    report = report_of(replace(NOISY, num_blocks=1, ranks_per_node=(1, 2), local_batch_sizes=()))
    report["groups"][0]["series"] = [{**series, "limit": limit, "bottleneck": None}]
    report["verdict"]["headline"] = {
        "group": "g1",
        "strong": {"series": "s", "num_settings": 1},
        "weak": None,
        "best": None,
    }
    line = summary_lines(report)[1]
    assert line.startswith(f"Strong scaling to {2 ** len(efficiencies)} ranks: efficiency ")
    assert line.endswith(f" (sgd/ddp, 1 feature, global batch 256); {sentence}.")


def test_the_efficiency_that_counts_as_good_is_the_users():
    # Strong scaling of ARITHMETIC has 62.5 % at 2 ranks and 31.25 % at 4.
    campaign = ARITHMETIC.write(Path("campaign"))
    for min_efficiency, reached, sentence in (
        (0.8, 1, "below 80 % from 2 ranks"),
        (0.6, 2, "≥ 60 % up to 2 ranks"),
    ):
        report = analyse(read_records([campaign]), min_efficiency)
        (strong,) = series_of(report, "strong")
        assert strong["limit"]["largest_efficient_world_size"] == reached
        assert strong["bottleneck"]["cause"] == "communication"
        assert f"; {sentence}." in summary_lines(report)[1]
    (strong,) = series_of(analyse(read_records([campaign]), 0.3), "strong")
    assert (strong["limit"]["largest_efficient_world_size"], strong["bottleneck"]["cause"]) == (4, "none")


def test_hosts_that_are_slow_more_often_than_chance_are_named():
    def on_hosts(slow):
        def change(record):
            block, placements = record["launch"]["block"], record["distributed"]["placements"]
            for place in placements:  # of three hosts each launch of two nodes has two
                place["host"] = f"host-{(block + int(place['host'][1:])) % 3}"
            hosts = sorted({place["host"] for place in placements})
            for point in record["points"]:
                point["slowest_host"] = slow if slow in hosts else hosts[block % len(hosts)]
                point["rank_median_s"] = point["rank_min_s"] = 0.8 * point["rank_max_s"]
            return record

        return change

    two_nodes = replace(NOISY, nodes=(2,), ranks_per_node=(1,), num_blocks=12)
    # host-1 is in 8 of the 12 launches. That it is the slowest of two in all 8 by chance has a probability of 2⁻⁸.
    report = report_of(two_nodes, change=on_hosts("host-1"))
    (found,) = report["verdict"]["slow_hosts"]
    assert found == {
        "machine": "laptop", "host": "host-1", "num_launches": 8, "num_slowest": 8,
        "slowdown": pytest.approx(0.25), "p_value": pytest.approx(3 / 256),
    }  # fmt: skip
    caution = "host host-1 had the slowest rank in 8 of its 8 launches, by 25 % over the median rank"
    assert caution in summary_lines(report)[-1]
    assert report_of(two_nodes, change=on_hosts("nobody"))["verdict"]["slow_hosts"] == []
    # Six launches, of which host-1 is in four: 3 · 2⁻⁴ is no proof.
    assert report_of(replace(two_nodes, num_blocks=6), change=on_hosts("host-1"))["verdict"]["slow_hosts"] == []


def test_karp_flatt_is_given_only_where_it_is_a_fraction():
    # Faster than ideal: 100 + 1600 µs on one rank, (100 + 800 − 200) on two would be a negative fraction.
    def superlinear(record):
        for point in record["points"]:
            if record["launch"]["world_size"] == 2:
                point["step_time_s"] /= 4
                point["throughput"] *= 4
        return record

    (strong,) = series_of(report_of(ARITHMETIC, change=superlinear), "strong")
    assert values(strong, "karp_flatt") == [None, None, pytest.approx(0.55 / 0.75)]
    few = report_of(replace(ARITHMETIC, num_blocks=5))
    assert values(series_of(few, "strong")[0], "karp_flatt") == [None, None, None]


def test_a_failed_check_of_verify_is_a_wrong_stack():
    def verified(status):
        def change(record):
            if record["launch"]["id"] == "block-00-nodes-1-ranks-4":
                checks = [("collectives", "sum", "PASS"), ("training", "sgd/ddp", status)]
                names = ("area", "name", "status")
                record["verification"] = [dict(zip(names, check, strict=True)) for check in checks]
            return record

        return report_of(replace(NOISY, num_blocks=1), change=change)

    assert summary_lines(verified("PASS"))[0] == (
        "Trains correctly. All 5 runs in 3 launches end at the closed-form solution; "
        "2 checks of torchreg verify passed."
    )
    wrong = verified("FAIL")
    assert wrong["verdict"]["correct"]["status"] == "no"
    assert summary_lines(wrong)[0] == (
        "Does not train correctly. All 5 runs in 3 launches end at the closed-form solution; "
        "of 2 checks of torchreg verify 1 failed, first training: sgd/ddp."
    )


def test_a_step_without_breakdown_has_no_bottleneck():
    series = series_with((0.5, 0.4, 0.6))
    for point in series["points"]:
        point["point"] = point["world_size"]
    point = {"world_size": 1, "step_time_s": efficiency(1.0), "exposed_time_s": None, "compute_time_s": None}
    assert bottleneck(series, {1: point, 2: {**point, "world_size": 2}}, 0.8) is None


def test_a_fast_wrong_run_is_in_no_statistics_and_in_the_first_line():
    def too_fast(record):
        if record["launch"]["block"] < 3 and record["launch"]["world_size"] == 4:
            point = record["points"][0]
            point["step_time_s"] /= 1000
            point["throughput"] *= 1000
            set_check(point, "the weights are half")
        return record

    right, wrong = report_of(NOISY), report_of(NOISY, change=too_fast)
    (before,), (after,) = series_of(right, "strong"), series_of(wrong, "strong")
    assert before["points"][2]["efficiency"]["num_launches"] == 8
    assert after["points"][2]["efficiency"]["num_launches"] == 5
    assert after["points"][2]["efficiency"]["value"] == pytest.approx(
        before["points"][2]["efficiency"]["value"], rel=0.1
    )
    assert right["verdict"]["correct"]["status"] == "yes"
    assert summary_lines(right)[0] == "Trains correctly. All 40 runs in 24 launches end at the closed-form solution."
    assert wrong["verdict"]["correct"]["status"] == "no"
    assert summary_lines(wrong)[0] == (
        "Does not train correctly. 3 of 40 runs in 24 launches miss the closed-form solution, the first in "
        "block-00-nodes-1-ranks-4 (sgd/ddp, 1 feature, 4 ranks), and are in no statistics."
    )
    assert [one["is_wrong_result"] for one in wrong["excluded"]] == [True] * 3
    assert "wrong result: the weights are half (difference 0.5, allowed 1e-09)" in wrong["excluded"][0]["reason"]


def test_where_nothing_ran_nothing_is_claimed():
    report = report_of(NOISY, change=lambda record: NOISY.failure(record["launch"]["block"], 1, 2, "died"))
    assert report["verdict"]["correct"]["status"] == "unknown"
    assert report["groups"] == []
    assert len(report["failed"]) == 8
    assert report["verdict"]["headline"] is None
    assert summary_lines(report) == ["Correctness unknown. No run was checked (8 launches failed: see below)."]
    json.dumps(report, allow_nan=False)


def test_fewer_than_six_launches_have_no_interval():
    report = report_of(replace(NOISY, num_blocks=5))
    estimates = [point["step_time_s"] for point in report["groups"][0]["points"]]
    assert [(one["low"], one["high"], one["num_launches"]) for one in estimates] == [(None, None, 5)] * len(estimates)
    # It is reported once, and not in each cell of each table.
    assert (
        summary_lines(report)[-1] == "Caution: some points have only 5 launches, and 6 are needed for a 95 % interval."
    )


# Ranks that outnumber CPUs


def test_oversubscribed_cpus_are_reported_beside_the_scaling_that_they_affect():
    def with_cpus(record):
        record["distributed"]["num_cpus"] = 2
        return record

    expected = "4 ranks share the 2 CPUs of a node (oversubscribed)"
    assert expected in summary_lines(report_of(ARITHMETIC, change=with_cpus))[-1]
    # Unknown in records that are older than the field.
    assert not any("CPUs of a node" in line for line in summary_lines(report_of(ARITHMETIC)))


# Time to target


def test_time_to_target_is_predicted_steps_times_step_time():
    report = report_of(ARITHMETIC)
    ((table,),) = [one["targets"] for one in series_of(report, "strong")]
    # Synthetic: 400 steps of 256 samples, so 640 of 160.
    assert [row["predicted_steps"] for row in table["rows"]] == [640] * 3
    assert [row["predicted_time_s"]["value"] for row in table["rows"]] == pytest.approx([0.32, 0.256, 0.256])
    assert [row["measured_time_s"]["value"] for row in table["rows"]] == pytest.approx([0.32, 0.256, 0.256])
    assert [row["predicted_over_measured"]["value"] for row in table["rows"]] == pytest.approx([1, 1, 1])
    assert [row["node_hours"]["value"] for row in table["rows"]] == pytest.approx(
        [0.32 / 3600, 0.256 / 3600, 0.256 / 3600]
    )
    assert table["stable_up_to_world_size"] == 4
    error = report_of(ARITHMETIC, change=_ten_percent_longer)["groups"][0]["prediction_error"]
    assert (error["largest"], error["world_size"]) == (pytest.approx(1 - 1 / 1.1), 2)
    assert error["median"] == pytest.approx(0, abs=1e-12)
    ((weak,),) = [one["targets"] for one in series_of(report, "weak")]
    # 40, 80 and 160 samples: 2560, 1280 and 640 steps of 200, 300 and 400 µs.
    assert [row["time_s"]["value"] for row in weak["rows"]] == pytest.approx([0.512, 0.384, 0.256])
    assert [row["stability_limit"] for row in weak["rows"]] == pytest.approx([1024 / 40, 1024 / 80, 1024 / 160])


def _ten_percent_longer(record):
    for point in record["points"]:
        if record["launch"]["world_size"] == 2:
            point["measured_time_s"] *= 1.1
    return record


def test_the_fastest_may_need_more_node_hours_than_the_lowest():
    # Two nodes halve the time of a step at best, and each of them is paid for.
    machine = without_noise(Machine(alpha_s=100e-6, serial_s=100e-6))
    report = report_of(replace(ARITHMETIC, machine=machine, nodes=(1, 2), ranks_per_node=(1,)))
    best = report["verdict"]["headline"]["best"]
    fastest, lowest = best["fastest"], best["lowest_node_hours"]
    # 160 samples: 100 + 1600 µs on one, 100 + 800 + 100 on two; 640 steps.
    assert fastest["world_size"] == 2
    assert fastest["time_s"]["value"] == pytest.approx(640 * 1000e-6, rel=1e-4)
    assert lowest["world_size"] == 1
    assert lowest["node_hours"]["value"] < fastest["node_hours"]["value"]
    # 640 · 1700 µs on one node are 0.0003 node-hours.
    line = "Fastest to 1 % above the optimum: 2 ranks, 640 ms, measured; lowest node-hours: 1 rank, 0.0003 node-hours."
    assert line in summary_lines(report)


def test_a_target_that_is_never_reached_has_no_time():
    def unstable(record):
        for point in record["points"]:
            if record["launch"]["world_size"] == 4:
                nothing = dict.fromkeys(["predicted_steps", "measured_steps", "measured_time_s"])
                point |= {"stability_limit": 0.8, **nothing}
        return record

    report = report_of(NOISY, change=unstable)
    for table in (table for one in report["groups"][0]["series"] for table in one["targets"]):
        last = table["rows"][-1]
        assert (last["is_stable"], last["num_reached"]) == (False, 0)
        assert [last[key] for key in ("predicted_time_s", "measured_time_s", "time_s", "node_hours")] == [None] * 4
        assert table["stable_up_to_world_size"] == 2
    assert report["verdict"]["headline"]["best"]["fastest"]["world_size"] == 2


def test_launches_that_did_not_reach_a_target_count_as_the_longest():
    def not_always(record):
        for point in record["points"]:
            if record["launch"]["block"] < 3:
                point |= {"measured_steps": None, "measured_time_s": None}
        return record

    row = report_of(NOISY, change=not_always)["groups"][0]["series"][0]["targets"][0]["rows"][0]
    whole = report_of(replace(NOISY, seed=0))["groups"][0]["series"][0]["targets"][0]["rows"][0]
    assert row["num_reached"] == 5
    assert row["measured_time_s"]["high"] is None
    assert row["measured_time_s"]["value"] >= whole["measured_time_s"]["value"]


def test_predicted_times_stand_in_only_where_nothing_was_measured():
    def only_predicted(record):
        for point in record["points"]:
            point |= {"measured_steps": None, "measured_time_s": None}
        return record

    def half(record):
        return only_predicted(record) if record["launch"]["world_size"] == 4 else record

    fastest = report_of(NOISY, change=only_predicted)["verdict"]["headline"]["best"]["fastest"]
    assert fastest["time_from"] == "predicted"
    fastest = report_of(NOISY, change=half)["verdict"]["headline"]["best"]["fastest"]
    assert (fastest["time_from"], fastest["world_size"]) == ("measured", 2)


# Where it comes from


def test_provenance_shows_what_differs_and_how_often():
    def change(record):
        if record["launch"]["block"] == 0:
            record["provenance"]["libraries"] = {**record["provenance"]["libraries"], "torchreg": "0.0.9"}
        if record["launch"]["block"] < 2:
            record["provenance"]["environment"] = {"OMP_NUM_THREADS": "1", "RANK": "0", "MASTER_PORT": "1234"}
        else:
            record["provenance"]["environment"] = {}
        record["distributed"]["cpus_per_rank"] = 2 if record["launch"]["block"] == 3 else 1
        return record

    found = report_of(NOISY, change=change)["provenance"]
    threads = [{"value": "1", "launches": 6}, {"value": None, "launches": 18}]
    versions = [{"value": "0.0.9", "launches": 3}, {"value": "0.1.0", "launches": 21}]
    assert found["differs"] == [
        {
            "field": "distributed.cpus_per_rank",
            "values": [{"value": "1", "launches": 21}, {"value": "2", "launches": 3}],
        },
        {"field": "environment.OMP_NUM_THREADS", "values": threads},
        {"field": "libraries.torchreg", "values": versions},
    ]
    # One rank has no backend: that is no difference.
    assert found["same"]["distributed.backend"] == "gloo"
    assert found["same"]["distributed.mpi_library"] == "MPICH 4.3"
    assert not any("RANK" in field or "MASTER" in field for field in found["same"])


def test_the_same_records_give_the_same_bytes_and_a_merge_the_same_numbers():
    one = replace(NOISY, num_blocks=6).write(Path("one"))
    two = replace(NOISY, num_blocks=6, seed=1, machine=Machine(name="other")).write(Path("two"))

    def files(folders, out):
        records = read_records(folders)
        paths = write_data(analyse(records), records, Path(out))
        return {path.name: path.read_bytes() for path in paths}

    first, again = files([one, two], "first"), files([one, two], "first")
    assert first == again
    assert list(first) == [
        "report.json", "points.csv", "points.parquet", "allreduce.csv", "allreduce.parquet", "launches.csv"
    ]  # fmt: skip
    points = pd.read_csv("first/points.csv")
    pd.testing.assert_frame_equal(points, pd.read_parquet("first/points.parquet"), check_dtype=False)
    merge(Path("all"), [one, two])
    merged = json.loads(files([Path("all")], "all/report")["report.json"])
    apart = json.loads(first["report.json"])
    assert merged["groups"] == apart["groups"]
    assert merged["verdict"] == apart["verdict"]


def test_the_command_writes_pages_and_json(capsys):
    campaign = replace(NOISY, num_blocks=6, ranks_per_node=(1, 2), local_batch_sizes=()).write(Path("campaign"))
    assert main(["report", str(campaign)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "verdict      Trains correctly. All 12 runs in 12 launches end at the closed-form solution."
    assert "report       campaign/report/report.html" in out
    assert main(["report", str(campaign), "--json", "--out", "elsewhere"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(Path("elsewhere/report.json").read_text())
    assert report == json.loads(Path("campaign/report/report.json").read_text())
    assert Path("elsewhere/report.html").is_file()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "report got no directory"),
        (["a", "b"], "report got 2 directories: give the directory of their report with --out"),
        (["campaign", "--out", "file"], "out is file, which cannot be made"),
        (["campaign", "--ou"], "ou"),
        (["campaign", "--min-efficiency", "80"], "min_efficiency is 80.0: give a fraction above 0, to 1, such as 0.8"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(options, part, capsys):
    write_launch(Path("campaign"), next(iter(NOISY.records())))
    Path("file").touch()
    assert main(["report", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert part in err


def test_records_are_left_as_they_are():
    campaign = replace(NOISY, num_blocks=2).write(Path("campaign"))
    before = {path: path.read_bytes() for path in campaign.rglob("*") if path.is_file()}
    records = read_records([campaign])
    contents = copy.deepcopy([launch.content for launch in records.launches])
    analyse(records)
    assert [launch.content for launch in records.launches] == contents
    assert {path: path.read_bytes() for path in campaign.rglob("*") if path.is_file()} == before
