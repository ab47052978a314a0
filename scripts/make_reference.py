"""Make the generated parts of the documentation from the code, when the site is built.

mkdocs.yml names this file as a hook: a line `<!-- generated: NAME -->` of a page becomes what `GENERATED[NAME]` makes.

    python scripts/make_reference.py NAME     # prints one
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

from torchreg.cli import COMMANDS
from torchreg.cli import main as torchreg
from torchreg.cli.options import comments
from torchreg.planning.plan import Plan
from torchreg.runs.config import TrainConfig
from torchreg.runs.forecast import Forecast
from torchreg.runs.recipes import RECIPES
from torchreg.scaling.campaign import Campaign

ROOT = Path(__file__).parents[1]
PLAN_EXAMPLE = "torchreg plan --no-standardize --lr 1e-7,1e-1 --sampling random --target-excess 0.02"
_SHOWN_PARTS = ("result", "derived", "run_signature", "sessions")


def options() -> str:
    """A Markdown table for each part of the configuration: option, default, the lesson's value where it differs."""
    default, lesson = RECIPES["default"].options(), RECIPES["lesson"].options()
    lines = []
    for part in fields(RECIPES["default"]):
        lines += [f"\n## {part.name.capitalize()}\n", "| option | default | lesson | meaning |", "|---|---|---|---|"]
        for name, doc in comments(type(getattr(RECIPES["default"], part.name))).items():
            other = "" if lesson[name] == default[name] else _shown(lesson[name])
            lines.append(f"| {_flag(name)} | {_shown(default[name])} | {other} | {doc} |")
    return "\n".join(lines)


def campaign() -> str:
    """The fields of a campaign: name, default, sentence."""
    default, sentences = Campaign(), comments(Campaign)
    rows = [f"| `{name}` | {_shown(getattr(default, name))} | {doc} |" for name, doc in sentences.items()]
    return "\n".join(["| field | default | meaning |", "|---|---|---|", *rows])


def _flag(name: str) -> str:
    return f"`--{name.replace('_', '-')}`"


def _shown(value: object) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "`" + ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value) + "`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def commands() -> str:
    """The help of every command, as it is printed on 80 columns."""
    return "\n".join(f"## {title}\n\n```text\n{text}\n```\n" for title, text in _helps(()))


def _helps(words: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    text = _output(*words, "--help").strip("\n")
    yield " ".join(("torchreg", *words)), text or f"torchreg {words[0]}: {COMMANDS[words[0]]}"
    named = re.search(r"\{([a-z,-]+)\} \.\.\.", text.partition("\n\n")[0])
    more = {(): list(COMMANDS), ("report",): ["compare"]}.get(words) or (named[1].split(",") if named else [])
    for name in more:
        yield from _helps((*words, name))


def _output(*arguments: str) -> str:
    """What `torchreg` prints on a terminal of 80 columns."""
    printed, errors, columns = io.StringIO(), io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
            torchreg(arguments)
    finally:
        del os.environ["COLUMNS"]
        os.environ |= {} if columns is None else {"COLUMNS": columns}
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())


def output_of(command: str) -> str:
    """What a `torchreg` command prints."""
    return f"```text\n{_output(*shlex.split(command)[1:])}```"


def schema(*kinds: Any) -> str:
    """The JSON Schema of some dataclasses or structs, collapsed."""
    import msgspec

    _, components = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    text = json.dumps({"$defs": components}, indent=2, ensure_ascii=False)
    title = " and ".join(f"`{kind.__name__}`" for kind in kinds)
    return f'??? note "JSON Schema of {title}"\n\n' + _indented(f"```json\n{text}\n```")


