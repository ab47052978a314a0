"""Whether a campaign has become slower: new over old, point by point, as ratios of step times over launches."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TypeAlias

import numpy as np
from scipy.stats import false_discovery_control, ttest_ind_from_stats

from torchreg.console import percent
from torchreg.reporting.analysis import KIND, SCHEMA_VERSION, analyse
from torchreg.reporting.groups import VERSIONS, Json
from torchreg.scaling.records import read_records
from torchreg.scaling.statistics import Estimate, ratio_interval

_WHERE = ("machine", "device_name", "backend", "dtype", "distributed")
_POINT = ("num_nodes", "ranks_per_node", "optimizer", "sync", "num_features", "global_batch_size")
_LAUNCH = ("machine", "num_nodes", "ranks_per_node")
_METHOD = "Welch's t of log times, corrected by Benjamini-Hochberg, slower and faster each by itself"
_LEVEL = 0.05  # the expected fraction of false regressions among those named, at most; of identical campaigns with one
_REGRESSIONS = ("regression", "no result any more")
_HOURS = (
    "the intervals do not cover a machine that was slower for a whole campaign: to distinguish it from the code, "
    "measure both once more"
)

Key: TypeAlias = tuple[Hashable, ...]
"""The fields of `_WHERE` and `_POINT`. Versions may differ, because a comparison is often about them."""
Times: TypeAlias = Sequence[float]
"""The step times of a point in seconds, one of each launch."""


def compare(old: Path, new: Path, threshold: float = 0.05) -> Json:
    """Compare two campaign directories, or report.json files of campaigns; the result is plain data.

    `rows` has a point each, with `ratio` of new over old step time. Its `outcome` is a regression where the low end of
    the ratio's interval is above 1 + threshold, and `p_slower`, the p-value of "at most threshold slower" corrected for
    the `family` of points, is at most its `level`; "faster" likewise. Intervals cover what differs between launches,
    not between the hours of two campaigns. Raises `ValueError` where nothing can be compared.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold is {threshold}: give a fraction of at least 0, such as 0.05 for 5 %")
    before, after = _read(old), _read(new)
    mixed = before["mixed"] | after["mixed"]
    keys, rows = sorted(before["points"].keys() - mixed, key=lambda key: [(one is not None, one) for one in key]), []
    pairs = {key: (after["points"][key], before["points"][key]) for key in keys if key in after["points"]}
    found = dict(zip(pairs, judged(list(pairs.values()), threshold), strict=True))
    for key in keys:
        row: Json = dict(zip((*_WHERE, *_POINT), key, strict=True), old_step_time_s=median(before["points"][key]))
        if key in found:
            rows.append({**row, "new_step_time_s": median(after["points"][key]), **found[key]})
        elif tuple(row[field] for field in _LAUNCH) in after["failed"]:
            row |= dict.fromkeys(("new_step_time_s", "ratio", "p_slower", "p_faster"))
            rows.append({**row, "outcome": "no result any more"})
    if not rows and not after["wrong"]:
        raise ValueError(
            f"nothing in {old} and {new} can be compared: no setting was measured in both on the same machine, device, "
            "backend and number format, at the same nodes and ranks (machine_name in a campaign's file names a machine "
            "whose hosts have several names)"
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "scaling-comparison",
        "is_regression": bool(after["wrong"]) or any(row["outcome"] in _REGRESSIONS for row in rows),
        "threshold": threshold,
        "family": {"num_points": sum(row["p_slower"] is not None for row in rows), "method": _METHOD, "level": _LEVEL},
        "rows": rows,
        "wrong": after["wrong"],
        "notes": list(_notes(before, after, mixed)),
    }


def judged(pairs: Sequence[tuple[Times, Times]], threshold: float) -> list[Json]:
    """`ratio`, `p_slower`, `p_faster` and `outcome` of each point of a family, from its (new, old) times."""
    rows: list[Json] = [{"ratio": _ratio(*pair), "p_slower": None, "p_faster": None} for pair in pairs]
    if tested := [k for k, row in enumerate(rows) if row["ratio"].low is not None]:
        logs = [[np.log(pairs[k][side]) for k in tested] for side in (0, 1)]
        new, old = (np.transpose([(np.mean(one), np.std(one, ddof=1), len(one)) for one in side]) for side in logs)
        for name, (mean, sd, count), (mean_2, sd_2, count_2) in (("p_slower", new, old), ("p_faster", old, new)):
            # Not ranks: with 6 launches a side their p-value is at least 1/924, too large for one of 48 points.
            first = (mean - math.log1p(threshold), sd, count)
            test = ttest_ind_from_stats(*first, mean_2, sd_2, count_2, equal_var=False, alternative="greater")
            corrected = false_discovery_control(np.nan_to_num(test.pvalue, nan=1.0))  # NaN: equal and without noise
            for k, p_value in zip(tested, corrected.tolist(), strict=True):
                rows[k][name] = p_value
    return [{**row, "ratio": asdict(row["ratio"]), "outcome": _outcome(**row, factor=1 + threshold)} for row in rows]


def _ratio(new: Times, old: Times) -> Estimate:
    # A launch of one campaign shares no disturbance with one of the other, so no two have the same block.
    return ratio_interval(*({(side, k): time for k, time in enumerate(times)} for side, times in enumerate((new, old))))


