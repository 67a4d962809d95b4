"""Experiment files of the authors' code: their shipped ones are our presets, and every key is answered for."""

import json
from pathlib import Path
from typing import Any

import pytest
from authors_helpers import shipped, write_experiment

from mamlpp_fast.compat import experiment
from mamlpp_fast.compat.experiment import Experiment, read_experiment
from mamlpp_fast.train.presets import preset

FLAVOURS = [("omniglot", 5, 1), ("omniglot", 5, 5), ("omniglot", 20, 1), ("omniglot", 20, 5)]
FLAVOURS += [("miniimagenet", 5, 1), ("miniimagenet", 5, 5)]


@pytest.mark.parametrize("maml", [False, True], ids=["maml++", "maml"])
@pytest.mark.parametrize(("dataset", "ways", "shots"), FLAVOURS)
def test_shipped_experiments_are_our_presets(
    tmp_path: Path, dataset: str, ways: int, shots: int, maml: bool
) -> None:
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(shipped(dataset, ways, shots, maml=maml)))
    found = read_experiment(path)
    name = f"{dataset}-{ways}w{shots}s{'-maml' if maml else ''}-authors-code"
    assert found.config == preset(name)
    assert (found.channels, found.image_size) == ((1, 28) if dataset == "omniglot" else (3, 84))
    assert found.name == f"{dataset}_{ways}_{shots}_{'maml' if maml else 'maml++'}"
    assert not found.evaluate_only


@pytest.mark.parametrize("dataset", ["omniglot", "miniimagenet"])
def test_every_key_is_used_or_named(tmp_path: Path, dataset: str) -> None:
    """Without a key that is not named as having no effect, or with another value of it, something changes."""
    values = shipped(dataset, 5, 1)
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(values))
    found = read_experiment(path)
    named = {
        key
        for note in found.notes
        if note.startswith("no effect: ")
        for key in note.split(": ")[1].split(", ")
    }
    assert {"init_inner_loop_learning_rate", "weight_decay", "gpu_to_use", "continue_from_epoch"} <= named
    for key, value in values.items():
        if key in named:
            continue
        path.write_text(json.dumps(values | {key: _other(value)}))
        outcome = _read_or_refuse(path)
        assert key in outcome if isinstance(outcome, str) else key == "dataset_path" or outcome != found, key


def _read_or_refuse(path: Path) -> Experiment | str:
    try:
        return read_experiment(path)
    except ValueError as error:
        return str(error)


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "batch" if isinstance(value, str) else [0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_seed": 2, "val_seed": 1}, {"seed": 2, "val_seed": 1, "test_seed": 1}),
        ({"seed": 0}, {"init_seed": 985772}),
        ({"task_learning_rate": 0.4}, {"inner_lr": 0.4}),
        ({"init_inner_loop_learning_rate": 0.4}, {"inner_lr": 0.1}),
        ({"second_order": "True", "max_pooling": "false"}, {"second_order": True, "max_pool": False}),
        ({"per_step_bn_statistics": False}, {"bnwb": False, "bnrs": False}),
        (
            {"enable_inner_loop_optimizable_bn_params": "true"},
            {"bnwb": False, "bnrs": True, "adapt_norm": True},
        ),
        (
            {"learnable_bn_gamma": False, "learnable_bn_beta": "False"},
            {"learn_gamma": False, "learn_beta": False},
        ),
        ({"first_order_to_second_order_epoch": 50}, {"da_epoch": 50}),
        ({"norm_layer": "layer_norm"}, {"norm": "layer"}),
        ({"num_of_gpus": 2, "samples_per_iter": 2}, {"tasks": 32, "val_tasks": 576}),
        ({"number_of_evaluation_steps_per_iter": 7}, {"steps": 5, "eval_steps": 7}),
        ({"num_evaluation_tasks": 601}, {"val_tasks": 600, "test_tasks": 600}),
        ({"image_height": 32, "image_width": 32}, {"image_size": 32}),
        ({"conv_padding": 1}, {}),
    ],
)
def test_keys(tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    config = read_experiment(write_experiment(tmp_path / "e.json", **changes)).config
    assert {key: getattr(config, key) for key in expected} == expected


def test_their_defaults_stand_in_for_absent_keys(tmp_path: Path) -> None:
    values = shipped("omniglot", 20, 1)
    for key in ("second_order", "max_pooling", "num_stages", "experiment_name"):
        del values[key]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(values))
    found = read_experiment(path)
    assert (found.config.second_order, found.config.max_pool, found.config.stages) == (False, False, 4)
    assert found.name == "mine"
    (defaults,) = [n for n in found.notes if n.startswith("absent, as by their defaults: ")]
    assert "second_order=False" in defaults
    assert "task_learning_rate=0.1" in defaults
    assert any(n == "absent, as in their shipped files: num_stages=4" for n in found.notes)


