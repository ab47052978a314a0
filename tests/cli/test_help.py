"""If these fail, a user cannot find an option, types an example that does not work, or writes a list in vain."""

import re
import shlex
import sys

import pandas as pd
import pytest

from torchreg.cli import COMMANDS, main
from torchreg.cli.options import EXAMPLES
from torchreg.console import number, percent

STYLES = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture(scope="module")
def shown(run, tmp_path_factory):
    """The help of each command at 80 columns, from one process without torch."""
    code = (
        "import contextlib, sys\nfrom torchreg.cli import main\n"
        f"for command in {['', *EXAMPLES, 'sweep', 'scale']!r}:\n"
        "    print('\\f' + command)\n"
        "    with contextlib.suppress(SystemExit):\n        main([*command.split(), '--help'])\n"
        "assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path_factory.mktemp("help"), COLUMNS="80")
    assert done.returncode == 0, done.stderr
    texts = [text.partition("\n") for text in STYLES.sub("", done.stdout).split("\f")[1:]]
    return {name: text for name, _, text in texts}


def test_the_first_help_names_every_command(shown):
    assert all(re.search(rf"^  {name} +\w", shown[""], re.MULTILINE) for name in COMMANDS)
    assert {command.split()[0] for command in EXAMPLES} | {"completion"} == set(COMMANDS)


@pytest.mark.parametrize("command", ["", *EXAMPLES, "sweep", "scale"])
def test_help_fits_80_columns_and_has_an_example(command, shown):
    lines = shown[command].splitlines()
    assert max(len(line) for line in lines if not line.startswith("usage:")) <= 80
    if command in EXAMPLES:
        assert f"Example: torchreg {command} {EXAMPLES[command]}" in lines, "a line that can be copied"


@pytest.mark.parametrize("command", EXAMPLES)
def test_each_option_shows_one_default(command, shown):
    boxes = re.sub(r"[│╭╰╮╯─\s]+", " ", shown[command])
    options = re.split(r" (?=--[a-z])", boxes.partition(" options ")[2])
    assert all(len(re.findall(r"\(default:|\(required|Default:", option)) <= 1 for option in options)
    assert "Default:" not in boxes
    assert "None" not in boxes


def test_options_are_grouped_by_topic(shown):
    groups = re.findall(r"╭─ (.*?) ─", shown["train"])
    assert groups == ["options", "data options", "batch options", "optimizer options", "run options"]
    boxes = re.sub(r"[│\s]+", " ", shown["train"])
    assert "The update, its learning rates, and the initial parameters." in boxes
    assert "--lr FLOAT,FLOAT, --base-learning-rate FLOAT,FLOAT" in boxes


def test_a_recipes_values_are_the_defaults_that_its_help_shows(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "lesson", "--help"])
    boxes = re.sub(r"[│\s]+", " ", STYLES.sub("", capsys.readouterr().out))
    assert "(default: 1e-07,0.1)" in boxes
    assert "0.05 for the bias" not in boxes


SLOW = {
    "scale run": "--ranks-per-node 1 --num-features 1 --combinations manual/mpi --window-s 0.05",
    "sweep batch": "--epochs 1",
    "sweep lr-scaling": "--max-steps 5",
}
"""Options that make an example quick."""


def test_the_examples_work_one_after_the_other(capsys):
    for command, options in EXAMPLES.items():
        assert main([*command.split(), *shlex.split(f"{options} {SLOW.get(command, '')}")]) == 0, command
        assert capsys.readouterr().err == ""


# Lists


@pytest.mark.parametrize(
    "written",
    [["1,2,4"], ["1", "2", "4"], ["1,2", "4"], ["1,", "2,4"], ["1, 2, 4"]],
)
def test_a_list_is_written_with_commas_and_understood_with_spaces(written, capsys):
    assert main(["plan", "--world-sizes", *written]) == 0
    assert main(["scale", "plan", "--ranks-per-node", *written, "--num-features", *written]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if re.match(r" +\d", line)] == ["1", "2", "4", "1", "1", "1"]
    assert "measured     1, 2, 4 features" in out


def test_lr_is_understood_as_a_pair_or_as_one_for_both(capsys):
    for written in (["--lr", "0.1,0.2"], ["--lr=0.1,0.2"], ["--lr", "0.1", "0.2"], ["--base-learning-rate", "0.1,0.2"]):
        assert main(["plan", *written, "--world-sizes", "1"]) == 0
        assert re.search(r"64 +0\.1 +0\.2 ", capsys.readouterr().out)
    assert main(["plan", "--lr", "0.2", "--world-sizes", "1"]) == 0
    assert re.search(r"64 +0\.2 +0\.2 ", capsys.readouterr().out)
    assert main(["scale", "plan", "--lr", "0.001"]) == 0


