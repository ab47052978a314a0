"""If these fail, a campaign does not measure what its file asks for, or an error in the file costs node-hours."""

import json
import math
import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchreg.cli import main
from torchreg.scaling.campaign import Campaign, Setting, launches, node_hours, read_campaign, settings

NUMBERS = st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True).map(tuple)


def test_strong_and_weak_settings_that_coincide_are_measured_once():
    campaign = Campaign(
        ranks_per_node=(1, 2, 4),
        global_batch_sizes=(256,),
        local_batch_sizes=(64,),
        num_features=(1,),
        combinations=("manual/mpi", "sgd/ddp"),
    )
    # Two ranks: weak has 2 · 64 = 128 samples, strong 256. Four ranks: weak has 4 · 64 = 256, which is strong's.
    assert settings(campaign, 2) == [
        Setting("manual", "mpi", 1, 128),
        Setting("sgd", "ddp", 1, 128),
        Setting("manual", "mpi", 1, 256),
        Setting("sgd", "ddp", 1, 256),
    ]
    assert settings(campaign, 4) == [Setting("manual", "mpi", 1, 256), Setting("sgd", "ddp", 1, 256)]


def test_one_rank_averages_with_nobody():
    campaign = Campaign(num_features=(1,), global_batch_sizes=(64,), local_batch_sizes=())
    assert settings(campaign, 1) == [Setting("manual", "none", 1, 64), Setting("sgd", "none", 1, 64)]


def test_all_combinations_are_those_that_run_there():
    campaign = Campaign(num_features=(1,), global_batch_sizes=(64,), local_batch_sizes=())
    assert {(each.optimizer, each.sync) for each in settings(campaign, 2, by_mpi=False)} == {
        ("manual", "allreduce"),
        ("sgd", "ddp"),
    }