def test_the_dead_inner_rate_is_pointed_out(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(json.dumps(shipped("miniimagenet", 5, 1)))
    said = "inner rates start at 0.1, not at init_inner_loop_learning_rate=0.01"
    assert said in read_experiment(path).notes
    assert said not in read_experiment(path, {"inner_lr": 0.01}).notes


def test_settings_replace_what_the_file_says(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "e.json", task_learning_rate=-1, dataset_name="birds")
    config = read_experiment(path, {"inner_lr": 0.01, "dataset": "folder", "steps": 3}).config
    assert (config.inner_lr, config.dataset, config.steps, config.image_size) == (0.01, "folder", 3, 28)


def test_their_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_experiment(tmp_path / "e.json")
    monkeypatch.delenv("DATASET_DIR", raising=False)
    assert read_experiment(path).data is None
    monkeypatch.setenv("DATASET_DIR", str(tmp_path))
    assert read_experiment(path).data is None
    (tmp_path / "omniglot_dataset").mkdir()
    assert read_experiment(path).data == tmp_path / "omniglot_dataset"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"secondorder": True},
            "secondorder: expected a key of the authors' code, the nearest is 'second_order'",
        ),
        ({"xyz": 1}, "xyz: expected a key of the authors' code, the nearest is"),
        ({"second_order": "maybe"}, "second_order: expected true or false, got 'maybe'"),
        ({"batch_size": "8"}, "batch_size: expected an integer, got '8'"),
        ({"batch_size": 0}, r"batch_size \(tasks\): expected at least 1, got 0"),
        ({"num_stages": True}, "num_stages: expected an integer, got True"),
        ({"meta_learning_rate": None}, "meta_learning_rate: expected a number, got None"),
        ({"min_learning_rate": 0.1}, r"min_learning_rate \(min_meta_lr\): expected 0 to meta_lr"),
        ({"task_learning_rate": -1}, "task_learning_rate: expected above 0, .* older code"),
        ({"conv_padding": False}, "conv_padding: expected true"),
        ({"norm_layer": "batch"}, "norm_layer: expected batch_norm or layer_norm, got 'batch'"),
        (
            {"dataset_name": "cifar"},
            "dataset_name: expected one with omniglot or mini_imagenet in it, got 'cifar'",
        ),
        ({"image_channels": 3}, "image_channels: expected 1 of omniglot, got 3"),
        ({"image_width": 30}, "image_width: expected image_height, 28, got 30"),
        ({"reverse_channels": "true"}, "reverse_channels: expected false"),
        ({"sets_are_pre_split": True}, "sets_are_pre_split: expected false for omniglot, got true"),
        ({"train_val_test_split": [0.6, 0.2, 0.2]}, "train_val_test_split: expected"),
        ({"experiment_name": "../../x"}, "experiment_name: expected a folder's name"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"e\.json: {message}"):
        read_experiment(write_experiment(tmp_path / "e.json", **changes))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "expected JSON"), ("[]", "expected a JSON object, got list")]
)
def test_no_experiment_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_experiment(tmp_path / "e.json")
    with pytest.raises(ValueError, match="expected an experiment file for --config, No such file"):
        read_experiment(tmp_path / "none.json")


def test_no_key_is_used_and_unused() -> None:
    assert not experiment._USED.keys() & experiment._UNUSED.keys()


def test_the_documents_table_has_every_key() -> None:
    text = (Path(__file__).parents[1] / "docs" / "drop_in.md").read_text()
    assert [key for key in (*experiment._USED, *experiment._UNUSED) if f"`{key}`" not in text] == []
