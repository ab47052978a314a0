"""Series: what strong scaling (same global batch) and weak scaling (same local batch) say of a group's points."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torchreg.plots.quantities import features
from torchreg.reporting.points import Point, over_launches, scaled
from torchreg.scaling.statistics import Estimate, karp_flatt, ratio_interval


@dataclass(frozen=True)
class Series:
    """Points of growing world size that differ in nothing else than kind and scope allow; the first is the baseline."""

    id: str
    kind: Literal["strong", "weak"]
    scope: str
    optimizer: str
    sync: str
    num_features: int
    points: tuple[Point, ...]

    @property
    def baseline(self) -> Point:
        """The point of the smallest world size, p0."""
        return self.points[0]

    @property
    def batch(self) -> str:
        """The batch that all points share, in words."""
        if self.kind == "strong":
            return f"global batch {self.baseline.global_batch_size}"
        return f"local batch {self.baseline.local_batch_size:g}"

    @property
    def setting(self) -> str:
        """What is trained and how, in words."""
        return f"{self.optimizer}/{self.sync}, {features(self.num_features)}, {self.batch}"

    @property
    def title(self) -> str:
        """The series in words."""
        return f"{self.kind} scaling {self.scope}: {self.setting}"

    def efficiency(self, point: Point) -> Estimate:
        """Strong: T(p0)·p0 / (T(p)·p), so that half the time on twice the ranks is 1. Weak: T(p0) / T(p)."""
        if point is self.baseline:
            return Estimate(1.0, 1.0, 1.0, len(point.launches))
        ratio = ratio_interval(self.baseline.step_times, point.step_times)
        return scaled(ratio, self.baseline.world_size / point.world_size) if self.kind == "strong" else ratio


def series_of(group: str, points: Sequence[Point]) -> list[Series]:
    """All series of a group's points.

    A campaign that asks for strong and weak series measures points that also form other, shorter ones by chance: these
    are left out where each of their points is in a series of full length.
    """
    candidates = [
        found
        for scope, inside in _scopes(points)
        for optimizer, sync, num_features in dict.fromkeys(
            (point.optimizer, point.sync, point.num_features) for point in inside if point.sync != "none"
        )
        for found in _of_setting(group, scope, inside, optimizer, sync, num_features)
    ]
    longest: dict[tuple[str, ...], int] = defaultdict(int)
    for one in candidates:
        longest[_family(one)] = max(longest[_family(one)], len(one.points))
    full = [one for one in candidates if len(one.points) == longest[_family(one)]]
    shown = {(one.scope, one.sync, point.id) for one in full for point in one.points}
    return [
        one
        for one in candidates
        if one in full or any((one.scope, one.sync, point.id) not in shown for point in one.points)
    ]


def _family(series: Series) -> tuple[str, ...]:
    return series.scope, series.optimizer, series.sync, str(series.num_features)


def _scopes(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    """Ranks of one node talk through its memory, those of several through a network: a step there is another step."""
    scopes = [("within a node", [point for point in points if point.num_nodes == 1])]
    for per_node in sorted({point.ranks_per_node for point in points if point.num_nodes > 1}):
        name = f"across nodes, {per_node} rank{'s' * (per_node > 1)} a node"
        scopes.append((name, [point for point in points if point.ranks_per_node == per_node]))
    return scopes


def _of_setting(
    group: str, scope: str, points: Sequence[Point], optimizer: str, sync: str, num_features: int
) -> list[Series]:
    mine = [
        point
        for point in points
        if (point.optimizer, point.num_features) == (optimizer, num_features) and point.sync in (sync, "none")
    ]
    found = []
    kinds: tuple[tuple[Literal["strong", "weak"], str], ...] = (
        ("strong", "global_batch_size"),
        ("weak", "local_batch_size"),
    )
    for kind, field in kinds:
        for batch in sorted({getattr(point, field) for point in mine}):
            same = [point for point in mine if getattr(point, field) == batch]
            if len(same) > 1:
                name = f"{group}-{kind}-{scope.replace(',', '').replace(' ', '-')}-{optimizer}-{sync}"
                found.append(
                    Series(
                        f"{name}-features-{num_features}-batch-{batch:g}", kind, scope, optimizer, sync, num_features,
                        tuple(sorted(same, key=lambda point: point.world_size)),
                    )
                )  # fmt: skip
    return found


def series_json(series: Series) -> dict[str, Any]:
    """What the report tells of a series, its models aside."""
    baseline, last = series.baseline, series.points[-1]
    strong = series.kind == "strong"
    return {
        "id": series.id,
        "title": series.title,
        "kind": series.kind,
        "scope": series.scope,
        "optimizer": series.optimizer,
        "sync": series.sync,
        "num_features": series.num_features,
        "message_bytes": last.message_bytes,
        "global_batch_size": baseline.global_batch_size if strong else None,
        "local_batch_size": None if strong else baseline.local_batch_size,
        "baseline_world_size": baseline.world_size,
        "points": [_point_json(series, point) for point in series.points],
    }


def _point_json(series: Series, point: Point) -> dict[str, Any]:
    more_ranks = point.world_size / series.baseline.world_size
    efficiency = series.efficiency(point)
    speedup = scaled(efficiency, more_ranks)
    serial = karp_flatt(speedup, more_ranks) if series.kind == "strong" and more_ranks > 1 else None
    return {
        "point": point.id,
        "world_size": point.world_size,
        "num_nodes": point.num_nodes,
        "speedup": asdict(speedup),
        "efficiency": asdict(efficiency),
        "throughput": over_launches(point.global_batch_size / point.launches["step_time_s"]),
        "karp_flatt": None if serial is None else asdict(serial),
        "step_time_s": over_launches(point.launches["step_time_s"]),
    }
