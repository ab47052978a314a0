"""Has a campaign become slower? New against old, point by point, as ratios of step times over launches."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torchreg.reporting.analysis import KIND, SCHEMA_VERSION
from torchreg.reporting.groups import VERSIONS, comparable_groups
from torchreg.reporting.points import points_of
from torchreg.reporting.provenance import excluded, failures
from torchreg.scaling.records import launches_table, points_table, read_records
from torchreg.scaling.statistics import Estimate, ratio_interval

Outcome = Literal[
    "regression", "faster", "same", "not slower", "not clear", "too few launches to tell", "no result any more"
]

_PLACE = ("machine", "device_name", "backend", "dtype", "distributed")
_POINT = ("num_nodes", "ranks_per_node", "optimizer", "sync", "num_features", "global_batch_size")

_HOURS = (
    "a machine that was slower for a whole campaign is not in the intervals: to tell it from the code, measure both "
    "once more"
)

Key = tuple[Hashable, ...]
"""The fields of `_PLACE` and `_POINT`: versions may differ, for they are what a comparison is often about."""


@dataclass(frozen=True)
class _Measured:
    """A point's step time; `times` by block are None where only the estimate is known, from a report.json."""

    step_time: Estimate
    times: Mapping[Hashable, float] | None


@dataclass(frozen=True)
class _Side:
    """What a campaign directory or a report.json says. `mixed` are points measured with several sets of versions."""

    points: Mapping[Key, _Measured]
    mixed: frozenset[Key]
    wrong: tuple[str, ...]
    failed: frozenset[tuple[str, int, int]]
    versions: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Row:
    """One point, old and new. `ratio` is new over old, above 1 where new is slower."""

    point: Mapping[str, Any]
    old_step_time_s: float
    new_step_time_s: float | None
    ratio: Estimate | None
    outcome: Outcome

    @property
    def is_regression(self) -> bool:
        """Slower beyond the threshold, or no longer possible."""
        return self.outcome in ("regression", "no result any more")


@dataclass(frozen=True)
class Comparison:
    """All points that can be compared; `wrong` are the wrong results among the new ones."""

    threshold: float
    rows: tuple[Row, ...]
    wrong: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_regression(self) -> bool:
        """Whether anything is slower beyond the threshold, wrong, or no longer possible."""
        return bool(self.wrong) or any(row.is_regression for row in self.rows)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for a person; regressions begin with `!`."""
        columns = ["nodes", "ranks", "trained by", "features", "global batch", "old", "new", "new / old", "outcome"]
        rows = []
        for row in self.rows:
            point = row.point
            rows.append([
                f"{'!' if row.is_regression else ''}{point['num_nodes']}",
                f"{point['num_nodes'] * point['ranks_per_node']}",
                f"{point['optimizer']}/{point['sync']}",
                f"{point['num_features']}",
                f"{point['global_batch_size']:,}",
                f"{row.old_step_time_s * 1e3:.3g} ms",
                "" if row.new_step_time_s is None else f"{row.new_step_time_s * 1e3:.3g} ms",
                _shown(row.ratio),
                row.outcome,
            ])  # fmt: skip
        return columns, rows

    def conclusion(self) -> list[str]:
        """The verdict in lines."""
        counts = Counter(row.outcome for row in self.rows)
        told = ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common())
        beyond = f"beyond {100 * self.threshold:.3g} %"
        what = f"regression {beyond}" if self.is_regression else f"no regression {beyond} is shown"
        if self.wrong:
            what = f"regression: of the new results {len(self.wrong)} {'is' if len(self.wrong) == 1 else 'are'} wrong"
        return [
            f"verdict      {what}" + (f" ({told})" if told else ""),
            *(f"wrong        {line}" for line in self.wrong),
            *(f"note         {note}" for note in self.notes),
            *([f"note         {_HOURS}"] if any(row.outcome == "regression" for row in self.rows) else []),
        ]

    def as_json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "scaling-comparison",
            "is_regression": self.is_regression,
            "threshold": self.threshold,
            "rows": [
                {**row.point, "old_step_time_s": row.old_step_time_s, "new_step_time_s": row.new_step_time_s,
                 "ratio": row.ratio and asdict(row.ratio), "outcome": row.outcome}
                for row in self.rows
            ],
            "wrong": list(self.wrong),
            "notes": list(self.notes),
        }  # fmt: skip


def compare(old: Path, new: Path, threshold: float = 0.05) -> Comparison:
    """Compare two campaign directories, or report.json files of campaigns.

    A point has become slower where even the low end of the interval of new over old is above 1 + threshold. Intervals
    hold what differs between a campaign's launches, and not what differs between the hours of two campaigns. From a
    report.json only intervals are known: the ratio's is then the widest that they allow. Raises `ValueError` where
    nothing can be compared.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold is {threshold}: give a fraction of at least 0, such as 0.05 for 5 %")
    before, after = _read(old), _read(new)
    mixed = before.mixed | after.mixed
    rows = []
    for key in sorted(before.points.keys() - mixed, key=_order):
        if key in after.points:
            rows.append(_row(key, before.points[key], after.points[key], threshold))
        elif _where(key) in after.failed:
            found = before.points[key]
            rows.append(Row(_point(key), found.step_time.value, None, None, "no result any more"))
    if not rows and not after.wrong:
        raise ValueError(
            f"nothing in {old} and {new} can be compared: no setting was measured in both on the same machine, device, "
            "backend and number format, at the same nodes and ranks (machine_name "
            "in a campaign's file names a machine whose hosts have several names)"
        )
    return Comparison(threshold, tuple(rows), after.wrong, tuple(_notes(before, after, mixed)))


