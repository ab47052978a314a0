"""If a bad choice is accepted, the run fails late or, worse, does something else than was asked."""

import pytest

from torchreg.cli.options import comments
from torchreg.runs.config import BatchConfig, RunConfig, TrainConfig
from torchreg.runs.recipes import RECIPES


@pytest.mark.parametrize(
    "field",
    [
        "num_rows",
        "num_features",
        "global_batch_size",
        "local_batch_size",
        "micro_batch_size",
        "reference_batch_size",
        "max_steps",
        "epochs",
        "target_excess",
        "log_every",
        "decay_every",
        "timeout_s",
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_zero_and_negative_sizes_name_their_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        TrainConfig.of(**{field: value})


@pytest.mark.parametrize("learning_rates", [(0.0, 0.1), (0.1, -1.0), (float("nan"), 0.1), (0.1, float("inf"))])
def test_rates_must_be_positive_and_finite(learning_rates):
    with pytest.raises(ValueError, match=r"base_learning_rate of the (weight|bias)"):
        TrainConfig.of(base_learning_rate=learning_rates)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"global_batch_size": 64, "local_batch_size": 32}, "give one of them"),
        ({"sampling": "full", "global_batch_size": 64}, "omit the batch size"),
        ({"optimizer": "sgd", "sync": "allreduce"}, "sgd goes with ddp or mpi"),
        ({"optimizer": "manual", "sync": "ddp"}, "manual with allreduce or mpi"),
        ({"update_order": "sequential"}, "add --optimizer manual"),
        ({"data": "houses.csv", "num_rows": 9}, "only the synthetic table has a size"),
        ({"features": ("a",)}, "name a file with --data"),
        ({"decay_to": 1.5}, "fraction from 0 to 1"),
        ({"initial_weight": float("nan")}, "finite"),
        *(
            ({"name": name}, "^name (is .* not a plain file name|has 256 bytes)")
            for name in ("../out", "", ".", "..", "a\nb", "x" * 256)
        ),
        ({"seed": -1}, "0 or more"),
    ],
)
def test_combinations_that_cannot_work_say_what_to_do(values, part):
    with pytest.raises(ValueError, match=part):
        TrainConfig.of(**values)


def test_sync_follows_the_optimizer():
    assert TrainConfig.of(optimizer="sgd").optimizer.effective_sync == "ddp"
    assert TrainConfig.of(optimizer="manual").optimizer.effective_sync == "allreduce"


def test_any_value_overrides_a_recipes():
    lesson = RECIPES["lesson"]
    assert RECIPES["lesson"].replace(epochs=3).options() == lesson.options() | {"epochs": 3}


def test_every_option_has_a_sentence():
    docs = {name: doc for part in vars(TrainConfig()).values() for name, doc in comments(type(part)).items()}
    assert docs.keys() == TrainConfig().options().keys()
    assert all(sentence.endswith(".") for sentence in docs.values())


def test_an_option_has_one_owner_and_a_misspelt_one_is_named():
    nested = TrainConfig(batch=BatchConfig(seed=3), run=RunConfig(max_steps=5))
    assert TrainConfig.of(seed=3, max_steps=5) == nested
    assert nested.replace(seed=4).batch.seed == 4
    assert len(nested.options()) == sum(len(vars(part)) for part in vars(nested).values()), "two parts have one name"
    with pytest.raises(TypeError, match="no option of a TrainConfig: max_step"):
        TrainConfig.of(max_step=5)
