"""The record of a launch, `launch.json`: its fields, their bounds, what must agree between them, and its checksum."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from torchreg.console import printable
from torchreg.runs.record import to_json

KIND = "scale-launch"
SCHEMA_VERSION = 2
CHECKSUM = "sha256"

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


class _Placement(Struct, kw_only=True):
    rank: Index
    host: Text
    local_rank: Index
    device: Text
    device_name: Text


class _Distributed(Struct, kw_only=True):  # see `Communicator.describe_environment`
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
    placements: list[_Placement]


class _Source(Struct, kw_only=True):  # the commit of the checkout, and whether it has changes
    commit: Text | None
    dirty: bool | None


class _Provenance(Struct, kw_only=True):  # see `torchreg.runs.environment.provenance`
    started_utc: Time
    finished_utc: Time
    argv: list[str]
    source: _Source
    python: Text
    platform: Text
    libraries: dict[Text, Text]
    job_id: Text | None
    environment: dict[Text, Text]


class _CampaignId(Struct, kw_only=True):
    name: Text
    machine: Text
    fingerprint: Text
    device: Text
    without: list[Text]


class _LaunchId(Struct, kw_only=True):  # see `torchreg.scaling.campaign.Launch`
    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")]
    block: Index
    world_size: Count
    num_nodes: Count
    ranks_per_node: Count
    seed: Integer

    def __post_init__(self) -> None:
        nodes, ranks, total = self.num_nodes, self.ranks_per_node, self.world_size
        _require(nodes * ranks == total, f"world_size is {total}, not num_nodes {nodes} × ranks_per_node {ranks}")


class _LaunchRecord(Struct, kw_only=True, tag_field="status"):  # what every launch has, however it ended
    campaign: _CampaignId
    launch: _LaunchId
    command: list[str]
    started_utc: Time
    provenance: _Provenance
    verification: list[dict[Text, str]] | None = None  # see `torchreg.verification.checks.Check`


class FailedLaunch(_LaunchRecord, kw_only=True, tag="failed"):
    """A launch that measured nothing."""

    exit_code: Integer | None
    reason: Text
    wall_s: Seconds | None


class OkLaunch(_LaunchRecord, kw_only=True, tag="ok"):
    """A launch that can be used."""

    exit_code: Literal[0]
    wall_s: Seconds
    start_up_s: Seconds | None
    dtype: Text
    points: list[Point]
    allreduce: list[AllReduce]
    distributed: _Distributed
    machine_facts: dict[Text, Text | None]

    def __post_init__(self) -> None:
        world_size, placements = self.launch.world_size, self.distributed.placements
        for field in ("world_size", "num_nodes"):
            found, wanted = getattr(self.distributed, field), getattr(self.launch, field)
            _require(found == wanted, f"distributed.{field} is {found}, expected {wanted} (launch.{field})")
        message = f"partial: distributed.placements has {len(placements)} of {world_size} ranks"
        _require(len(placements) == world_size, message)
        devices, wanted = {one.device.split(":")[0] for one in placements}, self.campaign.device
        message = f"distributed.placements has {', '.join(sorted(devices))}, expected {wanted} (campaign.device)"
        _require(wanted == "auto" or devices == {wanted}, message)
        _require(bool(self.points or self.allreduce), "partial: points and allreduce are empty")
        settings = set()
        for index, point in enumerate(self.points):
            name, size, is_reduced = f"points[{index}]", point.local_batch_size, world_size > 1
            setting = (point.optimizer, point.sync, point.num_features, point.global_batch_size)
            _require(setting not in settings, f"{name} is measured twice in one launch: {setting}")
            settings.add(setting)
            _require((point.sync != "none") == is_reduced, f"{name}.sync is {point.sync!r} at world size {world_size}")
            has_message = point.message_bytes > 0 or not is_reduced
            _require(has_message, f"{name}.message_bytes is 0 at world size {world_size}")
            is_quotient = abs(point.global_batch_size / world_size - size) < 1
            _require(is_quotient, f"{name}.local_batch_size is {size:g}, not global_batch_size / world_size")
        sizes = {(one.backend, one.sync, one.message_bytes) for one in self.allreduce}
        _require(len(sizes) == len(self.allreduce), "allreduce has a backend and message size twice")


def checksummed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON will return it, with the SHA-256 of its content: what a `launch.json` holds."""
    content = json.loads(to_json(record))
    content.pop(CHECKSUM, None)
    return {**content, CHECKSUM: _digest(content)}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check(text: bytes) -> dict[str, Any]:
    """The content of a `launch.json` with its strings made printable: that of an `OkLaunch` or a `FailedLaunch`.

    Raises `ValueError` in one line with the reason why it must be excluded.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"damaged: no JSON ({reason})") from None
    kind = content.get("kind") if isinstance(content, dict) else content
    if not isinstance(content, dict) or kind != KIND:
        raise ValueError(f"foreign: kind is {_shown(kind)}, not {KIND!r}")
    version = content.get("schema_version")
    if type(version) is not int:
        raise ValueError(f"foreign: schema_version is {_shown(version)}, not {SCHEMA_VERSION}")
    if version != SCHEMA_VERSION:
        age, remedy = ("newer", "update it") if version > SCHEMA_VERSION else ("older", "measure again")
        reads = f"this torchreg reads {SCHEMA_VERSION}"
        raise ValueError(f"{age}: schema_version is {_shown(version)}, and {reads}: {remedy}")
    checksum = content.pop(CHECKSUM, None)
    if not isinstance(checksum, str):
        raise ValueError(f"partial: {CHECKSUM}, the checksum of a finished record, is missing")
    try:
        if _digest(content) != checksum:
            raise ValueError(f"damaged: the content is not what was written ({CHECKSUM} differs)")
        content = _printable(content)
        msgspec.convert(content, OkLaunch | FailedLaunch)
    except RecursionError:
        raise ValueError("damaged: nested deeper than any record") from None
    except msgspec.ValidationError as error:
        raise ValueError(_message(str(error), content)) from None
    return dict(content)


def _message(error: str, content: Any) -> str:
    """A message of msgspec, such as "Expected `int`, got `str` - at `$.points[0].order`", with field and value."""
    error, _, path = error.replace("`", "").partition(" - at $")
    path = path.removeprefix(".").removesuffix("[...]")  # the latter stands for a key of a dictionary
    if missing := re.fullmatch(r"Object missing required field (\w+)", error):
        return f"partial: {path}{'.' * bool(path)}{missing[1]} is missing"
    if not error.startswith(("Expected ", "Invalid ", "Number out of range")):  # one of the checks of this module
        return f"{path}.{error}" if path else error
    for part in re.findall(r"\w+", path):
        content = content[int(part) if isinstance(content, list) else part]
    return f"{path} is {_shown(content)}: {error[0].lower()}{error[1:]}"


def _shown(value: Any) -> str:
    """A wrong value, short enough for a message."""
    return f"{reprlib.repr(value):.60}"


def _printable(content: Any) -> Any:
    if isinstance(content, dict):
        return {printable(key): _printable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_printable(item) for item in content]
    return printable(content) if isinstance(content, str) else content