def tables(*kinds: Any) -> str:
    """One table for each struct that these consist of: field, type, whether it may be left out."""
    import msgspec

    _, components = msgspec.json.schema_components(kinds, ref_template="{name}")
    lines = []
    for name, content in components.items():
        lines += [f"\n**{name.strip('_')}**", "", content.get("description", "").strip(), ""]
        lines += ["| field | type | |", "|---|---|---|"]
        for field, kind in content["properties"].items():
            optional = "" if field in content.get("required", ()) else "optional"
            lines.append(f"| `{field}` | {_type(kind)} | {optional} |")
    return "\n".join(lines)


def _type(kind: Mapping[str, Any]) -> str:
    """A JSON Schema in a few words."""
    if "anyOf" in kind:
        return " or ".join(_type(one) for one in kind["anyOf"])
    if "$ref" in kind:
        return f"{kind['$ref'].strip('_')}"
    if "enum" in kind:
        return " or ".join(f"`{json.dumps(one)}`" for one in kind["enum"])
    if kind.get("type") == "array":
        return f"list of {_type(kind['items'])}" if "items" in kind else "list"
    if kind.get("type") == "object":
        return f"object of {_type(kind.get('additionalProperties', {}))}"
    return f"{kind.get('format') or kind.get('type', 'any')}"


def record_example() -> str:
    """Parts of the record of a short run."""
    record, _ = _example_run()
    return _json({name: record[name] for name in _SHOWN_PARTS})


def metrics_example() -> str:
    """The first lines of metrics of a short run."""
    _, metrics = _example_run()
    return "```json\n" + "".join(metrics.splitlines(keepends=True)[:2]) + "```"


@cache
def _example_run() -> tuple[dict[str, Any], str]:
    """The record and the metrics of a short run."""
    from torchreg.runs.run import train

    with tempfile.TemporaryDirectory() as folder:
        run = TrainConfig.of(name="example", runs_dir=folder, max_steps=5, device="cpu", log_full_loss=True)
        train(run.replace(optimizer="manual"))  # torch.optim imports for seconds
        files = (Path(folder, "example", name) for name in ("record.json", "metrics.jsonl"))
        record, metrics = (file.read_text(encoding="utf-8").replace(folder, "runs") for file in files)
    return json.loads(record), metrics


def launch_kinds() -> tuple[type, ...]:
    """What a launch.json holds."""
    from torchreg.scaling.launch_record import FailedLaunch, OkLaunch

    return OkLaunch, FailedLaunch


def result_kinds() -> tuple[type, ...]:
    """What a record.json holds, as far as it has a class."""
    from torchreg.runs.result import Result

    return Result, Forecast


def included(path: str) -> str:
    """A file of the repository as a page: its links lead into the repository."""
    text = (ROOT / path).read_text(encoding="utf-8")
    base = Path(path).parent

    def absolute(match: re.Match[str]) -> str:
        target = os.path.normpath(base / match[1])
        return f"]({repository()}/blob/main/{target}{match[2]})"

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", absolute, text)


def repository() -> str:
    """The address of the repository, which pyproject.toml holds."""
    (found,) = re.findall(r'^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return str(found)


def _json(content: Any) -> str:
    return f"```json\n{json.dumps(content, indent=2)}\n```"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


GENERATED: dict[str, Callable[[], str]] = {
    "options": options,
    "campaign": campaign,
    "commands": commands,
    "plan-example": partial(output_of, PLAN_EXAMPLE),
    "config-schema": lambda: schema(TrainConfig),
    "plan-schema": lambda: schema(Plan),
    "record-schema": lambda: schema(*result_kinds()),
    "record-example": record_example,
    "metrics-example": metrics_example,
    "launch-tables": lambda: tables(*launch_kinds()),
    "launch-schema": lambda: schema(*launch_kinds()),
    "jobs": partial(included, "jobs/README.md"),
    "contributing": partial(included, "CONTRIBUTING.md"),
    "changelog": partial(included, "CHANGELOG.md"),
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return re.sub(r"<!-- generated: ([\w-]+) -->", lambda match: GENERATED[match[1]](), markdown)


if __name__ == "__main__":
    print(GENERATED[sys.argv[1]]())
