"""Under Lightning, training is the plain learner's, stops and goes on, and is shared by processes."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_helpers import QUIET, lightning_warnings
from pytorch_lightning.plugins.environments import LightningEnvironment
from rank_helpers import on_ranks
from train_helpers import draw_folder

import mamlpp_fast as mf
from mamlpp_fast.data import EpisodeSampler, load
from mamlpp_fast.integrations.lightning import EpisodeDataModule, MAMLPlusPlusModule

CONFIG = mf.MAMLConfig(steps=2, msl_epochs=1, iterations_per_epoch=3, epochs=3)


@pytest.fixture(autouse=True)
def _lightning_warnings() -> Iterator[None]:
    with lightning_warnings():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("images"))


def sampler(folder: Path, split: str) -> EpisodeSampler:
    return load("folder", folder).sampler(split, ways=2, shots=1, targets=2, seed=1, dtype=torch.float64)


def module() -> MAMLPlusPlusModule:
    torch.manual_seed(0)
    model = mf.Conv4(1, 2, image_size=8, filters=4, stages=2, num_steps=2)
    return MAMLPlusPlusModule(model, CONFIG, engine="fused", precision="float64")


def episodes(folder: Path, iterations: int = 3) -> EpisodeDataModule:
    splits = [sampler(folder, split) for split in ("train", "val", "test")]
    return EpisodeDataModule(*splits, tasks=4, iterations=iterations, val_tasks=6, test_tasks=8)


def fitted(folder: Path, root: Path, epochs: int, ckpt: Path | None = None, **changes: Any) -> Any:
    own = module()
    trainer = pl.Trainer(max_epochs=epochs, default_root_dir=root, **QUIET | changes)
    trainer.fit(own, datamodule=episodes(folder), ckpt_path=None if ckpt is None else str(ckpt))
    return own, trainer


def plain(folder: Path, iterations: int) -> mf.MAMLPlusPlus:
    learner = module().learner
    for i in range(iterations):
        learner.meta_step(sampler(folder, "train").batch(i * 4, 4))
    return learner


def state(learner: mf.MAMLPlusPlus) -> list[torch.Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(learner.state_dict())
    return [torch.as_tensor(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor | int | float)]


def test_training_is_the_plain_learners(folder: Path, tmp_path: Path) -> None:
    own, trainer = fitted(folder, tmp_path, 2)
    expected = plain(folder, 6)
    torch.testing.assert_close(state(own.learner), state(expected), rtol=0, atol=0)
    assert trainer.global_step == own.learner.iteration == 6
    last = plain(folder, 5).meta_step(sampler(folder, "train").batch(20, 4))
    logged = trainer.callback_metrics
    torch.testing.assert_close(logged["train_loss"], last.loss, check_dtype=False, rtol=1e-6, atol=1e-6)
    assert float(logged["meta_lr"]) == pytest.approx(expected.meta_lr(), rel=0.5)
    judged = [expected.evaluate(sampler(folder, "val").batch(*part)) for part in ((0, 4), (4, 2))]
    losses = torch.cat([j.loss for j in judged])
    torch.testing.assert_close(logged["val_loss"], losses.mean(), check_dtype=False, rtol=1e-6, atol=1e-6)


def test_testing_predicting_and_adapting(folder: Path, tmp_path: Path) -> None:
    own, trainer = fitted(folder, tmp_path, 1)
    (result,) = trainer.test(own, datamodule=episodes(folder), verbose=False)
    whole = own.learner.evaluate(sampler(folder, "test").batch(0, 8))
    assert result["test_accuracy"] == pytest.approx(float(whole.accuracy[-1].mean()))
    batch = sampler(folder, "test").batch(0, 2)
    four = (batch.support_x, batch.support_y, batch.target_x, batch.target_y)
    loader = torch.utils.data.DataLoader([batch, four], batch_size=None)  # type: ignore[list-item]
    predicted, again = trainer.predict(own, loader)
    torch.testing.assert_close(predicted, whole.logits[-1, :2])
    torch.testing.assert_close(again, predicted, rtol=0, atol=0)
    task = sampler(folder, "test").batch(0, 1)[0]
    torch.testing.assert_close(own(task.support_x, task.support_y, task.target_x), predicted[0])


class _SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [3, 5], ids=["after-an-epoch", "within-an-epoch"])
def test_a_run_goes_on_from_lightnings_checkpoint(folder: Path, tmp_path: Path, step: int) -> None:
    path = tmp_path / "stopped.ckpt"
    fitted(folder, tmp_path, 2, callbacks=[_SaveAt(step, path)])
    own, trainer = fitted(folder, tmp_path, 3, path)
    torch.testing.assert_close(state(own.learner), state(plain(folder, 9)), rtol=0, atol=0)
    assert trainer.global_step == 9


def test_checkpoints_of_something_else_are_refused(folder: Path, tmp_path: Path) -> None:
    _, trainer = fitted(folder, tmp_path, 1)
    path = tmp_path / "one.ckpt"
    trainer.save_checkpoint(path)
    torch.manual_seed(0)
    other = MAMLPlusPlusModule(
        mf.Conv4(1, 2, image_size=8, filters=4, stages=2, num_steps=2),
        mf.MAMLConfig(steps=2, msl_epochs=2),
        precision="float64",
    )
    again = pl.Trainer(max_epochs=2, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"ckpt_path: expected a checkpoint of MAMLConfig\(steps=2"):
        again.fit(other, datamodule=episodes(folder), ckpt_path=str(path))
    with pytest.raises(ValueError, match="got another module's"):
        other.on_load_checkpoint({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16-mixed"}, r"Trainer\(precision=...\): expected 32-true"),
        ({"accumulate_grad_batches": 2}, "gradient accumulation"),
        ({"gradient_clip_val": 1.0}, "gradient clipping"),
    ],
)
def test_what_would_not_be_maml_is_refused(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, pl.utilities.exceptions.MisconfigurationException), match=message):
        fitted(folder, tmp_path, 1, **options)


def test_other_batches_are_refused() -> None:
    with pytest.raises(TypeError, match="batch: expected an EpisodeBatch or"):
        module().training_step({"x": 1}, 0)


def test_tasks_that_the_processes_do_not_divide(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes as many, or a mean over processes would be none over tasks."""
    monkeypatch.setattr(EpisodeDataModule, "_ranks", lambda self: SimpleNamespace(size=3))
    data = episodes(folder)
    with pytest.raises(ValueError, match="tasks: expected a multiple of the 3 processes, got 4"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="val_tasks, test_tasks: expected a multiple of 3, got 8"):
        data.test_dataloader()
    assert EpisodeDataModule(sampler(folder, "train")).val_dataloader() == []


