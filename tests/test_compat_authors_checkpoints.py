"""Checkpoints of the authors' code: into a run of ours and back, Adam included, and never run."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from authors_helpers import TINY, TheirSystem, their_batches, write_experiment
from train_helpers import RunsCode

import mamlpp_fast as mf
from mamlpp_fast.compat.checkpoints import _read, export_checkpoint, import_checkpoints
from mamlpp_fast.compat.experiment import Experiment, read_experiment
from mamlpp_fast.engine import EngineName
from mamlpp_fast.train import build_learner, load_checkpoint
from mamlpp_fast.train.run_folder import load_model, read_config


def tiny_experiment(folder: Path, **changes: Any) -> Experiment:
    return read_experiment(write_experiment(folder / "experiment.json", **(TINY | changes)))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return tiny_experiment(tmp_path)


def stored(folder: Path, experiment: Experiment, engine: EngineName = "reference") -> mf.MAMLPlusPlus:
    """A learner at the state that training in ``folder`` goes on from."""
    config, record = read_config(folder)
    learner = build_learner(
        config, experiment.channels, experiment.image_size, engine=engine, precision=record["precision"]
    )
    learner.load_state_dict(load_checkpoint(folder / "checkpoints" / "latest.pt", "training")["learner"])
    return learner


def same_tensors(found: Any, expected: Any) -> None:
    """Bit for bit, at any depth."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same_tensors(found[key], expected[key])


def near(learner: mf.MAMLPlusPlus, theirs: TheirSystem, folder: Path, experiment: Experiment) -> None:
    """The learner's parameters are theirs but for the inert biases, which their Adam moves by amplified rounding."""
    expected = stored_state(folder, experiment, theirs)
    for name, value in learner.model.state_dict().items():
        if not name.endswith("conv.bias") and ".running_" not in name:
            torch.testing.assert_close(value, expected.model.state_dict()[name], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(learner.rates.rates, expected.rates.rates, rtol=1e-9, atol=1e-9)


def stored_state(folder: Path, experiment: Experiment, theirs: TheirSystem) -> mf.MAMLPlusPlus:
    torch.save(theirs.state([0.5]), folder / "now")
    import_checkpoints([folder / "now"], experiment, folder / f"now-{theirs.iteration}", engine="reference")
    return stored(folder / f"now-{theirs.iteration}", experiment)


VARIANTS: dict[str, dict[str, Any]] = {
    "maml++": {},
    "maml": {
        "per_step_bn_statistics": False,
        "learnable_per_layer_per_step_inner_loop_learning_rate": False,
        "use_multi_step_loss_optimization": False,
    },
    "inner-bn": {"per_step_bn_statistics": False, "enable_inner_loop_optimizable_bn_params": True},
    "fixed-gamma": {"learnable_bn_gamma": False},
}


# Recorded runs --------------------------------------------------------------------------------------------------------


RECORDED = [
    "final_loss_epoch50",
    "first_order_da",
    "maml_plain",
    "msl_epoch0",
    "msl_epoch4_strided",
    "three_way_two_shot_rgb_clamped",
]


def recorded_experiment(c: dict[str, Any], path: Path) -> Experiment:
    rgb = c["channels"] == 3
    return read_experiment(
        write_experiment(
            path,
            dataset_name=c["dataset"],
            sets_are_pre_split=rgb,
            image_height=c["image"],
            image_width=c["image"],
            image_channels=c["channels"],
            batch_size=c["tasks"],
            num_classes_per_set=c["ways"],
            num_samples_per_class=c["shots"],
            num_target_samples=c["targets"],
            cnn_num_filters=c["filters"],
            num_stages=c["stages"],
            number_of_training_steps_per_iter=c["steps"],
            number_of_evaluation_steps_per_iter=c["steps"],
            task_learning_rate=c["inner_lr"],
            learnable_per_layer_per_step_inner_loop_learning_rate=c["lslr"],
            enable_inner_loop_optimizable_bn_params=c["inner_bn"],
            use_multi_step_loss_optimization=c["msl"],
            multi_step_loss_num_epochs=c["msl_epochs"],
            max_pooling=c["max_pool"],
            per_step_bn_statistics=c["per_step_bn"],
            first_order_to_second_order_epoch=c["da_epoch"],
        )
    )


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_parameters_evaluate_as_recorded(
    golden: Path, tmp_path: Path, name: str, engine: EngineName
) -> None:
    with np.load(golden / f"{name}.npz") as archive:
        record = {key: archive[key] for key in archive.files}
    network = {
        key.removeprefix("final/"): torch.from_numpy(value)
        for key, value in record.items()
        if key.startswith("final/")
    }
    experiment = recorded_experiment(json.loads(str(record["config"])), tmp_path / "e.json")
    torch.save(
        {"network": network, "current_iter": 500, "val_accuracy_mean": np.float64(0.5)},
        tmp_path / "train_model_1",
    )
    notes = import_checkpoints([tmp_path / "train_model_1"], experiment, tmp_path / "run")
    assert notes == ["no optimizer in it (older code stored none): Adam starts anew"]
    learner = build_learner(
        experiment.config, experiment.channels, experiment.image_size, engine=engine, precision="float64"
    )
    load_model(tmp_path / "run" / "checkpoints" / "epoch-0000.pt", learner)
    fields = (record[f"batch2/{side}_{axis}"] for side in ("support", "target") for axis in "xy")
    logits = learner.evaluate(mf.EpisodeBatch(*map(torch.from_numpy, fields))).logits[-1]
    expected = torch.from_numpy(record["eval_logits"])
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits, expected.view_as(logits), rtol=0, atol=1e-9 * scale)

    export_checkpoint(tmp_path / "run", tmp_path / "back")
    same_tensors(torch.load(tmp_path / "back")["network"], network)


