"""Rules for values from a stranger's JSON: what belongs in a field, and what is wrong with what is there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

_LONGEST_TEXT = 4_000  # characters; a reason or a version is shorter
_LARGEST_NUMBER = 1e18  # beyond any count, byte or second that a campaign can have
_SHOWN = 40  # characters of a wrong value in a message

Rule = Callable[[Any], str | None]
"""Takes a value; None where it is right, otherwise what belongs there."""


def number(*, above: float = -math.inf, at_least: float = -math.inf, at_most: float = _LARGEST_NUMBER) -> Rule:
    """A finite number between bounds."""
    belongs = "a finite number"
    if above > -math.inf:
        belongs = f"a number above {above:g}"
    elif at_least > -math.inf:
        belongs = f"a number of at least {at_least:g}"
    if at_most < _LARGEST_NUMBER:
        belongs += f" and at most {at_most:g}"

    def rule(value: Any) -> str | None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (
            None
            if is_number and -_LARGEST_NUMBER <= value <= at_most and value > above and value >= at_least
            else belongs
        )

    return rule


def whole_number(at_least: int = 1) -> Rule:
    """A whole number from a bound on."""

    def rule(value: Any) -> str | None:
        is_count = isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= _LARGEST_NUMBER
        return None if is_count else f"a whole number of at least {at_least}"

    return rule


def text(pattern: str = r".*") -> Rule:
    """A text, by default any."""
    form = re.compile(pattern, re.DOTALL)

    def rule(value: Any) -> str | None:
        if not isinstance(value, str):
            return "a text"
        if len(value) > _LONGEST_TEXT:
            return f"a text of at most {_LONGEST_TEXT} characters"
        return None if form.fullmatch(value) else f"a text like {pattern}"

    return rule


def iso_time(value: Any) -> str | None:
    """A time in ISO 8601."""
    try:
        datetime.fromisoformat(value.replace("Z", "+00:00"))
    except (AttributeError, ValueError):
        return "a time in ISO 8601"
    return None


def flag(value: Any) -> str | None:
    """True or false."""
    return None if isinstance(value, bool) else "true or false"


def any_whole_number(value: Any) -> str | None:
    """A whole number of 64 bits."""
    return whole_number(-(2**63))(value) and "a whole number"


def zero(value: Any) -> str | None:
    """Zero."""
    return None if any_whole_number(value) is None and value == 0 else "0, as of a launch that went well,"


def one_of(*words: str) -> Rule:
    """One of some words."""
    return lambda value: None if value in words else f"one of {', '.join(words)}"


def texts(value: Any) -> str | None:
    """A mapping of names to texts, as of libraries to versions."""
    right = isinstance(value, dict) and all(text()(key) is None and text()(item) is None for key, item in value.items())
    return None if right else "names with a text each"


def list_of_texts(value: Any) -> str | None:
    """A list of texts."""
    right = isinstance(value, list) and all(text()(item) is None for item in value)
    return None if right else "a list of texts"


def texts_or_null(value: Any) -> str | None:
    """A mapping of names to texts or null, as of what a machine has to its version."""
    right = isinstance(value, dict) and texts({key: item for key, item in value.items() if item is not None}) is None
    return None if right else "names with a text or null each"


def or_null(rule: Rule) -> Rule:
    """What a rule wants, or null."""
    return lambda value: None if value is None else rule(value)


@dataclass(frozen=True)
class Each:
    """A list, each item of which has these fields."""

    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Optional:
    """A field that need not be there: records of before it was thought of have none."""

    rule: Rule


@dataclass(frozen=True)
class ObjectOrNull:
    """Null, or one object with these fields."""

    fields: Mapping[str, Any]


def problems_of(content: Any, fields: Any, name: str) -> Iterator[str]:
    """What is wrong with an object's fields, told by name."""
    if isinstance(fields, ObjectOrNull):
        if content is not None:
            yield from problems_of(content, fields.fields, name)
    elif isinstance(fields, Each):
        if isinstance(content, list):
            for place, item in enumerate(content):
                yield from problems_of(item, fields.fields, f"{name}[{place}]")
        else:
            yield f"{name} is {shown(content)}, where a list belongs"
    elif not isinstance(fields, dict):
        if belongs := fields(content):
            yield f"{name} is {shown(content)}, where {belongs} belongs"
    elif isinstance(content, dict):
        for field, rule in fields.items():
            full = f"{name}.{field}" if name else field
            if isinstance(rule, Optional):
                yield from problems_of(content.get(field), or_null(rule.rule), full)
            elif field in content:
                yield from problems_of(content[field], rule, full)
            else:
                yield f"partial: {full} is missing"
    else:
        yield f"{name} is {shown(content)}, where an object belongs"


def shown(value: Any) -> str:
    """A wrong value, short enough for a message."""
    try:
        told = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists nested without end
        told = f"a {type(value).__name__} too large to show"
    return told if len(told) <= _SHOWN else f"{told[:_SHOWN]}…"