def _outcome(ratio: Estimate, p_slower: float | None, p_faster: float | None, factor: float) -> str:
    if ratio.low is None or ratio.high is None or p_slower is None or p_faster is None:
        return "too few launches"
    if ratio.low > factor and p_slower <= _LEVEL:
        return "regression"
    if ratio.high < 1 / factor and p_faster <= _LEVEL:
        return "faster"
    if ratio.high > factor:
        return "not clear"
    return "same" if ratio.low >= 1 / factor else "not slower"


def _notes(old: Json, new: Json, mixed: set[Key]) -> Iterator[str]:
    for name in VERSIONS:
        if old["versions"][name] != new["versions"][name]:
            before, after = (", ".join(side["versions"][name]) or "none" for side in (old, new))
            yield f"{name} was {before} and is {after}"
    for what, one, other in (("old", old, new), ("new", new, old)):
        if alone := len(one["points"].keys() - other["points"].keys() - mixed):
            yield f"{alone} points are in the {what} campaign only"
    if mixed:
        yield f"{len(mixed)} points were measured with several sets of versions in one campaign, and are excluded"
    if old["wrong"]:
        yield f"of the old results {len(old['wrong'])} were wrong, and are excluded"


def table(comparison: Json) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of text; regressions begin with `!`."""
    columns = ["nodes", "ranks", "trained by", "features", "global batch", "old", "new", "new / old", "outcome"]
    rows = []
    for row in comparison["rows"]:
        new, ratio, mark = "", "", "!" * (row["outcome"] in _REGRESSIONS)
        if row["ratio"]:
            value, low, high = (row["ratio"][end] for end in ("value", "low", "high"))
            new = f"{row['new_step_time_s'] * 1e3:.3g} ms"
            ratio = f"{value:.3f}" + ("" if low is None else f" ({low:.3f}–{high:.3f})")
        size = [f"{mark}{row['num_nodes']}", str(row["num_nodes"] * row["ranks_per_node"])]
        setting = [f"{row['optimizer']}/{row['sync']}", str(row["num_features"]), f"{row['global_batch_size']:,}"]
        rows.append([*size, *setting, f"{row['old_step_time_s'] * 1e3:.3g} ms", new, ratio, row["outcome"]])
    return columns, rows


def conclusion(comparison: Json) -> list[str]:
    """The verdict in lines."""
    counts, wrong = Counter(row["outcome"] for row in comparison["rows"]), comparison["wrong"]
    beyond = f"beyond {percent(comparison['threshold'])}"
    verdict = f"regression {beyond}" if comparison["is_regression"] else f"no regression {beyond} is shown"
    if wrong:
        verdict = f"regression: of the new results {len(wrong)} {'is' if len(wrong) == 1 else 'are'} wrong"
    if counts:
        verdict += f" ({', '.join(f'{number} {outcome}' for outcome, number in counts.most_common())})"
    lines = [f"verdict      {verdict}"]
    if size := comparison["family"]["num_points"]:
        most, named = f"at most {percent(_LEVEL)} of", counts["regression"]
        expected = f"{most} the regressions ({_LEVEL * named:.2g} of {named}), and any in {most} comparisons"
        lines += [f"family       {size} points: {_METHOD}; the intervals are not corrected"]
        lines += [f"false alarms {expected} of identical code"]
    lines += [f"wrong        {line}" for line in wrong]
    return lines + [f"note         {note}" for note in comparison["notes"] + [_HOURS] * (counts["regression"] > 0)]


def _read(path: Path) -> Json:
    if not path.is_file():
        return _side(analyse(read_records([path])))
    try:
        report = json.loads(path.read_bytes())
        if report["kind"] != KIND or report["schema_version"] != SCHEMA_VERSION:
            raise ValueError("another kind or version of file")
        return _side(report)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{path} is no report.json that this torchreg can read ({why}): give a campaign's directory, or write its "
            "report again with `torchreg report`"
        ) from None


def _side(report: Json) -> Json:
    """The points of a report, those that were measured with several sets of versions (`mixed`), and what failed."""
    groups, mixed = report["groups"], set()
    points: dict[Key, Times] = {}
    for group in groups:
        for point in group["points"]:
            times = point["step_times_s"]
            if not times or not all(math.isfinite(time) and time > 0 for time in times):
                raise ValueError(f"step_times_s is {str(times)[:80]}")
            # One rank uses neither backend nor communicator: it is the same point in each group.
            unused = ("backend", "distributed") if point["num_nodes"] * point["ranks_per_node"] == 1 else ()
            where = (None if field in unused else group[field] for field in _WHERE)
            key = (*where, *(point[field] for field in _POINT))
            if points.setdefault(key, times) != times:
                mixed.add(key)
    wrong = [f"{one['what']}: {one['reason']}" for one in report["excluded"] if one["is_wrong_result"]]
    failed = {tuple(one[field] for field in _LAUNCH) for one in report["failed"] if not one["is_retried"]}
    found = {name: {str(value) for group in groups if (value := group["versions"].get(name))} for name in VERSIONS}
    versions = {name: sorted(values) for name, values in found.items()}
    return {"points": points, "mixed": mixed, "wrong": wrong, "failed": failed, "versions": versions}
