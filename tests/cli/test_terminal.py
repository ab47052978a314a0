"""If these fail, a finished run ends in a traceback for the sake of its last lines, or nobody can read them."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchreg.cli import main
from torchreg.console import show_table

QUICK = {
    "data": ["data", "show"],
    "plan": ["plan", "--no-standardize", "--base-learning-rate", "1e-7", "1e-1", "--world-sizes", "1,4,8,16"],
    "scale plan": ["scale", "plan", "--nodes", "1", "--ranks-per-node", "1", "2"],
}
COMMANDS = QUICK | {
    "verify": ["verify", "--quick"],
    "batch": [
        "sweep",
        "batch",
        "--update-order",
        "simultaneous",
        "--batch-sizes",
        "64,256",
        "--num-seeds",
        "2",
        "--epochs",
        "1",
    ],
    "lr-scaling": ["sweep", "lr-scaling", "--multipliers", "1,8", "--num-seeds", "2", "--max-steps", "5"],
}
STYLES = re.compile(r"\x1b\[[\d;]*m")


class TerminalOfText(io.StringIO):
    """A terminal whose text is kept."""

    def isatty(self):
        return True


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The lines of each command at several widths; None is no terminal."""
    lines = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("printed"))
        patch.setitem(sys.modules, "matplotlib", None)  # pictures take time
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        # What differs from one verification to the next: a time, and the name of the record.
        patch.setattr("torchreg.verification.file_checks.time", SimpleNamespace(perf_counter=lambda: 0.0))
        for name, command in COMMANDS.items():
            if "sweep" in command:
                assert main(command) == 0  # from now on all runs are finished
            for width in (None, 80, *((40, 200) if name in QUICK else ())):
                stream = TerminalOfText() if width else io.StringIO()
                patch.setenv("COLUMNS", str(width or 80))
                patch.setattr(sys, "stdout", stream)
                assert main(command) == 0
                text = re.sub(r"verify-[\d-]+\.json", "verify.json", STYLES.sub("", stream.getvalue()))
                lines[name, width] = text.splitlines()
    return lines


def words_of(lines):
    return {word for line in lines for word in line.split() if set(word) != {"─"}}


@pytest.mark.parametrize("name", COMMANDS)
def test_at_80_columns_no_word_is_broken_and_no_number_cut(name, printed):
    """T5."""
    lines = printed[name, 80]
    assert words_of(lines) == words_of(printed[name, None])
    assert all(len(line) <= 80 for line in lines if not line.startswith(("command ", "fingerprint ")))
    assert any("──" in line for line in lines), "a table is a table at 80 columns"


@pytest.mark.parametrize("name", QUICK)
def test_where_a_table_does_not_fit_it_becomes_a_list_and_nothing_is_cut(name, printed):
    """T5."""
    assert words_of(printed[name, 40]) == words_of(printed[name, None])


@pytest.mark.parametrize("name", QUICK)
def test_with_room_each_row_of_a_table_is_one_line(name, printed):
    """T5: at 80 columns too, which is also the width where there is no terminal."""
    wide, narrow, file = (
        [line for line in printed[name, width] if re.match(" {1,12}[^ ]", line)] for width in (200, 80, None)
    )
    assert len(wide) <= 2 + 4, "the names, a rule, and a line for each of at most four rows"
    assert file == narrow
    rows = wide[2:]
    assert [line.split() for line in narrow[-len(rows) :]] == [line.split() for line in rows]


MIXED = ["1 %", "0.0395 %", "12,345,678", "diverges", "standardised", "2 of 2 diverged", "1.4782008e+09", "", "× 0.5"]


@settings(max_examples=40)
@given(
    st.integers(20, 200),
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(*[st.lists(st.sampled_from(MIXED), min_size=n, max_size=n) for _ in range(3)])
    ),
)
def test_any_table_at_any_width_keeps_its_words(width, rows):
    """T5."""
    stream = TerminalOfText()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setenv("COLUMNS", str(width))
        patch.setenv("TERM", "xterm")
        show_table(rows[0], rows[1:])
    lines = STYLES.sub("", stream.getvalue()).splitlines()
    assert {word for row in rows[1:] for entry in row for word in entry.split()} <= words_of(lines)
    indent = max(map(len, rows[0])) + 2
    assert max(map(len, lines)) <= max(width, indent + max(map(len, words_of(lines))))


def in_pseudo_terminal(*command, **variables):
    """What a command writes to a terminal of its own."""
    main_end, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", **variables}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen([sys.executable, "-m", "torchreg", *command], stdout=end, stderr=end, env=environment):
        os.close(end)
        written = b""
        while True:
            try:
                block = os.read(main_end, 4096)
            except OSError:  # as Linux reports that the other end is closed
                break
            if not block:
                break
            written += block
    os.close(main_end)
    return written.decode()


TRAINING = ["train", "--device", "cpu", "--optimizer", "manual", "--max-steps", "40"]


def test_a_bar_on_a_terminal():
    """S9."""
    written = in_pseudo_terminal(*TRAINING)
    assert "fit          SalePrice" in written
    assert "\x1b[2K" in written
    assert "step 40/40  loss" not in written


