"""How far a series scales well, and what bounds it: from a series and its group's points, as the report has them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from torchreg.plots.quantities import in_unit, ranks

GOOD = 0.8  # the efficiency that counts as scaling well


def scaling_limit(series: Mapping[str, Any]) -> dict[str, Any]:
    """Up to which world size every efficiency is at least 80 %, and how sure that is.

    `largest_efficient_world_size` goes by the estimates, `shown_up_to` by the low ends of their intervals,
    `about_up_to` by the high ends: where they differ, an interval straddles 80 %. The last two are None where there
    are too few launches for intervals. `summary` says it without the series' name.
    """
    baseline, *others = series["points"]

    def last(key: str) -> int:
        kept = takewhile(lambda point: (point["efficiency"][key] or 0) >= GOOD, others)
        return max((point["world_size"] for point in kept), default=baseline["world_size"])

    p0, most = baseline["world_size"], others[-1]["world_size"]
    by_value = last("value")
    has_intervals = all(point["efficiency"]["low"] is not None for point in others)
    shown, about = (last("low"), last("high")) if has_intervals else (None, None)
    told = [point for point in others if point["world_size"] in (shown, about, by_value)]
    told += [point for point in others if point["world_size"] > (about or by_value)][:1]
    evidence = "; ".join(f"{percent(point['efficiency'])} at {ranks(point['world_size'])}" for point in told)
    summary = _summary(p0, by_value, shown, about, others[0]["world_size"])
    if (about or by_value) == most:
        summary += ", the most that was measured"
    return {
        "series": series["id"],
        "largest_efficient_world_size": by_value,
        "shown_up_to": shown,
        "about_up_to": about,
        "summary": summary,
        "text": f"{series['title']} (baseline {ranks(p0)}): {summary} ({evidence}).",
    }


def _summary(p0: int, by_value: int, shown: int | None, about: int | None, first: int) -> str:
    if shown is None or about is None:
        what = f"80 % up to {ranks(by_value)}" if by_value > p0 else f"below 80 % from {ranks(first)} on"
        return f"{what} by the medians, too few launches to tell"
    if about == p0:
        return f"below 80 % from {ranks(first)} on"
    straddling = f"about 80 % {'at' if about == first else 'up to'} {ranks(about)}, where the interval straddles it"
    if shown == p0:
        return straddling
    return f"at least 80 % shown up to {ranks(shown)}" + (f", {straddling}" if about > shown else "")


def percent(estimate: Mapping[str, Any]) -> str:
    """A fraction with its interval, where there is one."""
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    interval = "" if low is None or high is None else f" ({100 * low:.0f}–{100 * high:.0f} %)"
    return f"{100 * value:.0f} %{interval}"


def bottleneck(series: Mapping[str, Any], points: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Where the time beyond ideal scaling goes at the largest world size; None where it was not taken apart.

    T(p) − k·T(p0), with k = p0/p for strong scaling and 1 for weak, is what is lost. It splits into what exposed
    communication takes beyond k times what it took at p0, and what taking rows and computing take beyond theirs.
    """
    first, last = (points[series["points"][place]["point"]] for place in (0, -1))
    if last["exposed_time_s"] is None or last["compute_time_s"] is None:
        return None
    if first["world_size"] > 1 and first["exposed_time_s"] is None:
        return None
    strong = series["kind"] == "strong"
    shard = first["world_size"] / last["world_size"] if strong else 1.0
    lost = last["step_time_s"]["value"] - shard * first["step_time_s"]["value"]
    before = first["exposed_time_s"]["value"] if first["exposed_time_s"] else 0.0
    exposed = last["exposed_time_s"]["value"] - shard * before
    compute = lost - exposed
    imbalance = last["imbalance_time_s"]["value"]
    efficiency, where = series["points"][-1]["efficiency"], f"at {ranks(last['world_size'])}"
    if lost <= 0 or (efficiency["low"] or 0) >= GOOD:
        what, told = "nothing much", f"efficiency {percent(efficiency)}"
    elif exposed >= compute:
        what = "imbalance of ranks" if imbalance > exposed / 2 else "exposed communication"
        told = _of_lost(imbalance if imbalance > exposed / 2 else exposed, lost)
    else:
        what, told = f"compute that {'does not shrink' if strong else 'grows'}", _of_lost(compute, lost)
    return {
        "series": series["id"],
        "what": what,
        "world_size": last["world_size"],
        "lost_s": lost,
        "exposed_s": exposed,
        "compute_s": compute,
        "imbalance_s": imbalance,
        "text": f"{series['title']}: {what} bounds it {where}: {told}.",
    }


def _of_lost(part: float, lost: float) -> str:
    return f"{in_unit([part], 's')} of the {in_unit([lost], 's')} that a step takes beyond ideal scaling"