# Adam -----------------------------------------------------------------------------------------------------------------


def _their_system(experiment: Experiment) -> TheirSystem:
    config = experiment.config
    return TheirSystem(config, gamma=config.learn_gamma, beta=config.learn_beta)


def _half_way(tmp_path: Path, variant: str, engine: EngineName) -> tuple[Experiment, TheirSystem, list[Any]]:
    """Their system after three of six batches, of which an imported run lies in ``run``; and the other three."""
    experiment = tiny_experiment(tmp_path, **VARIANTS[variant])
    theirs, batches = _their_system(experiment), list(their_batches(6))
    for batch in batches[:3]:
        theirs.step(batch)
    torch.save(theirs.state([0.5]), tmp_path / "train_model_1")
    import_checkpoints([tmp_path / "train_model_1"], experiment, tmp_path / "run", engine=engine)
    return experiment, theirs, batches[3:]


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_goes_on_as_theirs_would(tmp_path: Path, variant: str, engine: EngineName) -> None:
    experiment, theirs, rest = _half_way(tmp_path, variant, engine)
    learner = stored(tmp_path / "run", experiment, engine)
    assert learner.iteration == 3
    for batch in rest:
        loss = theirs.step(batch)
        assert float(learner.meta_step(batch).loss) == pytest.approx(loss, rel=1e-9)
    near(learner, theirs, tmp_path, experiment)


