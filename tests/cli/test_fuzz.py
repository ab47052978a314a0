"""If these fail, a strange table, option or file ends in a traceback, which does not help a user, or never ends.

Whatever comes in: exit code 0, 2 or 3 (done, bad input, diverged), and with 2 one line with the error.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchreg.cli import main

NUMBERS = st.one_of(
    st.integers(-5, 5).map(str),
    st.floats(width=32, allow_nan=False).map(repr),
    st.sampled_from(
        ["1e308", "-1e300", "5e-324", "1e-200", "1e16", "1e999", "-0", "0x1f", "1_000", "1,5", "١٢", "1e", " 7"]
    ),
)
ENTRIES = st.one_of(
    NUMBERS, NUMBERS, st.sampled_from(["", "nan", "inf", "NA", "large", '"', "True", "2020-01-01", "\0", "é"])
)
NAMES = st.sampled_from(["GrLivArea", "SalePrice", "SalePrice ", "", "Other"])


@pytest.fixture(autouse=True)
def leave_by_system_exit(monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)  # initialisation leaves at once, without waiting for other ranks


def check(*arguments):
    """Run the command, check its exit code and what it printed on stderr; the exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as left:
            code = left.code
    message = err.getvalue()
    assert code in (0, 2, 3), message
    if code == 2:
        *before, last = message.splitlines()
        assert last.startswith("torchreg: error: "), message
        assert len(last) > len("torchreg: error: "), message
        assert not before or "--json" in arguments, message  # which reports its progress on stderr
        assert not any("error" in line or "Traceback" in line for line in before), message
    else:
        assert "error" not in message
        assert "Traceback" not in message
    return code


def as_csv(header, rows):
    return "\n".join([",".join(header), *(",".join(row) for row in rows)]).encode()


TABLES = st.builds(
    as_csv,
    st.one_of(st.just(["GrLivArea", "SalePrice"]), st.lists(NAMES, max_size=4)),
    st.lists(st.lists(ENTRIES, min_size=2, max_size=2), max_size=6)
    | st.lists(st.lists(ENTRIES, max_size=4), max_size=6),
)
NUMERIC_TABLES = st.builds(
    as_csv,
    st.just(["GrLivArea", "SalePrice"]),
    st.lists(st.lists(NUMBERS, min_size=2, max_size=2), min_size=2, max_size=6),
)


@settings(max_examples=30)
@given(
    content=st.one_of(TABLES, NUMERIC_TABLES, NUMERIC_TABLES, st.binary(max_size=80)),
    options=st.sampled_from(
        [[], ["--drop-missing"], ["--no-standardize"], ["--optimizer", "manual", "--target-excess", "0.1"]]
    ),
)
def test_any_table_is_trained_on_or_refused_in_one_line(content, options):
    Path("fuzz.csv").write_bytes(content)
    check("train", "--data", "fuzz.csv", "--sampling", "full", "--max-steps", "3", *options)


ANY = st.one_of(
    st.integers(-3, 40).map(str),
    st.sampled_from(
        ["1e3", "0.5", "-0.1", "0", "nan", "inf", "-inf", "1e999", "1e-300", str(2**70), "", "None", "é", "-", "--"]
    ),
)
OPTIONS = {
    **{
        f"--{name}": ANY
        for name in (
            "global-batch-size", "local-batch-size", "micro-batch-size", "seed", "data-seed",
            "decay-to", "decay-factor", "decay-every", "initial-weight", "initial-bias", "target-excess",
            "timeout-s", "checkpoint-every", "checkpoint-every-s", "keep-checkpoints", "log-every", "epochs",
        )
    },
    "--warmup-steps": st.integers(-1, 40).map(str) | st.just(str(10**12)),
    "--reference-batch-size": st.integers(-1, 500).map(str),
    "--num-rows": st.integers(-1, 200).map(str),
    "--num-features": st.integers(-1, 5).map(str),
    **{
        f"--{name}": st.sampled_from([*choices, "all"])
        for name, choices in {
            "optimizer": ["sgd", "manual"],
            "sync": ["auto", "ddp", "allreduce"],
            "reduction": ["fast", "reproducible"],
            "update-order": ["simultaneous", "sequential"],
            "sampling": ["shuffle", "random", "full"],
            "lr-scaling": ["linear", "sqrt", "none"],
            "decay": ["constant", "linear", "cosine", "step"],
            "on-unstable": ["warn", "refuse", "cap"],
            "dtype": ["auto", "float32", "float64"],
            "recipe": ["default", "lesson", "homework"],
            "resume": ["never", "auto"],
            "name": ["a", "b", ".", "a/b", "", "é", "a" * 300, "\0"],
        }.items()
    },
    "--overwrite": st.none(),
    "--log-full-loss": st.none(),
    "--no-standardize": st.none(),
    "--json": st.none(),
    "--no-such-option": ANY,
}  # fmt: skip
COMMAND_LINES = st.lists(
    st.sampled_from(sorted(OPTIONS)).flatmap(
        lambda name: OPTIONS[name].map(lambda value: [name] if value is None else [name, value])
    ),
    max_size=6,
)


@settings(max_examples=30)
@given(COMMAND_LINES)
def test_any_command_line_is_run_or_refused_in_one_line(given_options):
    shutil.rmtree("runs", ignore_errors=True)
    check("train", *(part for option in given_options for part in option), "--max-steps", "3")


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run that was stopped after 20 of its 40 steps, as its files."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_END_TIME", "1")  # in the past: it stops as soon as it can
        patch.chdir(folder)
        assert main(["train", *RESUMED, "--checkpoint-every", "5"]) == 75
    run = folder / "runs/run"
    assert sorted(path.name for path in run.rglob("*.pt")) == ["step-0000000005.pt", "step-0000000010.pt"]
    return run


RESUMED = ["--name", "run", "--reduction", "reproducible", "--max-steps", "40", "--log-every", "10"]
GARBAGE = st.one_of(
    st.binary(max_size=60),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["result", "run_signature", "loss", "step", "a"]), inner, max_size=4)
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)
FILES = ("record.json", "config.json", "metrics.jsonl.part", "metrics.jsonl", "checkpoints/step-0000000010.pt")


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(FILES), GARBAGE, min_size=1, max_size=3))
@example({"record.json": b"[" * 100_000})
@example({"record.json": b'{"run_signature": {}, "result": {"loss": 1}}'})
@example({"checkpoints/step-0000000010.pt": b"", "metrics.jsonl.part": b""})
@example(dict.fromkeys(FILES, b"{}\n"))
def test_any_garbage_in_a_runs_folder_is_resumed_from_or_refused_in_one_line(stopped_run, garbage):
    shutil.rmtree("runs", ignore_errors=True)
    shutil.copytree(stopped_run, "runs/run")
    for file, content in garbage.items():
        Path("runs/run", file).write_bytes(content)
    if check("train", *RESUMED, "--resume", "auto") == 0:
        lines = [json.loads(line) for line in Path("runs/run/metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [9, 19, 29, 39]
