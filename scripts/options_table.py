"""Print the README's table of options, from `TrainConfig` and its docstrings."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields

from torchreg.runs.config import RECIPES, TrainConfig


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


def field_docs() -> dict[str, str]:
    """The sentence under each field of `TrainConfig`."""
    (definition,) = ast.parse(inspect.getsource(TrainConfig)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


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
