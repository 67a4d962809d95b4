"""Mistakes that other tests do not make: each is refused in one line that names the argument."""

import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import moved
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mamlpp_fast as mf
from mamlpp_fast import data, replay, testing
from mamlpp_fast.benchmarking import bench, cpu_name
from mamlpp_fast.cli._arguments import resolve_device
from mamlpp_fast.data import locate
from mamlpp_fast.train import TrainConfig
from mamlpp_fast.train.build import build_learner
from mamlpp_fast.train.files import append_line, read_json, write_json
from mamlpp_fast.train.signals import StopSignal
from mamlpp_fast.workloads import WORKLOADS

ONE = torch.zeros(1, 2, 1, 4, 4)
LABELS = torch.zeros(1, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: resolve_device("gpu"), "--device: expected cpu, cuda or cuda:N, got 'gpu'"),
        (lambda: resolve_device("meta"), "--device: expected cpu, cuda or cuda:N, got 'meta'"),
        (
            lambda: resolve_device("cuda:7"),
            "--device: expected one of .* CUDA devices and the CPU, got 'cuda:7'",
        ),
        (lambda: bench(WORKLOADS["omniglot-5w1s"], iters=0), "iters, warmup: expected iters >= 1"),
        (lambda: replay.replay("x.npz", dtype="float16"), "dtype: expected float64 or float32"),  # type: ignore[arg-type]
        (lambda: data.load("strokes").split("all"), "split: expected one of train, val, test, got 'all'"),
        (lambda: data.load("cifar-fs", protocol="x"), "protocol: expected one of normalised"),
        (lambda: data.load("cifar-fs", image_size=0), "image_size: expected at least 1, got 0"),
        (lambda: data.load("folder", image_size=0), "image_size: expected at least 1, got 0"),
        (lambda: data.load("folder", channels=2), "channels: expected 1 or 3, got 2"),
        (lambda: data.load("miniimagenet", image_size=0), "image_size: expected at least 1, got 0"),
        (
            lambda: data.load("omniglot", image_size=106),
            r"image_size: expected 1 \.\. 105 for omniglot, got 106",
        ),
        (
            lambda: mf.Episode(ONE[0], LABELS[0, :1], ONE[0], LABELS[0]),
            "support_x and support_y: expected the same",
        ),
        (lambda: mf.EpisodeBatch(ONE, LABELS, ONE[:, :1], LABELS), "target_x and target_y: expected"),
        (lambda: testing.use_backend("cuda").__enter__(), "backend: expected python, native or triton"),
        (lambda: TrainConfig(seed=1.5), "seed: expected an integer, got 1.5"),  # type: ignore[arg-type]
        (lambda: TrainConfig(loss="mse"), "loss: expected cross_entropy to train on classes of images"),
    ],
)
def test_mistakes(mistake: Callable[[], object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(locate.ENV, raising=False)
    with pytest.raises(ValueError, match=message) as raised:
        mistake()
    assert "\n" not in str(raised.value)


def test_folders_that_lack_a_split_or_mix_sizes(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    for place in ("train/a", "train/b"):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / place / "0.png")
    with pytest.raises(data.DataError, match="expected train/, val/ and test/, missing val, test"):
        data.load("folder", tmp_path)
    Image.fromarray(np.zeros((6, 4, 3), np.uint8)).save(tmp_path / "train/b/1.png")
    for split in ("val", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "0.png")
    with pytest.raises(data.DataError, match="expected 4x4 like the others"):
        data.load("folder", tmp_path)


def test_a_missing_path_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(locate.ENV, str(tmp_path / "none"))
    with pytest.raises(data.DataError, match=f"{locate.ENV}: expected an existing file or folder"):
        data.load("omniglot")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_of_a_reader(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    locate.progress("reading", 1, 2)
    locate.progress("reading", 2, 2)
    assert capsys.readouterr().err == ("\rreading: 1/2\rreading: 2/2\n" if terminal else "reading: 2/2\n")


def test_numbers_that_json_has_not_are_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [float("nan"), 1.0], "y": (float("inf"),)})
    assert read_json(tmp_path / "a.json") == {"x": [None, 1.0], "y": [None]}
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        read_json(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="expected JSON, maximum recursion"):
        read_json(tmp_path / "c.json")
    assert append_line(tmp_path / "d.jsonl", {"z": float("nan")}) == len('{"z": null}\n')


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    heard: list[int | None] = []

    def run() -> None:
        with StopSignal() as stop:
            heard.append(stop.received)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert heard == [None]
    assert signal.getsignal(signal.SIGTERM) is before


def test_resnet12_is_built_from_its_seed() -> None:
    config = TrainConfig(model="resnet12", ways=3, init_seed=5, steps=1)
    one, two = (build_learner(config, 3, 84, engine="autograd").model.state_dict() for _ in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_processor_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError(os.strerror(2))

    assert cpu_name()
    monkeypatch.setattr("builtins.open", missing)
    assert cpu_name() == "cpu"


class Checkpointed(nn.Module):
    """Its hidden layer is not kept for the backward pass."""

    def __init__(self, *, offload: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.offload = offload

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        if not self.offload:
            return self.last(checkpoint(self.hidden, x, use_reentrant=False))  # type: ignore[no-any-return]
        with torch.autograd.graph.save_on_cpu():
            return self.last(self.hidden(x))  # type: ignore[no-any-return]


def vectors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = torch.randn(2, 2, 6, 4), torch.arange(3).repeat(2).expand(2, 6)
    return x[0], y, x[1], y


@pytest.mark.parametrize("how", ["reference", "autograd", "auto", "evaluate", "predictor", "adapt"])
def test_what_is_computed_again_with_other_weights_is_refused(how: str) -> None:
    """Within a checkpoint torch would differentiate at the weights before adaptation."""
    model, (x, y, *rest) = Checkpointed(), vectors()
    engine = how if how in ("reference", "autograd") else "auto"
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2), engine=engine)  # type: ignore[arg-type]
    batch = mf.EpisodeBatch(x, y, *rest)
    calls: dict[str, Callable[[], object]] = {
        "adapt": lambda: mf.adapt(model, x[0], y[0], 0.1),
        "predictor": lambda: learner.adapt(x[0], y[0]),
        "evaluate": lambda: learner.evaluate(batch),
    }
    with pytest.raises(
        ValueError, match=r"model: expected a forward without torch\.utils\.checkpoint"
    ) as raised:
        calls.get(how, lambda: learner.meta_gradient(batch))()
    assert "\n" not in str(raised.value)


def test_tensors_kept_elsewhere_are_the_same_tensors() -> None:
    torch.manual_seed(0)
    model = Checkpointed(offload=True).double()
    own = dict(model.named_parameters())
    x, y, tx, ty = (t.double() if t.is_floating_point() else t for t in vectors())

    def predicted(w: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, w["first.weight"], w["first.bias"]))
        return F.linear(hidden, w["last.weight"], w["last.bias"])

    fast = moved(F.cross_entropy(predicted(own, x[0]), y[0]), own, 0.3)
    expected = torch.autograd.grad(F.cross_entropy(predicted(fast, tx[0]), ty[0]), list(own.values()))
    fast = mf.adapt(model, x[0], y[0], 0.3)
    loss = F.cross_entropy(mf.reference.functional_call(model, fast, (tx[0],)), ty[0])
    torch.testing.assert_close(torch.autograd.grad(loss, list(own.values())), expected)


@pytest.mark.parametrize("engine", ["reference", "autograd", "auto"])
@pytest.mark.parametrize(("whole", "kind"), [(True, "script"), (False, "script"), (True, "trace")])
def test_scripted_parameters_are_refused(engine: str, whole: bool, kind: str) -> None:
    """Theirs cannot be replaced for a call; a scripted activation has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of torch.jit
        warnings.simplefilter("ignore", FutureWarning)  # as of torch 2.14
        part: nn.Module = nn.Linear(4, 3)
        part = torch.jit.trace(part, torch.ones(2, 4)) if kind == "trace" else torch.jit.script(part)  # type: ignore[no-untyped-call]
        model = part if whole else nn.Sequential(nn.Linear(4, 4), part)
    name = "it" if whole else "1"
    with pytest.raises(
        TypeError, match=f"^model: expected modules whose .*, {name} is a torch.jit"
    ) as raised:
        mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2), engine=engine)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
