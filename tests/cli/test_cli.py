"""The command line: what a user sees first, and what they see after a mistake."""

import json
import os
import sys
from pathlib import Path

import pytest

from torchreg import cli
from torchreg.cli import main

from ..conftest import LESSON_BIAS, LESSON_LOSS, LESSON_WEIGHT


@pytest.mark.parametrize("code", ["import torchreg", "from torchreg.cli import main; main(['--help'])"])
def test_the_package_and_its_help_import_nothing_heavy(code, run, tmp_path):
    heavy = ["torch", "pandas", "matplotlib", "numpy", "mpi4py", "pyarrow", "rich", "tyro"]
    done = run(
        sys.executable, "-c", f"{code}; import sys; print(sorted(set({heavy}) & set(sys.modules)))", cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_help_of_train_needs_no_torch(run, tmp_path):
    code = (
        "import sys\nfrom torchreg.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('torch' in sys.modules)"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert "--global-batch-size" in done.stdout


def test_the_lesson_as_json(capsys):
    assert main(["train", "--recipe", "lesson", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (*result["weight"], result["bias"]) == pytest.approx((LESSON_WEIGHT, LESSON_BIAS), abs=5e-7)
    assert result["loss"] == pytest.approx(LESSON_LOSS, rel=1e-9)


def test_the_human_readable_result(capsys):
    assert main(["train", "--recipe", "lesson", "--name", "lesson"]) == 0
    out = capsys.readouterr().out
    assert "1 rank on 1 node · launcher none · distributed single" in out
    assert "fit          SalePrice = 88.890079 GrLivArea + 32912.241402" in out
    assert "closed form  SalePrice = 87.688145 GrLivArea + 34754.077892" in out
    assert "0.0284 % above the optimum" in out
    assert "runs/lesson" in out


def test_an_error_has_the_same_words_at_any_width_of_the_terminal(monkeypatch, capsys):
    # tyro breaks its box where the terminal ends; a rest of its advice would read as part of the error.
    errors = set()
    for columns in ("40", "80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["train", "--recipe", "lessons"]) == 2
        errors.add(capsys.readouterr().err)
    (error,) = errors
    assert error.endswith("('default', 'lesson', 'homework').\n")


def test_any_flag_overrides_a_recipe(capsys):
    assert main(["train", "--recipe=lesson", "--epochs", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 2


def test_divergence_has_its_own_exit_code(capsys):
    assert main(["train", "--base-learning-rate", "5", "5", "--name", "gone"]) == 3
    out, err = capsys.readouterr()
    assert "diverged at step" in out
    assert "stability limit" in out + err
    assert Path("runs/gone/record.json").is_file()


BAD_INPUT = {
    "no file": (["--data", "nowhere.csv"], "nowhere.csv, which does not exist"),
    "empty file": (["--data", "empty.csv"], "empty"),
    "no such column": (["--data", "houses.csv", "--features", "GrLivAera"], "nearest names are 'GrLivArea'"),
    "text": (["--data", "text.csv"], "'large' in row 2"),
    "NaN": (["--data", "nan.csv"], "--drop-missing"),
    "infinity": (["--data", "inf.csv"], "infinite in row 1"),
    "one row": (["--data", "one.csv"], "1 usable row"),
    "constant feature": (["--data", "constant.csv"], "in every row"),
    "zero batch": (["--global-batch-size", "0"], "global_batch_size is 0"),
    "negative batch": (["--local-batch-size", "-4"], "local_batch_size is -4"),
    "negative learning rate": (["--base-learning-rate", "-1", "1"], "base_learning_rate of the weight is -1.0"),
    "batch too large": (["--global-batch-size", "552"], "more than the data's 551 rows"),
    "both batches": (["--global-batch-size", "64", "--local-batch-size", "64"], "give one of them"),
    "existing run": (["--name", "there"], "exists already"),
    "unwritable runs_dir": (["--runs-dir", "empty.csv"], "cannot be written"),
    "unknown recipe": (["--recipe", "lessons"], "Expected one of ('default', 'lesson', 'homework')"),
    "unknown option": (["--batch-size", "64"], "--batch-size"),
    "no number": (["--max-steps", "many"], "many"),
    "no such choice": (["--sampling", "all"], "all"),
    "no cuda": (["--device", "cuda"], "device is cuda"),
    "learning rates refused": (["--base-learning-rate", "9", "9", "--on-unstable", "refuse"], "stability limit"),
    "numbers too large": (["--data", "huge.csv", "--global-batch-size", "2"], "too large"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, capsys, monkeypatch):
    Path("empty.csv").touch()
    Path("houses.csv").write_text("GrLivArea,SalePrice\n1,2\n2,3\n3,5\n")
    Path("text.csv").write_text("GrLivArea,SalePrice\n1,2\nlarge,3\n")
    Path("nan.csv").write_text("GrLivArea,SalePrice\n1,2\n2,\n3,4\n")
    Path("inf.csv").write_text("GrLivArea,SalePrice\ninf,2\n2,3\n")
    Path("one.csv").write_text("GrLivArea,SalePrice\n1,2\n")
    Path("constant.csv").write_text("GrLivArea,SalePrice\n1,2\n1,3\n")
    Path("huge.csv").write_text("GrLivArea,SalePrice\n1e200,2\n2,3\n")
    Path("runs/there").mkdir(parents=True)
    options, part = BAD_INPUT[case]
    monkeypatch.setattr(os, "_exit", sys.exit)  # initialisation leaves at once, without waiting for other ranks
    with pytest.raises(SystemExit) as left:
        sys.exit(main(["train", *options]))
    out, err = capsys.readouterr()
    assert left.value.code == 2
    assert out == "" or "rank" in out
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("torchreg: error: ")
    assert part in err
    assert [path.name for path in Path("runs").iterdir()] == ["there"]


def test_an_unknown_command_names_the_commands(capsys):
    assert main(["trian"]) == 2
    assert f"the commands are {', '.join(cli.COMMANDS)}" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--num-features", "3", "--num-rows", "200"]])
def test_plot_draws_png_and_svg(options, capsys):
    assert main(["train", "--plot", "--name", "drawn", "--max-steps", "2", *options]) == 0
    assert Path("runs/drawn/training.png").read_bytes().startswith(b"\x89PNG")
    svg = Path("runs/drawn/training.svg").read_text()
    assert "<svg" in svg
    assert "runs/drawn/training.png" in capsys.readouterr().out


def test_data_show_make_and_train_on_it(capsys):
    assert main(["data", "show"]) == 0
    assert "Σxy 136013443019" in capsys.readouterr().out
    assert main(["data", "make", "--num-rows", "200", "--output", "synthetic.csv"]) == 0
    assert main(["data", "make", "--output", "synthetic.csv"]) == 2
    assert main(["train", "--data", "synthetic.csv", "--max-steps", "2"]) == 0


@pytest.mark.parametrize("options", [["--features", "GrLivArea"], ["--data", "houses.csv", "--num-rows", "9"]])
def test_data_options_that_have_no_effect_are_refused(options, capsys):
    assert main(["data", "show", *options]) == 2
    assert "torchreg: error: " in capsys.readouterr().err


def test_mpi_without_mpi4py_is_refused_with_the_remedy(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left:
        main(["train", "--sync", "mpi"])
    assert left.value.code == 2
    assert "sync is mpi, and mpi4py cannot be imported" in capsys.readouterr().err


def test_another_package_called_ezpz_is_recognised(capsys, monkeypatch, tmp_path):
    (tmp_path / "ezpz").mkdir()
    (tmp_path / "ezpz" / "__init__.py").write_text("def crop(image): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ezpz", raising=False)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left:
        main(["train", "--distributed", "ezpz"])
    assert left.value.code == 2
    assert "has no setup_torch: it is another package" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "ezpz", raising=False)


def test_a_package_of_an_extra_that_is_missing_is_named(capsys, monkeypatch):
    # After `pip install .` alone, campaigns ended in a traceback.
    monkeypatch.setitem(sys.modules, "yaml", None)
    Path("campaign.yaml").write_text("name: c\n")
    assert main(["scale", "plan", "campaign.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "torchreg: error: scale needs the package pyyaml, which is not installed: pip install pyyaml\n"