class _Started(LightningEnvironment):
    """Ranks that are there already."""

    creates_processes_externally = True

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()


def _ddp(folder: Path, root: Path) -> tuple[Any, ...]:
    warnings.simplefilter("ignore")
    strategy = pl.strategies.DDPStrategy(cluster_environment=_Started(), process_group_backend="gloo")
    own, trainer = fitted(folder, root, 2, devices=dist.get_world_size(), strategy=strategy)
    return state(own.learner), {k: float(v) for k, v in trainer.callback_metrics.items()}, trainer.global_step


def test_two_processes_share_a_meta_batch(folder: Path, tmp_path: Path) -> None:
    results = on_ranks(2, _ddp, folder, tmp_path)
    alone, trainer = fitted(folder, tmp_path, 2)
    for ours, logged, steps in results:
        torch.testing.assert_close(ours, state(alone.learner), rtol=1e-10, atol=1e-12)
        assert steps == 6
        assert logged == pytest.approx({k: float(v) for k, v in trainer.callback_metrics.items()}, rel=1e-5)


def test_without_lightning_the_import_says_what_to_install() -> None:
    code = (
        "import importlib.util, sys\n"
        "original = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if 'lightning' in n and '.' not in n else original(n, *a)\n"
        "import mamlpp_fast.integrations.lightning\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: mamlpp_fast.integrations.lightning: expected the package lightning or"
    )
    assert "pip install 'mamlpp_fast[lightning]'" in last
