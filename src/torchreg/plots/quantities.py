"""Human-readable quantities: three digits, in the unit that suits them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torchreg.console import number

_UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"), (1e-12, "ps")),
    "B": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "B/s": ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1.0, "B/s")),
    "%": ((0.01, "%"),),
    "k": ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")),
    "samples/s": ((1e9, "G samples/s"), (1e6, "M samples/s"), (1e3, "k samples/s"), (1.0, "samples/s")),
}


def in_unit(values: Sequence[float], unit: str) -> str:
    """One value, or the two ends of an interval, in the multiple of `unit` that suits the largest of them.

    `unit` is s, s/anything, B, B/s, samples/s, % (of fractions), k (thousands, millions or billions of a unit that is
    named elsewhere), any other word as it is, or "" for a bare number.
    """
    largest = max(map(abs, values))
    base, thing = ("s", unit[1:]) if unit.startswith("s/") else (unit, "")
    multiples = _UNITS.get(base, ((1.0, base),))
    # half a unit of the third digit: 0.9999 ms is written 1 ms, not 1000 µs
    scale, name = next((pair for pair in multiples if largest >= 0.9995 * pair[0]), multiples[-1])
    return f"{' – '.join(number(value / scale) for value in values)} {name}{thing}".rstrip()


def count(value: float) -> str:
    """All digits of a whole number; any other number as in `number`."""
    return f"{value:,.0f}" if float(value).is_integer() else number(value)


def counted(number: int, thing: str) -> str:
    """1 launch, 4 launches."""
    return f"{number} {thing}" + ("" if number == 1 else "es" if thing.endswith("ch") else "s")


features, ranks, nodes = (partial(counted, thing=thing) for thing in ("feature", "rank", "node"))
