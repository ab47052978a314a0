"""Print the README's table of options, from `TrainConfig` and its docstrings."""

from __future__ import annotations

from dataclasses import fields

from torchreg.runs.config import RECIPES, field_docs


def table() -> str:
    """A Markdown table: option, the default's value, the lesson's where it differs, what it does."""
    docs = field_docs()
    lines = ["| option | default | lesson | |", "|---|---|---|---|"]
    for field in fields(RECIPES["default"]):
        option = "--" + field.name.replace("_", "-")
        values = [_shown(getattr(RECIPES[recipe], field.name)) for recipe in ("default", "lesson")]
        if values[1] == values[0]:
            values[1] = ""
        lines.append(f"| `{option}` | {values[0]} | {values[1]} | {docs[field.name]} |")
    return "\n".join(lines)


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
