"""What a picture of a scaling report is: panels under one legend, each combination with one look in all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchreg.console import printable
from torchreg.plots.panels import Json, Look, combination_of
from torchreg.plots.quantities import count, ranks
from torchreg.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `says` is for those who cannot see it; `height` in inches."""

    title: str
    says: str
    draw: Callable[[Axes], None]
    height: float = 2.4
    margin: float = 0.68


@dataclass(frozen=True)
class Picture:
    """Panels with one legend and one caption; `name` is that of its files."""

    name: str
    title: str
    caption: str
    legend: tuple[Look, ...]
    panels: tuple[Panel, ...]
    columns: int


_LOOKS = {
    "manual/allreduce": (BLUE, "o", "-"),
    "manual/mpi": (GREEN, "s", "--"),
    "sgd/ddp": (ORANGE, "^", "-."),
    "sgd/mpi": (BLACK, "D", ":"),
}
MORE_LOOKS = ((SKY, "v", "-"), (GREY, "P", "--"), (SKY, "X", ":"), (GREY, "*", "-."))


def scopes_of(series: Iterable[Json]) -> list[str]:
    """The scopes in their order: within a node first."""
    return sorted(dict.fromkeys(one["scope"] for one in series), key=lambda scope: scope != "within a node")


def place_text(thing: Mapping[str, Any]) -> str:
    """Ranks and nodes in words."""
    num_nodes = thing["num_nodes"]
    return f"{ranks(thing['world_size'])} on {num_nodes} node{'s' * (num_nodes > 1)}"


def slug(text: str) -> str:
    """Letters, digits and dashes, for the name of a file or an anchor."""
    return "-".join(
        "".join(letter if letter.isascii() and letter.isalnum() else " " for letter in text.lower()).split()
    )


def batch_text(one: Json) -> str:
    """The batch that a series keeps, in words."""
    batch = one["global_batch_size"] if one["kind"] == "strong" else one["local_batch_size"]
    return f"{count(batch)} rows{' a rank' * (one['kind'] == 'weak')}"


def columns(num_panels: int) -> int:
    """How many panels stand side by side in a file."""
    return num_panels if num_panels <= 4 else 3


def combinations(series: Iterable[Json]) -> list[str]:
    """The combinations of some series, each once."""
    return list(dict.fromkeys(combination_of(one) for one in series))


def combination_looks(group: Json) -> dict[str, Look]:
    """One look for each combination of a group."""
    more = iter(MORE_LOOKS)
    return {
        name: Look(printable(name), *(_LOOKS.get(name) or next(more, MORE_LOOKS[-1])))
        for name in combinations(group["series"])
    }
