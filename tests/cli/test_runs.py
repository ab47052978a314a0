"""If these fail, a user cannot see how their runs ended, or resumes and deletes the wrong one."""

import sys
from contextlib import closing
from pathlib import Path

import pytest

from torchreg.cli import main
from torchreg.runs.config import RunConfig
from torchreg.runs.record import RunDirectory

TRAIN = ["train", "--optimizer", "manual"]


@pytest.fixture
def runs(monkeypatch, capsys):
    """A run in each state, in the order of their ends."""
    assert main([*TRAIN, "--name", "done", "--max-steps", "5"]) == 0
    assert main([*TRAIN, "--name", "gone", "--max-steps", "50", "--lr", "5"]) == 3
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_JOB_END_TIME", "1")  # in the past: it stops as soon as it can
        assert main([*TRAIN, "--name", "stopped", "--max-steps", "400"]) == 75
    for name in ("crashed", "going", "torn"):
        assert main([*TRAIN, "--name", name, "--max-steps", "1"]) == 0
        Path("runs", name, "record.json").unlink()
        for path in Path("runs", name, "checkpoints").iterdir():
            path.unlink()
    Path("runs/torn/record.json").write_text('{"result": ')
    Path("runs/notes").mkdir()
    capsys.readouterr()
    with closing(RunDirectory(RunConfig(name="going", resume="auto"))):
        yield


def test_runs_are_listed_with_what_became_of_them(runs, capsys):
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in map(str.split, out.splitlines()[3:]) if row}
    assert {name: row[0] for name, row in rows.items()} == {
        "done": "finished",
        "gone": "diverged",
        "stopped": "saved",
        "crashed": "failed",
        "going": "running",
        "torn": "damaged",
    }
    assert rows["done"][1:3] == ["5", "1"]
    assert rows["done"][5] == "%"
    assert rows["stopped"][1].isdecimal()
    assert max(map(len, out.splitlines())) <= 80
    assert main(["runs", str(Path("runs").absolute())]) == 0
    assert capsys.readouterr().out == out


def test_one_run_is_shown_as_its_training_ended(capsys):
    for name in ("shown", "gone"):
        code = main([*TRAIN, "--name", name, "--max-steps", "20", *(["--lr", "5"] if name == "gone" else ["--plot"])])
        assert code == (3 if name == "gone" else 0)
        *_, printed = capsys.readouterr().out.partition("loss ")[2].partition("\n")
        assert main(["runs", name]) == 0
        assert capsys.readouterr().out == printed[printed.index("diverged" if name == "gone" else "fit ") :]


def test_a_run_that_is_not_finished_is_shown_with_its_checkpoint(runs, capsys):
    for name, line in {"stopped": "saved        ", "crashed": "failed       0 steps", "going": "running      "}.items():
        assert main(["runs", name]) == 0
        assert capsys.readouterr().out.startswith(line)


def test_a_folder_without_runs_is_no_error(capsys):
    Path("empty").mkdir()
    assert main(["runs", "empty"]) == 0


def test_plot_draws_what_the_option_draws(capsys):
    assert main([*TRAIN, "--name", "drawn", "--max-steps", "20", "--plot"]) == 0
    folder, drawn = Path("runs/drawn"), {}
    for path in folder.glob("training.*"):
        drawn[path.name] = path.read_bytes()
        path.unlink()
    capsys.readouterr()
    assert main(["plot", "drawn"]) == 0
    assert "picture      runs/drawn/training.svg" in capsys.readouterr().out
    assert {path.name for path in folder.glob("training.*")} == set(drawn) == {"training.png", "training.svg"}
    assert (folder / "training.png").read_bytes() == drawn["training.png"]


def test_plot_draws_a_plan_and_a_run_that_diverged_and_refuses_what_is_incomplete(runs, capsys):
    assert main(["plan", "--plot", "--name", "planned"]) == 0
    for name in ("planned", "gone"):
        assert main(["plot", name]) == 0, capsys.readouterr().err
    for name in ("torn", "stopped", "crashed"):
        capsys.readouterr()
        assert main(["plot", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line


def test_runs_and_plot_need_no_torch(run, tmp_path):
    done = run("torchreg", *TRAIN, "--name", "x", "--max-steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = (
        "import sys; from torchreg.cli import main\n"
        "assert main(['runs']) == main(['runs', 'x']) == main(['plot', 'x']) == 0\nassert 'torch' not in sys.modules"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