@given(nodes=NUMBERS, ranks=NUMBERS, repeats=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_every_block_has_every_size_once_in_an_order_that_the_seed_decides(nodes, ranks, repeats, seed):
    campaign = Campaign(
        nodes=nodes, ranks_per_node=ranks, repeats=repeats, seed=seed, global_batch_sizes=(), local_batch_sizes=(8,)
    )
    todo = launches(campaign)
    assert todo == launches(campaign)
    assert len({launch.id for launch in todo}) == len(todo), "two launches would share a folder"
    size = len(nodes) * len(ranks)
    for block in range(repeats):
        part = todo[block * size : (block + 1) * size]
        assert {launch.block for launch in part} == {block}
        assert {(launch.num_nodes, launch.ranks_per_node) for launch in part} == {(n, r) for n in nodes for r in ranks}


def test_launches_of_one_world_size_on_different_nodes_have_different_folders():
    todo = launches(Campaign(nodes=(1, 2), ranks_per_node=(1, 2), repeats=1))
    assert sorted(launch.id for launch in todo) == [
        "block-00-nodes-1-ranks-1",
        "block-00-nodes-1-ranks-2",
        "block-00-nodes-2-ranks-2",
        "block-00-nodes-2-ranks-4",
    ]


def test_node_hours_count_whole_nodes():
    one = Campaign(nodes=(1,), ranks_per_node=(4,), repeats=1)
    two = Campaign(nodes=(2,), ranks_per_node=(2,), repeats=1)
    # The same four ranks and settings, on twice the nodes.
    assert math.isclose(node_hours(two), 2 * node_hours(one))


def test_a_campaign_survives_its_file(tmp_path):
    campaign = Campaign(name="näme: # 'x'", nodes=(1, 2), launcher_args="--oversubscribe -x A='b c'", num_rows=4096)
    (tmp_path / "campaign.yaml").write_bytes(msgspec.yaml.encode(campaign))
    assert read_campaign(tmp_path / "campaign.yaml") == campaign


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ranks: [1, 2]", "'ranks': its keys are name, machine"),
        ("nodes: [1, two]", "nodes"),
        ("nodes: []", "nodes"),
        ("nodes: [0]", "nodes has 0"),
        ("nodes: [2, 2]", "give each number once"),
        ("machine: polarris", "polarris"),
        ("combinations: [sgd/allreduce]", "sgd/allreduce"),
        ("window_s: -1", "window_s has -1"),
        ("repeats: 0", "repeats has 0"),
        ('launcher_args: "\'open"', 'launcher_args is "\'open", which no shell could split'),
        ("global_batch_sizes: [2]\nranks_per_node: [4]", "the largest world size is 4"),
        ("num_rows: 100", "the largest global batch is 256"),
        ("- just\n- a list", "no `key: value` lines"),
        ("a: [", "which is not the YAML of a campaign"),
        ("", "no `key: value` lines"),
        # W5: what would be written outside of runs/, or is none of a file's names.
        *(
            (f"name: {name}", "name ")
            for name in ("../../escape", "..", ".", "a/b", '"a\\0b"', '"a\\nb"', '"\\e[2J"', "''")
        ),
        (f"name: {'n' * 256}", "name has 256 bytes"),
        ("machine_name: a/b", "machine_name is 'a/b'"),
        # W5: eight lists of eight lists of ... are 10⁸ words, and hang whoever makes a text of them.
        (
            "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 9))]),
            "which has 'a0'",
        ),
        ("nodes: &nodes [1, *nodes]", "Expected `int`, got `array` - at `$.nodes[1]`"),
        ("base: &base {repeats: 2}\n<<: *base", "it merges keys by `<<`"),
        ("<<: {repeats: 2}", "it merges keys by `<<`"),
        ("? [1]\n: 2", "found unhashable key"),
        ("nodes: " + "[" * 3_000, "nested too deeply"),
        ("nodes: " + "{a: " * 3_000, "nested too deeply"),
        ("#" * 70_000, "more than 65,536 bytes"),
        ("repeats: 1\nrepeats: 2", "repeats is there twice"),
        (f"repeats: {'9' * 5_000}", "which is not the YAML of a campaign"),
        ("name: 2026-99-99", "which is not the YAML of a campaign: month must be in 1..12"),
        ("name: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_an_error_in_the_file_is_reported_in_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    assert main(["scale", "plan", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("torchreg: error:")
    assert message in err
    assert str(path) in err
    assert err.count("\n") == 1


def test_a_pipe_is_no_campaign_file(tmp_path, capsys):
    # W5: reading one would wait for ever.
    os.mkfifo(tmp_path / "pipe")
    assert main(["scale", "plan", str(tmp_path / "pipe")]) == 2
    assert "which is not a regular file" in capsys.readouterr().err


def test_a_file_may_name_a_value_and_use_it_again(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "repeats: &few 2\nnodes: [*few, 4]\nranks_per_node: &all [1, 2]\nlocal_batch_sizes: *all"
    )
    expected = Campaign(repeats=2, nodes=(2, 4), ranks_per_node=(1, 2), local_batch_sizes=(1, 2))
    assert read_campaign(tmp_path / "c.yaml") == expected


def test_a_campaign_can_exclude_variables_of_its_machine(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("machine: polaris\nranks_per_node: [1]\nlauncher: pals\nwithout: [NCCL_CROSS_NIC]")
    others = ["TMPDIR", "NCCL_NET_GDR_LEVEL"]
    for options, names in (([], ["NCCL_CROSS_NIC"]), (["--without", *others], others)):
        assert main(["scale", "plan", str(path), "--json", *options]) == 0
        plan = json.loads(capsys.readouterr().out)
        command = " ".join(plan["launches"][0]["command"])
        assert plan["campaign"]["without"] == names
        assert not [name for name in names if f"{name}=" in command]
        assert "NCCL_COLLNET_ENABLE=1" in command
    assert main(["scale", "run", str(path), "--without", "NCCL"]) == 2
    assert "without names NCCL, which machine polaris does not set" in capsys.readouterr().err
    one, other = (Campaign(machine="polaris", without=names) for names in ((), ("NCCL_CROSS_NIC",)))
    assert one.fingerprint != other.fingerprint, "its numbers are those of another setting"


def test_a_missing_file_is_reported(tmp_path, capsys):
    assert main(["scale", "plan", str(tmp_path / "none.yaml")]) == 2
    assert "does not exist: give a YAML file" in capsys.readouterr().err


def test_a_file_may_write_numbers_and_single_values_as_people_do(tmp_path):
    (tmp_path / "c.yaml").write_text("base_learning_rate: 1e-4\nwindow_s: 1\nranks_per_node: 2\ncombinations: all")
    expected = Campaign(base_learning_rate=1e-4, window_s=1.0, ranks_per_node=(2,))
    assert read_campaign(tmp_path / "c.yaml") == expected


def test_flags_override_the_file(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("nodes: [1]\nranks_per_node: [1, 2]\nrepeats: 3\n")
    assert main(["scale", "plan", str(tmp_path / "c.yaml"), "--repeats", "2", "--launcher", "mpich"]) == 0
    out = capsys.readouterr().out
    assert "4 launches" in out
    assert "torchreg scale measure DIR block-00-nodes-1-ranks-2" in out