def test_a_column_with_a_comma_in_its_name_stands_in_quotes(capsys):
    table = {"a,b": [1.0, 2, 4, 3], "c": [1.0, 0, 1, 0], 'd"': [3.0, 1, 1, 2], "y": [2.0, 3, 5, 9]}
    pd.DataFrame(table).to_csv("t.csv", index=False)
    options = ["data", "show", "--data", "t.csv", "--target", "y", "--features"]
    for written in (['"a,b",c,d"'], ['"a,b"', "c", 'd"']):
        assert main([*options, *written]) == 0
        assert re.findall(r"^ *(\S+) +[\d.]+ +[\d.]+ +", capsys.readouterr().out, re.MULTILINE) == [*table]
    assert main([*options, "a,b"]) == 2
    assert "'a'" in capsys.readouterr().err


BAD_LISTS = {
    "no number": (["plan", "--world-sizes", "1,two"], "two"),
    "zero": (
        ["plan", "--world-sizes", "0,1"],
        "--world-sizes: the list is '0,1': give whole numbers of at least 1, separated by commas",
    ),
    "none": (["plan", "--world-sizes"], "--world-sizes: the list is ''"),
    "a fraction": (["sweep", "batch", "--batch-sizes", "64,1.5"], "1.5"),
    "below one": (["sweep", "lr-scaling", "--multipliers=-2"], "--multipliers: the list is '-2'"),
    "three rates": (
        ["train", "--lr", "1,2,3"],
        "--base-learning-rate: the list is '1,2,3': give 2 numbers, separated by commas",
    ),
    "no such pair": (["scale", "plan", "--combinations", "manual/ddp"], "manual/ddp"),
    "no variable": (["scale", "command", "--env", "A=1,B"], "env has 'B': give NAME=VALUE"),
    "no run": (["runs", "nowhere"], "run is 'nowhere', which is no run and no folder of runs"),
    "nothing to draw": (["plot", "nowhere"], "run is 'nowhere', which has no record.json"),
    "nothing named": (["plot"], "run"),
    "a shell": (["completion", "fish"], "no command"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_input_is_one_clear_line(case, capsys):
    arguments, part = BAD_LISTS[case]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert part in err


# Completion


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pl"], "plot plan"),
        (["train", "--glob"], "--global-batch-size"),
        (["train", "--lr", "0.1", "--plo"], "--plot"),
        (["scale", "run", "--ranks"], "--ranks-per-node"),
        (["sweep", "batch", "--num-s"], "--num-seeds"),
        (["report", "compare", "a", "b", "--thr"], "--threshold"),
        (["report", "--thr"], ""),
    ],
)
@pytest.mark.parametrize("shell", ["bash"])
def test_a_shell_completes_commands_and_options(words, expected, shell, completion, run, tmp_path):
    code = f'{completion}\nCOMP_WORDS=(torchreg "$@"); COMP_CWORD=$#; _torchreg; echo "${{COMPREPLY[*]}}"'
    done = run(shell, "-c", code, shell, *words, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == (expected, "")


@pytest.fixture(scope="module")
def completion(run, tmp_path_factory):
    code = "import sys; from torchreg.cli import main; main(['completion']); assert 'torch' not in sys.modules"
    done = run(sys.executable, "-c", code, cwd=tmp_path_factory.mktemp("completion"))
    assert done.returncode == 0, done.stderr
    return done.stdout


# Numbers


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.0, "0 %"),
        (1.59e-31, "< 1e-10 %"),
        (-1e-17, "< 1e-10 %"),
        (1e-12, "1.00e-10 %"),
        (5.31e-9, "5.31e-07 %"),
        (2.84e-4, "0.0284 %"),
        (0.14, "14 %"),
        (0.9996, "100 %"),
        (1.5, "150 %"),
        (12.1, "1,210 %"),
        (12_345.0, "1,230,000 %"),
    ],
)
def test_a_percentage_has_significant_digits_and_no_exponent_where_it_can_be_read(fraction, text):
    assert percent(fraction) == text


def test_a_number_has_as_many_significant_digits_as_asked_for():
    assert [number(1 / 3, 2), number(1234.5, 2), number(1234.5, 6), number(float("inf"))] == [
        "0.33", "1,200", "1,234.5", "inf"
    ]  # fmt: skip
