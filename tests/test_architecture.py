"""If these fail, the program can no longer be found in the instrument, and one thing has two names."""

import ast
import io
import re
import sys
import tokenize
from collections import Counter

import pytest

from .conftest import ROOT

SOURCE = ROOT / "src" / "torchreg"
FILES = sorted(SOURCE.rglob("*.py"))
MOST_LINES = {"core": 800, "src": 13_873, "templates": 460, "a file": 300}

# The "not" column of the design's table of words.
NOT_IN_NAMES = """
    told tell tells say says anew piece pieces averaging hand ordered runtime exploding contract beginning opened
    prepared problem problems evidence seal sealed claim claims claimed mend crowded way ways rung rungs ladder soonest
    cheapest place places rate rates made floor share shares cell cells add_over_ranks add_up how_far what_bounds
    left_out step_rows right_answer
"""
ALLOWED_NAMES = re.compile(
    r"\w*Runtime(Error|Warning)|(re)?place\w*|_?in_place|IN_PLACE|\w*learning_rates?\w*|LearningRates|\w*LEARNING_RATES?\w*|"
    r"\w*noise_floor\w*|floor|OrderedDict|ordered|share[xy]|cell_len|set_cell_size",
)
NOT_IN_TEXT = re.compile(
    r"\b(told|tells?|says?|anew|mend(s|ed)?|crowded|seal(s|ed)?|for a person|go(es|ing)? on|gone on|ladders?|rungs?|"
    r"soonest|cheapest|right answer|add(s|ed|ing)? up|step_rows|left out|pieces?|evidence|(?<!noise )floors?|"
    r"(?<!learning )(?<!learning-)(?<!sampling )rates?)\b",
    re.IGNORECASE,
)
ALLOWED_TEXT = re.compile(r"--\w[\w-]*|knows? the right answer|with the right answer known", re.IGNORECASE)


def parts_of(name):
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    words = [word for word in snake.split("_") if word]
    return {"_".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(i + 3, len(words)) + 1)}


def names_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.value.lineno


def texts_in(source):
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            yield token.string, token.start[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_each_thing_has_one_name_and_it_is_the_fields_own(file):
    source = file.read_text()
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for name, line in sorted(set(names_in(ast.parse(source))))
        if parts_of(name) & set(NOT_IN_NAMES.split()) and not ALLOWED_NAMES.fullmatch(name)
    ]
    for text, line in texts_in(source):
        found += [
            f"{file.relative_to(ROOT)}:{line + number}: {match[0]!r} in {part.strip()[:90]}"
            for number, part in enumerate(text.splitlines())
            for match in NOT_IN_TEXT.finditer(ALLOWED_TEXT.sub("", part))
        ]
    assert not found, "\n".join(found)


def test_the_program_is_small_enough_to_read():
    lines = {file: len(file.read_text().splitlines()) for file in FILES}
    templates = {file: len(file.read_text().splitlines()) for file in SOURCE.rglob("*.j2")}
    core = {file: count for file, count in lines.items() if file.parent == SOURCE / "core"}
    assert len([file for file in core if file.name != "__init__.py"]) <= 6
    assert sum(core.values()) <= MOST_LINES["core"]
    assert sum(lines.values()) <= MOST_LINES["src"]
    assert sum(templates.values()) <= MOST_LINES["templates"]
    assert not {str(file): count for file, count in (lines | templates).items() if count > MOST_LINES["a file"]}


def test_a_module_is_found_by_its_name():
    entries = [entry.name for entry in SOURCE.iterdir() if not entry.name.startswith("__")]
    assert len(entries) <= 14, entries
    names = Counter(file.name for file in FILES if not file.name.startswith("__"))
    assert {name for name, count in names.items() if count > 1} == set()


def test_the_core_is_the_program_and_needs_nothing_of_the_instrument(run, tmp_path):
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import torchreg.core.train\n"
        "new = set(sys.modules) - before\n"
        "print(*sorted(name for name in new if name.split('.')[0] not in sys.stdlib_module_names))"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    loaded = set(done.stdout.split())
    others = {name for name in loaded if not re.fullmatch(r"torchreg(\.core(\.\w+)?)?|(torch|numpy)(\..*)?", name)}
    assert "torchreg.core.train" in loaded
    assert not others


def test_the_front_door_loads_what_is_asked_for_alone(run, tmp_path):
    code = "import sys, torchreg; print(*sorted({'torch', 'pandas', 'numpy'} & set(sys.modules)))"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stdout.split() == []
    code = "import torchreg; print(callable(torchreg.train), callable(torchreg.plan), callable(torchreg.verify))"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stdout.split() == ["True"] * 3, done.stderr