def _order(key: Key) -> tuple[Any, ...]:
    """By machine, device and number format, then by nodes, ranks and setting."""
    machine, device, backend, dtype, communicator, *point = key
    return (*map(str, (machine, device, dtype)), *point, *map(str, (backend, communicator)))


def _row(key: Key, old: _Measured, new: _Measured, threshold: float) -> Row:
    if old.times is not None and new.times is not None:
        sides = (("new", new.times), ("old", old.times))  # the same block number is not the same block
        ratio = ratio_interval(*({(side, block): time_s for block, time_s in times.items()} for side, times in sides))
    else:
        ratio = _widest(new.step_time, old.step_time)
    outcome: Outcome
    if ratio.low is None or ratio.high is None:
        outcome = "too few launches to tell"
    elif ratio.low > 1 + threshold:
        outcome = "regression"
    elif ratio.high < 1 / (1 + threshold):
        outcome = "faster"
    elif ratio.high > 1 + threshold:
        outcome = "not clear"
    else:
        outcome = "same" if ratio.low >= 1 / (1 + threshold) else "not slower"
    return Row(_point(key), old.step_time.value, new.step_time.value, ratio, outcome)


def _widest(new: Estimate, old: Estimate) -> Estimate:
    """The ratio where only both intervals are known: it holds the truth wherever both do."""
    fewer = min(new.num_launches, old.num_launches)
    if new.low is None or new.high is None or old.low is None or old.high is None:
        return Estimate(new.value / old.value, None, None, fewer)
    return Estimate(new.value / old.value, new.low / old.high, new.high / old.low, fewer)


def _point(key: Key) -> dict[str, Any]:
    return dict(zip((*_PLACE, *_POINT), key, strict=True))


def _where(key: Key) -> tuple[Any, Any, Any]:
    point = _point(key)
    return point["machine"], point["num_nodes"], point["ranks_per_node"]


def _notes(old: _Side, new: _Side, mixed: frozenset[Key]) -> Iterator[str]:
    for name in VERSIONS:
        if old.versions[name] != new.versions[name]:
            before, after = (", ".join(side.versions[name]) or "none" for side in (old, new))
            yield f"{name} was {before} and is {after}"
    for what, one, other in (("old", old, new), ("new", new, old)):
        if alone := len(one.points.keys() - other.points.keys() - mixed):
            yield f"{alone} points are in the {what} campaign alone"
    if mixed:
        yield f"{len(mixed)} points were measured with several sets of versions in one campaign, and are left out"
    if old.wrong:
        yield f"of the old results {len(old.wrong)} were wrong, and are left out"


def _shown(ratio: Estimate | None) -> str:
    if ratio is None:
        return ""
    interval = "" if ratio.low is None else f" ({ratio.low:.3f}–{ratio.high:.3f})"
    return f"{ratio.value:.3f}{interval}"


# What each side says


def _read(path: Path) -> _Side:
    if not path.is_file():
        return _from_records(path)
    try:
        report = json.loads(path.read_bytes())
        if report["kind"] != KIND or report["schema_version"] != SCHEMA_VERSION:
            raise ValueError("another kind or version of file")
        return _from_report(report)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{path} is no report.json that this torchreg can read ({why}): give a campaign's directory, or write its "
            "report anew with `torchreg report`"
        ) from None


def _from_records(folder: Path) -> _Side:
    records = read_records([folder])
    launches, points = launches_table(records), points_table(records)
    good = points[points["check_passed"]]
    found: list[tuple[Key, _Measured]] = []
    groups = comparable_groups(launches)
    for group in groups:
        place = {**group.key, "distributed": group.key["effective"]}
        for point in points_of(group.id, good[good["launch"].isin(group.launches)]):
            key = _key(place, {field: getattr(point, field) for field in _POINT})
            found.append((key, _Measured(point.step_time, point.step_times)))
    return _side(found, excluded(records), failures(records), [group.key for group in groups])


def _from_report(report: Mapping[str, Any]) -> _Side:
    found = [
        (_key(group, point), _Measured(_estimate(point["step_time_s"]), None))
        for group in report["groups"]
        for point in group["points"]
    ]
    return _side(found, report["excluded"], report["failed"], [group["versions"] for group in report["groups"]])


def _estimate(content: Mapping[str, Any]) -> Estimate:
    value, low, high = (None if content[key] is None else float(content[key]) for key in ("value", "low", "high"))
    if value is None or not all(math.isfinite(end) and end > 0 for end in (value, low, high) if end is not None):
        raise ValueError(f"step_time_s is {str(content)[:80]}")
    return Estimate(value, low, high, int(content["num_launches"]))


def _key(place: Mapping[str, Any], point: Mapping[str, Any]) -> Key:
    """One rank has neither backend nor runtime: it is the same in each group that it belongs to."""
    alone = point["num_nodes"] * point["ranks_per_node"] == 1
    return (
        *(None if alone and field in ("backend", "distributed") else place[field] for field in _PLACE),
        *(point[field] for field in _POINT),
    )


def _side(
    found: list[tuple[Key, _Measured]],
    excluded: list[dict[str, Any]],
    failed: list[dict[str, Any]],
    versions: list[Mapping[str, Any]],
) -> _Side:
    points: dict[Key, _Measured] = {}
    mixed = set()
    for key, measured in found:
        if points.setdefault(key, measured) != measured:
            mixed.add(key)
    return _Side(
        points,
        frozenset(mixed),
        tuple(f"{one['what']}: {one['reason']}" for one in excluded if one["is_wrong_result"]),
        frozenset((one["machine"], one["num_nodes"], one["ranks_per_node"]) for one in failed if not one["is_retried"]),
        {name: tuple(sorted({str(value) for one in versions if (value := one.get(name))})) for name in VERSIONS},
    )
