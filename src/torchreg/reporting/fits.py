"""Models of the step time of a series and of the time of an all-reduce, fitted to launches."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

import numpy as np
import pandas as pd

from torchreg.reporting.points import Json, over_launches
from torchreg.scaling import models
from torchreg.scaling.identify import Fit

_FURTHER = 8  # curves end at this multiple of the largest measured world size
_CURVE_POINTS = 24
_SETTING = ("scope", "optimizer", "sync", "num_features")
_ALLREDUCE_KEY = ["backend", "sync", "num_nodes", "ranks_per_node", "world_size"]
Size = TypeVar("Size")


def models_of(series: Json, launches: Mapping[str, pd.DataFrame], others: Sequence[Json]) -> list[Json]:
    """Amdahl (strong scaling only), the universal scalability law, and compute + α–β; `launches` are those by point.

    The last is fitted to the points of all `others` with the same scope, optimizer, sync and number of features, strong
    and weak together, because only then local batch and world size vary independently.
    """
    own = pd.concat([launches[row["point"]] for row in series["points"]])
    times = _times(own["world_size"], own["step_time_s"])
    measured = [row["world_size"] for row in series["points"]]
    global_batch, local_batch, last = series["global_batch_size"], series["local_batch_size"], measured[-1] * _FURTHER
    if series["kind"] == "strong":
        fits = [models.fit_amdahl(times), models.fit_usl(times, global_batch_size=global_batch)]
        last = max(min(last, global_batch), measured[-1])  # each rank has a sample
    else:
        fits = [models.fit_usl(times, local_batch_size=round(local_batch))]
    ranks = np.unique([*np.rint(np.geomspace(measured[0], last, _CURVE_POINTS)), *measured])

    alike = [other for other in others if all(other[field] == series[field] for field in _SETTING)]
    rows = pd.concat([launches[name] for name in {row["point"]: None for other in alike for row in other["points"]}])
    message = int(rows["message_bytes"].max())  # of one rank too, which sends none
    sizes = zip(rows["world_size"], rows["global_batch_size"], strict=True)
    works = [models.Work(p, batch / p, message) for p, batch in sizes]
    local_batches = global_batch / ranks if series["kind"] == "strong" else np.full_like(ranks, local_batch)
    predicted = [(fit, ranks) for fit in fits]
    predicted.append((
        models.fit_mechanistic(_times(works, rows["step_time_s"])),
        np.stack([ranks, local_batches, np.full_like(ranks, series["message_bytes"])], 1),
    ))  # fmt: skip
    return [
        {
            **_fit(fit),
            "curve": [
                {"world_size": int(p), "step_time_s": float(seconds), "extrapolated": bool(p > measured[-1])}
                for p, seconds in zip(ranks, fit.predict(at), strict=True)
                if fit.identifiable
            ],
        }
        for fit, at in predicted
    ]


def _times(sizes: Iterable[Size], seconds: pd.Series[float]) -> dict[Hashable, dict[Size, float]]:
    """{block: {size: seconds}}, as fits need them; the index of `seconds` is the block."""
    times: dict[Hashable, dict[Size, float]] = {}
    for size, (block, value) in zip(sizes, seconds.items(), strict=True):
        times.setdefault(block, {})[size] = value
    return times


def _fit(fit: Fit) -> Json:
    return {field: value for field, value in asdict(fit).items() if field != "predict"}


def allreduce_of(table: pd.DataFrame) -> list[Json]:
    """Time and bandwidth (B/s) by message size for each backend and world size, with a fit."""
    found = []
    for _, rows in table.groupby(_ALLREDUCE_KEY, sort=True):
        times = rows.set_index("block")["time_s"]
        sizes = [
            {"message_bytes": size, "time_s": over_launches(own), "bandwidth": size / float(own.median())}
            for size, own in rows.groupby("message_bytes")["time_s"]
        ]
        key = {name: rows[name].tolist()[0] for name in _ALLREDUCE_KEY}
        fit = models.fit_allreduce(_times(rows["message_bytes"], times))
        found.append({**key, "sizes": sizes, "fit": _fit(fit)})
    return found