@pytest.mark.parametrize(
    "variables",
    [
        {"NO_COLOR": "1"},
        {"TERM": "dumb"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"},
    ],
    ids=["no colours", "a dumb terminal", "a launcher's pseudo-terminal"],
)
def test_lines_on_a_terminal_that_cannot_show_a_bar_or_is_a_log(variables, monkeypatch):
    """S9: Open MPI 5 gives its ranks a terminal, and a log got 77 frames of a bar."""
    stream = TerminalOfText()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    assert main(TRAINING) == 0
    written = stream.getvalue()
    assert "fit          SalePrice" in written
    assert "step 40/40  loss" in written
    assert "\x1b" not in written


def test_every_command_prints_in_every_encoding(run, tmp_path):
    """T1."""
    commands = [*QUICK.values(), ["data", "show", "--data", "größe·\udcff.csv"]]
    (tmp_path / "all.py").write_text(
        "import sys\nfrom torchreg.cli import command\n"
        f"for words in {commands!r}:\n    sys.argv = ['torchreg', *words]\n    print('exit', command())",
        encoding="utf-8",
    )
    for variables in (
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ):
        run("bash", "-c", f"{sys.executable} all.py >out 2>err", cwd=tmp_path, **variables)
        out, err = ((tmp_path / name).read_text(encoding="latin-1") for name in ("out", "err"))
        assert out.count("exit 0") == len(commands) - 1, err
        assert out.endswith("exit 2\n")
        assert len(err.splitlines()) == 1, "no traceback"
        assert "closed form  SalePrice = 87.688145 GrLivArea" in out
        if variables.get("PYTHONIOENCODING") == "ascii":
            assert "mean squared error 1.47778e+09, R? 0.588" in out
            assert re.search(r"\|\s*GrLivArea", out), "tables in the signs of ASCII"


def test_the_progress_of_a_run_prints_in_ascii(run, tmp_path):
    """T1."""
    done = run("torchreg", "train", "--optimizer", "manual", "--max-steps", "2", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 rank on 1 node ? launcher none" in done.stdout


def test_closed_output_loses_output_and_not_the_run(run, tmp_path):
    """T1."""
    done = run("bash", "-c", "torchreg data make --output houses.csv >&-; echo $?", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert (tmp_path / "houses.csv").is_file()


NASTY = "\x1b]0;pwned\x07\x1b[31m $\\frac{$ _x_\n\u202e:cat: [red]"


def test_names_of_columns_do_nothing_to_the_terminal(capsys):
    """W4."""
    pd.DataFrame({NASTY: [1.0, 2, 3, 4], "y": [2.0, 3, 5, 9]}).to_csv("nasty.csv", index=False)
    options = ["--data", "nasty.csv", "--features", NASTY]
    escaped = "\\x1b]0;pwned\\x07\\x1b[31m $\\frac{$ _x_\\n\\u202e:cat: [red]"
    assert main(["data", "show", *options, "--target", "y"]) == 0
    assert main(["train", *options, "--target", "y", "--global-batch-size", "2", "--max-steps", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count(escaped) == 3  # closed form; fit, closed form
    assert all(word in out.partition("closed form")[0] for word in escaped.split())  # the table, in several lines
    assert main(["data", "show", *options, "--target", NASTY + "?"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert all(letter == "\n" or letter.isprintable() for letter in out + err)


@pytest.mark.parametrize("factor", [1e-30, 1e-7, 2e-6, 1e-3, 1.0, 1e7, 1e150])
def test_results_keep_their_digits_at_any_magnitude(factor, capsys):
    """D6: a target of 1e-7 was printed as 0.000000 GrLivArea + 0.000000."""
    x = np.array([1.0, 2, 3, 4, 5])
    pd.DataFrame({"GrLivArea": x, "SalePrice": factor * np.array([2.1, 2.9, 5.2, 6.8, 9.9])}).to_csv("d.csv")
    options = ["train", "--data", "d.csv", "--sampling", "full", "--max-steps", "30"]
    assert main([*options, "--name", "shown"]) == 0
    out = capsys.readouterr().out
    assert main([*options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = re.search(r"fit +SalePrice = (\S+) GrLivArea ([+-] \S+)\n.*\nloss +(\S+) .*\noptimum +(\S+)\n", out)
    expected = [*result["weight"], result["bias"], result["loss"], result["closed_form_loss"]]
    assert [float(text.replace(" ", "")) for text in found.groups()] == pytest.approx(expected, rel=1e-6)
    shown = re.search(r"closed form  SalePrice = (\S+) GrL", out)
    assert float(shown[1]) == pytest.approx(result["closed_form_weight"][0], rel=1e-6)
    assert all(len(text) <= 25 for text in found.groups())


def test_a_sweep_keeps_its_digits_at_any_magnitude(capsys):
    """D6: also in its JSON, of which pandas keeps ten decimals."""
    rng = np.random.default_rng(0)
    x = rng.normal(2, 1, 40)
    pd.DataFrame({"a": x, "b": 1e-9 * (x + rng.normal(size=40))}).to_csv("d.csv")
    options = ["sweep", "batch", "--data", "d.csv", "--features", "a", "--target", "b", "--batch-sizes", "8"]
    options += [
        "--update-order",
        "simultaneous",
        "--num-seeds",
        "1",
        "--epochs",
        "3",
        "--standardize",
        "--base-learning-rate",
        "0.1",
        "0.1",
    ]
    assert main([*options, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    (trial,) = pd.read_csv("runs/sweep-batch/trials.csv").to_dict("records")
    assert (row["weight_a"], row["bias"], row["loss"]) == (trial["weight_a"], trial["bias"], trial["loss"])
    assert main(options) == 0
    line = capsys.readouterr().out.splitlines()[-5].split()
    assert [float(line[5]), float(line[6])] == pytest.approx([trial["weight_a"], trial["bias"]], rel=1e-4)


def test_the_line_of_many_features_is_cut_short(capsys):
    """D6: thousands of terms would hide the loss."""
    assert main(["data", "show", "--num-features", "300", "--num-rows", "400"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"closed form  .* GrLivArea .* Feature8 \+ … \(292 more\) [+-] [\d.]+, mean squared error \d", out)
    assert "and 276 features more" in out
    assert max(map(len, out.splitlines())) < 400
