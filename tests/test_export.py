"""Models and adapted models leave the package: nothing of its own is in what torch.export and ONNX make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import random_batch, small_learner
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf


def adapted(stats: str, **settings: object) -> tuple[nn.Module, Tensor]:
    """What a learner's `adapt` returns, as a module in float32, and examples for it."""
    config = mf.MAMLConfig(steps=3, eval_stats=stats, **settings)  # type: ignore[arg-type]
    learner, batch = small_learner(config), random_batch()
    learner.meta_step(batch)
    predict = learner.adapt(batch.support_x[0], batch.support_y[0])
    x = batch.target_x[0].flatten(0, -4)
    assert_close(predict(x), predict.model(x), rtol=0, atol=0)
    return predict.model.float(), x.float()


def converted(norm: nn.Module, layer: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
    return mf.convert_batch_norm(nn.Sequential(layer, norm, nn.ReLU()), 3).eval(), torch.randn(shape)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "adapted": lambda: adapted("batch"),
    "adapted-running": lambda: adapted("running"),
    "adapted-norms": lambda: adapted("batch", bnwb=False, adapt_norm=True),
    "conv4": lambda: (mf.Conv4(1, 3, image_size=12, filters=4, stages=2).eval(), torch.randn(5, 1, 12, 12)),
    "resnet12": lambda: (mf.ResNet12(1, 3).eval(), torch.randn(5, 1, 16, 16)),
    "features": lambda: converted(nn.BatchNorm1d(6), nn.Linear(4, 6), 7, 4),
    "sequences": lambda: converted(nn.BatchNorm1d(4), nn.Conv1d(2, 4, 3), 5, 2, 8),
    "volumes": lambda: converted(nn.BatchNorm3d(4), nn.Conv3d(2, 4, 3), 3, 2, 5, 5, 5),
    "accelerated": lambda: (
        mf.accelerate(mf.Conv4(1, 3, image_size=12, filters=4, stages=2)).eval(),
        torch.randn(5, 1, 12, 12),
    ),
}


# torch 2.11's, of its own archive.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_program_has_no_operation_of_the_package(name: str, tmp_path: Path) -> None:
    model, x = MODELS[name]()
    expected = model(x).detach()
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (x,)), file)
    program = torch.export.load(file)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls and not any("mamlpp" in call for call in calls), calls
    assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)
    assert_close(model(x).detach(), expected, rtol=0, atol=0)  # and the model computes as before


# torch's exporter uses what Python is to lose.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"
)
@pytest.mark.parametrize("name", ["adapted", "adapted-running", "adapted-norms", "resnet12", "features"])
def test_onnx_runs_elsewhere(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = MODELS[name]()
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), file, dynamic_shapes=({0: torch.export.Dim("n", min=2)},), verbose=False)
    session = runtime.InferenceSession(file)
    for given in (x, torch.cat([x, x[:2].flip(0) + 0.1])):
        (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        assert_close(torch.from_numpy(found), model(given).detach(), rtol=1e-5, atol=1e-5)