@pytest.mark.parametrize("variant", VARIANTS)
def test_their_training_goes_on_as_ours_would(tmp_path: Path, variant: str) -> None:
    experiment, theirs, rest = _half_way(tmp_path, variant, "reference")
    again = _their_system(experiment)
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    state = torch.load(tmp_path / "back")
    again.load_state_dict(state["network"])
    again.optimizer.load_state_dict(state["optimizer"])
    again.iteration = state["current_iter"]
    for batch in rest:
        assert again.step(batch) == theirs.step(batch)
    same_tensors(again.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("parallel", [False, True], ids=["one-gpu", "several-gpus"])
def test_round_trip_keeps_every_tensor(
    tmp_path: Path, experiment: Experiment, legacy: bool, parallel: bool
) -> None:
    theirs = TheirSystem(experiment.config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "running" in name:
                p.uniform_(0.5, 2)
    state = theirs.trained(6).state([0.5, 0.25])
    for moments in state["optimizer"]["state"].values():
        if moments["exp_avg"].shape == (3,):  # of a rate vector, whose last entry nothing of ours holds
            moments["exp_avg"][-1] = 0.125
    if parallel:
        state["network"] = {
            k.replace("classifier.", "classifier.module."): v for k, v in state["network"].items()
        }
    torch.save(state, tmp_path / "train_model_2", _use_new_zipfile_serialization=not legacy)
    import_checkpoints([tmp_path / "train_model_2"], experiment, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "back", legacy=legacy)
    back = torch.load(tmp_path / "back")
    same_tensors(back["network"], dict(state["network"]))
    same_tensors(back["optimizer"]["state"], state["optimizer"]["state"])
    assert back["optimizer"]["param_groups"][0]["params"] == state["optimizer"]["param_groups"][0]["params"]
    for key in ("current_iter", "best_val_acc", "best_val_iter", "best_epoch", "val_accuracy_mean"):
        assert back[key] == state[key]
    assert back["per_epoch_statistics"]["val_accuracy_mean"] == [0.5, 0.25]


def test_adams_numbers_follow_the_order_of_the_file(tmp_path: Path, experiment: Experiment) -> None:
    theirs = TheirSystem(experiment.config).trained(3)
    state = theirs.state([0.5])
    torch.save(state, tmp_path / "x")
    network, optimizer = state["network"], state["optimizer"]
    trained = [name for name, p in theirs.named_parameters() if p.requires_grad]
    states = {name: optimizer["state"][i] for i, name in enumerate(trained)}
    optimizer["state"] = {i: states[name] for i, name in enumerate(reversed(trained))}
    torch.save(state | {"network": dict(reversed(network.items()))}, tmp_path / "y")
    for name in "xy":
        import_checkpoints([tmp_path / name], experiment, tmp_path / f"run-{name}")
    runs = [stored(tmp_path / f"run-{name}", experiment).state_dict() for name in "xy"]
    same_tensors(runs[1], runs[0])


# Files ----------------------------------------------------------------------------------------------------------------


def test_files_of_older_versions(tmp_path: Path, experiment: Experiment) -> None:
    """NumPy 1 named its module otherwise, PyTorch before 1.6 wrote no archives, Adam counted its steps in integers."""
    state = TheirSystem(experiment.config).trained(3).state([0.5])
    torch.save(state, tmp_path / "new")
    for moments in state["optimizer"]["state"].values():
        moments["step"] = int(moments["step"])
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    written = (tmp_path / "old").read_bytes()
    old = written.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"cnumpy.core.multiarray\n" in old
    (tmp_path / "old").write_bytes(old)
    for name in ("old", "new"):
        import_checkpoints([tmp_path / name], experiment, tmp_path / f"run-{name}")
    runs = [stored(tmp_path / f"run-{name}", experiment).state_dict() for name in ("old", "new")]
    same_tensors(runs[0], runs[1])


def test_the_best_of_several_are_the_ensemble(tmp_path: Path, experiment: Experiment) -> None:
    theirs = TheirSystem(experiment.config)
    accuracies, paths = [0.5, 0.75, 0.625], []
    for epoch in range(3):
        theirs.trained(3, seed=epoch)
        paths.append(tmp_path / f"train_model_{epoch + 1}")
        torch.save(theirs.state(accuracies[: epoch + 1]), paths[-1])
    paths.append(tmp_path / "train_model_latest")
    paths[-1].write_bytes(paths[-2].read_bytes())
    import_checkpoints(paths[::-1], experiment, tmp_path / "run", engine="reference")
    latest = load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt", "training")
    assert [entry["epoch"] for entry in latest["best"]] == [1, 2, 0]
    assert latest["epochs_done"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["val_accuracy"] for line in lines] == accuracies
    assert [line["best"] for line in lines] == [True, True, False]
    assert [line["iteration"] for line in lines] == [3, 6, 9]
    assert lines[1]["msl_weights"] == pytest.approx(mf.reference.msl_weights(1, 2, 2))
    assert set(lines[2]["inner_rates"]) == set(stored(tmp_path / "run", experiment).rates.names)


def test_statistics_that_lost_epochs_are_said_to_have(tmp_path: Path, experiment: Experiment) -> None:
    theirs = TheirSystem(experiment.config)
    theirs.iteration = 9
    torch.save(theirs.state([0.5, 0.25]), tmp_path / "x")
    (note,) = [n for n in import_checkpoints([tmp_path / "x"], experiment, tmp_path / "run") if "epochs" in n]
    assert note.startswith("statistics of 1 epochs where 3 ended")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    _, notes = export_checkpoint(tmp_path / "run", tmp_path / "back")
    assert notes == [
        "per_epoch_statistics: left out, metrics.jsonl lacks epochs; their final test needs them"
    ]


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_with_code_is_refused_unrun(tmp_path: Path, experiment: Experiment, form: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil"
    state = TheirSystem(experiment.config).state([0.5]) | {"best_val_acc": RunsCode(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        ValueError, match=r"evil: expected tensors and plain values only, .*refused"
    ) as caught:
        import_checkpoints([path], experiment, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_of_every_plain_type_of_numpy_are_read(
    legacy: bool, tmp_path: Path, experiment: Experiment
) -> None:
    """In their statistics and in Adam's settings alike; a numpy.bool comes of comparing numbers of numpy."""
    state = TheirSystem(experiment.config).trained(3).state([0.5])
    state["optimizer"]["param_groups"][0]["amsgrad"] = np.bool_(False)
    state |= {f"statistic_{kind}": np.dtype(kind).type(1) for kind in "?bhiqBHIQefd"}
    torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=not legacy)
    content = _read(tmp_path / "x", experiment.config).content
    for kind in "?bhiqBHIQefd":
        value = content[f"statistic_{kind}"]
        assert type(value) is (bool if kind == "?" else float if kind in "efd" else int)
        assert value == 1
    assert content["optimizer"]["param_groups"][0]["amsgrad"] is False
    import_checkpoints([tmp_path / "x"], experiment, tmp_path / "run")


def test_numbers_of_other_types_are_refused(tmp_path: Path, experiment: Experiment) -> None:
    state = TheirSystem(experiment.config).state([0.5])
    torch.save(state | {"best_val_acc": np.complex128(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"x: expected a checkpoint, .*number type 'c16'"):
        import_checkpoints([tmp_path / "x"], experiment, tmp_path / "run")


def _without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in state.items() if k != key}


def _renamed(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"network": {k.replace("linear", "dense"): v for k, v in state["network"].items()}}


def _adam(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    (group,) = state["optimizer"]["param_groups"]
    return state | {"optimizer": state["optimizer"] | {"param_groups": [group | changes]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [s], "expected a checkpoint of the authors' code, got list"),
        (lambda s: _without(s, "network"), "'network' is missing"),
        (lambda s: _without(s, "val_accuracy_mean"), "'val_accuracy_mean' is missing"),
        (lambda s: s | {"network": {"a": 1}}, "expected tensors in 'network'"),
        (
            lambda s: s | {"current_iter": 4},
            r"current_iter to be a multiple of total_iter_per_epoch \(3\), got 4",
        ),
        (_renamed, "expected a parameter name of the authors' code"),
        (lambda s: _adam(s, weight_decay=0.1), "expected Adam with weight_decay=0, got 0.1"),
        (lambda s: _adam(s, params=[0, 1]), "expected 16 trained parameters, got 2"),
        (lambda s: s | {"per_epoch_statistics": [1]}, "expected lists of numbers in 'per_epoch_statistics'"),
        (lambda s: s | {"val_loss_mean": "low"}, "expected lists of numbers"),
        (
            lambda s: s | {"optimizer": {"state": {0: 1}, "param_groups": [{"params": list(range(16))}]}},
            "state of Adam",
        ),
        (lambda s: s | {"optimizer": {"state": {}}}, "expected the state of an Adam with one group"),
    ],
)
def test_other_checkpoints_are_refused(
    tmp_path: Path, experiment: Experiment, change: Any, message: str
) -> None:
    theirs = TheirSystem(experiment.config).trained(3)
    torch.save(change(theirs.state([0.5])), tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        import_checkpoints([tmp_path / "x"], experiment, tmp_path / "run")


def test_a_network_of_other_settings_is_refused(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, cnn_num_filters=6)
    theirs = TheirSystem(experiment.config)
    theirs.iteration = 3
    torch.save(theirs.state([0.5]), tmp_path / "x")
    with pytest.raises(ValueError, match="expected the network of this learner"):
        import_checkpoints([tmp_path / "x"], experiment, tmp_path / "run")
    other = tiny_experiment(tmp_path, number_of_training_steps_per_iter=3)
    with pytest.raises(ValueError, match=r"inner rates of blocks.0.conv.weight of shape \[4\], got \[3\]"):
        import_checkpoints([tmp_path / "x"], other, tmp_path / "run")


@pytest.mark.parametrize("kept", [0, 20, 2000])
def test_a_cut_file_is_refused(tmp_path: Path, experiment: Experiment, kept: int) -> None:
    torch.save(TheirSystem(experiment.config).state([0.5]), tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:kept])
    with pytest.raises(ValueError, match="x: expected"):
        import_checkpoints([tmp_path / "x"], experiment, tmp_path / "run")


def test_export_refuses_what_their_code_has_not(tmp_path: Path, experiment: Experiment) -> None:
    theirs = TheirSystem(experiment.config)
    theirs.iteration = 3
    torch.save(theirs.state([0.5]), tmp_path / "x")
    import_checkpoints([tmp_path / "x"], experiment, tmp_path / "run")
    with pytest.raises(ValueError, match="expected a folder without a run"):
        import_checkpoints([tmp_path / "x"], experiment, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"rates": "element"}))
    with pytest.raises(ValueError, match="rates: expected tensor, all that the authors' code has"):
        export_checkpoint(tmp_path / "run", tmp_path / "back")
    with pytest.raises(ValueError, match="expected a run's folder"):
        export_checkpoint(tmp_path / "none", tmp_path / "back")
