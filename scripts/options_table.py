"""Print the README's table of options, from `TrainConfig` and its comments."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

from torchreg.runs.recipes import RECIPES


def table() -> str:
    """A Markdown table: option, the default's value, the lesson's where it differs, what it does."""
    default, lesson = RECIPES["default"].options(), RECIPES["lesson"].options()
    lines = ["| option | default | lesson | |", "|---|---|---|---|"]
    for part in fields(RECIPES["default"]):
        for name, doc in docs(type(getattr(RECIPES["default"], part.name))).items():
            option = "--" + name.replace("_", "-")
            other = "" if lesson[name] == default[name] else _shown(lesson[name])
            lines.append(f"| `{option}` | {_shown(default[name])} | {other} | {doc} |")
    return "\n".join(lines)


def docs(config: type) -> dict[str, str]:
    """The comment of each field of a dataclass: at the end of its line, or in the lines above it."""
    found, above = {}, ""
    for line in inspect.getsource(config).splitlines():
        code, _, comment = line.partition("# ")
        if field := re.match(r"    (\w+): .* = ", code):
            found[field[1]] = comment or above.strip()
        above = f"{above} {comment}" if not code.strip() else ""
    return found


def _shown(value: object) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "`" + " ".join(f"{number:g}" for number in value) + "`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    print(table())
