"""The record of a launch, `launch.json`: its fields, their bounds, and what must agree between them.

It is the one definition for writing and reading: `torchreg.scaling.schema` checks content against it with msgspec.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct

_LARGEST = 10**18  # beyond any count, byte or second of a campaign

Text = Annotated[str, Meta(max_length=4_000)]  # a reason or a version is shorter
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.+-]{1,40}\Z")]  # becomes part of file names
Time = Annotated[datetime, Meta(tz=True)]  # ISO 8601
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Index = Annotated[int, Meta(ge=0, le=_LARGEST)]
Count = Annotated[int, Meta(ge=1, le=_LARGEST)]
Number = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=_LARGEST)]
Positive = Annotated[float, Meta(gt=0, le=_LARGEST)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Duration = Annotated[float, Meta(ge=1e-12, le=1e9)]  # ratios of durations stay far from the ends of float64


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class Point(Struct, kw_only=True):
    """What a launch measured of one setting, and a row of `points_table`.

    `step_time_s` is the time of a step on the slowest rank, `local_step_time_s` the same without reduction over ranks
    (None on one rank), `data_time_s` the part that takes samples. `rank_*_s` are the step times of the ranks.
    `check_*`: the largest relative `difference` to the expected parameters after full-batch steps, what of it is
    tolerated, and the excess of the loss over that of the closed-form solution. The last six fields are of the run to
    the target: all are None without one, and the measured ones where the target was not reached.
    """

    optimizer: Name
    sync: Name
    num_features: Count
    global_batch_size: Count
    local_batch_size: Positive
    message_bytes: Index
    order: Index
    num_warmup_steps: Index
    num_steps: Count
    window_s: Duration
    step_time_s: Duration
    local_step_time_s: Duration | None
    data_time_s: Seconds
    throughput: Positive
    rank_min_s: Duration
    rank_median_s: Duration
    rank_max_s: Duration
    slowest_rank: Index
    slowest_host: Text
    check_passed: bool
    check_difference: Number | None
    check_tolerance: NotNegative | None
    check_excess: Number | None
    check_message: Text
    target_excess: Positive | None = None
    predicted_steps: NotNegative | None = None
    measured_steps: NotNegative | None = None
    measured_time_s: Seconds | None = None
    stability_limit: Positive | None = None
    noise_floor: NotNegative | None = None

    def __post_init__(self) -> None:
        is_product = math.isclose(self.throughput * self.step_time_s, self.global_batch_size, rel_tol=0.01)
        _require(is_product, f"throughput is {self.throughput:g}, not global_batch_size / step_time_s")
        low, median, high = self.rank_min_s, self.rank_median_s, self.rank_max_s
        message = f"rank_median_s is {median:g}, not between rank_min_s {low:g} and rank_max_s {high:g}"
        _require(low <= median <= high, message)
        for one, other in (("measured_steps", "measured_time_s"), ("target_excess", "stability_limit")):
            values = getattr(self, one), getattr(self, other)
            _require(values.count(None) != 1, f"{one} is {values[0]}, and {other} {values[1]}")


class AllReduce(Struct, kw_only=True):
    """The mean time of an all-reduce of one message size, and a row of `allreduce_table`."""

    backend: Name
    sync: Name
    message_bytes: Count
    time_s: Duration
    num_repeats: Count


class Placement(Struct, kw_only=True):
    """Where a rank runs."""

    rank: Index
    host: Text
    local_rank: Index
    device: Text
    device_name: Text


class Distributed(Struct, kw_only=True):
    """How the ranks communicate, and where they are; see `Communicator`."""

    launcher: Text
    requested: Text
    effective: Text
    ezpz_version: Text | None
    backend: Text
    world_size: Count
    num_nodes: Count
    mpi_library: Text | None
    nccl_version: Text | None
    device_name: Text | None
    num_cpus: Count | None
    cpus_per_rank: Count | None
    placements: list[Placement]


class Source(Struct, kw_only=True):
    """The commit of the checkout, and whether it has changes."""

    commit: Text | None
    dirty: bool | None


class Provenance(Struct, kw_only=True):
    """See `torchreg.runs.record.provenance`."""

    started_utc: Time
    finished_utc: Time
    argv: list[str]
    source: Source
    python: Text
    platform: Text
    libraries: dict[Text, Text]
    job_id: Text | None
    environment: dict[Text, Text]


class CampaignId(Struct, kw_only=True):
    """The campaign that a launch belongs to."""

    name: Text
    machine: Text
    fingerprint: Text
    device: Text
    without: list[Text]


class LaunchId(Struct, kw_only=True):
    """Which launch of the campaign; see `torchreg.scaling.campaign.Launch`."""

    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")]
    block: Index
    world_size: Count
    num_nodes: Count
    ranks_per_node: Count
    seed: Integer

    def __post_init__(self) -> None:
        product = f"num_nodes {self.num_nodes} × ranks_per_node {self.ranks_per_node}"
        is_product = self.num_nodes * self.ranks_per_node == self.world_size
        _require(is_product, f"world_size is {self.world_size}, not {product}")


class LaunchRecord(Struct, kw_only=True, tag_field="status"):
    """What every launch has, however it ended."""

    schema_version: Literal[2]
    kind: Literal["scale-launch"]
    campaign: CampaignId
    launch: LaunchId
    command: list[str]
    started_utc: Time
    provenance: Provenance


class FailedLaunch(LaunchRecord, kw_only=True, tag="failed"):
    """A launch that measured nothing."""

    exit_code: Integer | None
    reason: Text
    wall_s: Seconds | None


class OkLaunch(LaunchRecord, kw_only=True, tag="ok"):
    """A launch that can be used."""

    exit_code: Literal[0]
    wall_s: Seconds
    start_up_s: Seconds | None
    dtype: Text
    points: list[Point]
    allreduce: list[AllReduce]
    distributed: Distributed
    machine_facts: dict[Text, Text | None]

    def __post_init__(self) -> None:
        launch, distributed, world_size = self.launch, self.distributed, self.launch.world_size
        for field in ("world_size", "num_nodes"):
            found, wanted = getattr(distributed, field), getattr(launch, field)
            _require(found == wanted, f"distributed.{field} is {found}, expected {wanted} (launch.{field})")
        placements = f"distributed.placements has {len(distributed.placements)} of {world_size} ranks"
        _require(len(distributed.placements) == world_size, f"partial: {placements}")
        found, wanted = {one.device.split(":")[0] for one in distributed.placements}, self.campaign.device
        message = f"distributed.placements has {', '.join(sorted(found))}, expected {wanted} (campaign.device)"
        _require(wanted == "auto" or found == {wanted}, message)
        _require(bool(self.points or self.allreduce), "partial: points and allreduce are empty")
        settings = set()
        for index, point in enumerate(self.points):
            name, size = f"points[{index}]", point.local_batch_size
            setting = (point.optimizer, point.sync, point.num_features, point.global_batch_size)
            _require(setting not in settings, f"{name} is measured twice in one launch: {setting}")
            settings.add(setting)
            is_reduced = world_size > 1
            _require((point.sync != "none") == is_reduced, f"{name}.sync is {point.sync!r} at world size {world_size}")
            has_message = point.message_bytes > 0 or not is_reduced
            _require(has_message, f"{name}.message_bytes is 0 at world size {world_size}")
            is_quotient = abs(point.global_batch_size / world_size - size) < 1
            _require(is_quotient, f"{name}.local_batch_size is {size:g}, not global_batch_size / world_size")
        sizes = {(one.backend, one.sync, one.message_bytes) for one in self.allreduce}
        _require(len(sizes) == len(self.allreduce), "allreduce has a backend and message size twice")
