"""Print the README's table of options, from `TrainConfig` and its comments."""

from __future__ import annotations

from dataclasses import fields

from torchreg.cli.options import comments as docs
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


def _shown(value: object) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "`" + ",".join(f"{number:g}" for number in value) + "`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    print(table())
