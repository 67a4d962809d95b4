"""A model that is changed between calls: the learner ends where one made anew from the same state would."""

from __future__ import annotations

import copy
import functools
import os
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import moved, noise
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast import serving
from mamlpp_fast.engine.fingerprint import fingerprint
from mamlpp_fast.engine.watch import Watch

ENGINES = ("reference", "autograd", "auto")
CONFIG = mf.MAMLConfig.maml(steps=2, lslr=True, inner_lr=0.1)


class Net(nn.Module):
    def __init__(self, ways: int = 5) -> None:
        super().__init__()
        self.body = nn.Linear(10, 16)
        self.act: nn.Module = nn.ReLU()
        self.head = nn.Linear(16, ways)
        self.skip = False
        self.options: dict[str, Any] = {"scales": [1.0, 2.0]}
        self.offset = torch.zeros(16, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        if self.options["scales"][0] != 1.0:
            hidden = hidden * self.options["scales"][0]
        if self.offset.any():
            hidden = hidden + self.offset
        return self.head(hidden if self.skip else self.act(hidden))


def batch(ways: int = 5, seed: int = 1) -> mf.EpisodeBatch:
    return noise(10, images=ways, ways=ways, seed=seed)


def new(engine: str, model: nn.Module | None = None, config: mf.MAMLConfig = CONFIG) -> mf.MAMLPlusPlus:
    if model is None:
        torch.manual_seed(0)
        model = Net().double()
    return mf.MAMLPlusPlus(model, config, engine=engine, precision="float64")  # type: ignore[arg-type]


def fresh(learner: mf.MAMLPlusPlus) -> mf.MAMLPlusPlus:
    """A reference learner of a copy of the model, with the learner's inner rates by name."""
    made = new("reference", copy.deepcopy(learner.model), learner.config)
    with torch.no_grad():
        known = learner.rates.as_dict()
        for name, rate in made.rates.as_dict().items():
            rate.copy_(known[name])
    return made


def assert_as_if_made_anew(learner: mf.MAMLPlusPlus, b: mf.EpisodeBatch) -> None:
    predicted = learner.adapt(b.support_x[0], b.support_y[0])(b.target_x[0])
    found = learner.meta_gradient(b)
    expected = fresh(learner)
    wanted = expected.meta_gradient(b)
    assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    for ours, theirs in ((learner.model, expected.model), (learner.rates, expected.rates)):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    evaluation = expected.evaluate(b)
    assert_close(learner.evaluate(b), evaluation, rtol=1e-9, atol=1e-12)
    assert_close(predicted, evaluation.logits[-1, 0], rtol=1e-9, atol=1e-12)


def _double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def replace_head(model: Any, ways: int) -> None:
    torch.manual_seed(9)
    model.head = nn.Linear(16, ways)  # float32: the learner's dtype is put on


def wider_scale(model: Any) -> None:
    model.options["scales"][0] = 1.5


def shifted(model: Any) -> None:
    model.offset += 0.3


def own_forward(model: Any) -> None:
    model.forward = types.MethodType(lambda self, x: self.head(torch.relu(self.body(x)) * 0.5), model)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "values-in-place": lambda m: m.head.weight.data.zero_(),
    "load-state-dict": lambda m: m.load_state_dict(Net().double().state_dict()),
    "assigned-state-dict": lambda m: m.load_state_dict(Net().double().state_dict(), assign=True),
    "parameter-replaced": lambda m: setattr(m.head, "weight", nn.Parameter(torch.randn(5, 16).double())),
    "data-replaced": lambda m: setattr(m.head.weight, "data", torch.randn(16, 5).double().t()),
    "head-replaced": lambda m: replace_head(m, 5),
    "activation-replaced": lambda m: setattr(m, "act", nn.LeakyReLU(0.5)),
    "attribute": lambda m: setattr(m, "skip", True),
    "number-in-a-list-in-a-dictionary": wider_scale,
    "tensor-attribute-in-place": shifted,
    "hook": lambda m: m.body.register_forward_hook(_double),
    "own-forward": own_forward,
    "frozen": lambda m: m.body.requires_grad_(False),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_learner_follows(change: Callable[[Any], Any], engine: str) -> None:
    learner = new(engine)
    learner.meta_step(batch())
    learner.evaluate(batch())
    change(learner.model)
    assert_as_if_made_anew(learner, batch(seed=2))
    learner.meta_step(batch(seed=3))
    assert_as_if_made_anew(learner, batch(seed=4))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rates", ["tensor", "element"])
def test_a_head_for_another_number_of_ways(engine: str, rates: Any) -> None:
    config = mf.MAMLConfig.maml(steps=2, lslr=True, rates=rates)
    learner = new(engine, config=config)
    for seed in range(2):
        learner.meta_step(batch(seed=seed))
    before = {name: rate.detach().clone() for name, rate in learner.rates.as_dict().items()}
    parameter = learner.rates.rates
    replace_head(learner.model, 7)
    assert_as_if_made_anew(learner, batch(7))
    now = learner.rates.as_dict()
    for name in ("body.weight", "body.bias"):
        assert_close(now[name], before[name], rtol=0, atol=0)
    if rates == "tensor":
        assert learner.rates.rates is parameter
        assert_close(now["head.weight"], before["head.weight"], rtol=0, atol=0)
    else:
        assert now["head.weight"].shape == (2, 7, 16) and bool((now["head.weight"] == 0.1).all())
    learner.meta_step(batch(7))
    state = learner.state_dict()
    again = new(engine, copy.deepcopy(learner.model), config)
    again.load_state_dict(state)
    found, expected = (own.meta_step(batch(7, seed=8)) for own in (learner, again))
    assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_freezing_and_thawing_is_what_plain_pytorch_does(engine: str) -> None:
    """Textbook MAML and Adam with zero_grad(): frozen parameters stay and keep their moments."""
    config = mf.MAMLConfig.maml(steps=2, inner_lr=0.1, cosine_annealing=False)
    learner = new(engine, config=config)
    model = copy.deepcopy(learner.model)
    adam = torch.optim.Adam(model.parameters(), config.meta_lr, betas=config.adam_betas)

    def plain_step(b: mf.EpisodeBatch) -> None:
        adam.zero_grad()
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for task in b:
            fast = dict(own)
            for _ in range(2):
                loss = F.cross_entropy(
                    mf.reference.functional_call(model, fast, task.support_x), task.support_y
                )
                fast = moved(loss, fast, 0.1)
            loss = F.cross_entropy(mf.reference.functional_call(model, fast, task.target_x), task.target_y)
            (loss / 2).backward()
        adam.step()

    for phase, trains in enumerate((True, False, True)):
        for own in (learner.model, model):
            own.body.requires_grad_(trains)  # type: ignore[union-attr]
        before = model.body.weight.detach().clone()
        for i in range(2):
            b = batch(seed=2 * phase + i)
            learner.meta_step(b)
            plain_step(b)
            found, expected = (dict(own.named_parameters()) for own in (learner.model, model))
            assert_close(found, expected, rtol=1e-9, atol=1e-10)
        assert torch.equal(model.body.weight, before) != trains  # type: ignore[arg-type]
        assert learner.rates.names[0] == ("body.weight" if trains else "head.weight")


def test_parameters_frozen_from_the_start_join_when_they_are_thawed() -> None:
    model = Net().double()
    model.body.requires_grad_(False)
    learner = new("auto", model)
    learner.meta_step(batch())
    model.body.requires_grad_(True)
    before = model.body.weight.detach().clone()
    assert_as_if_made_anew(learner, batch(seed=2))
    learner.meta_step(batch(seed=2))
    assert not torch.equal(model.body.weight, before)
    thawed = learner.rates.as_dict()["body.weight"]
    assert_close(thawed, torch.full_like(thawed, 0.1), rtol=0, atol=2e-3)
    order = [id(p) for m in (model, learner.rates) for p in m.parameters()]
    assert [id(p) for p in learner.optimizer.param_groups[0]["params"]] == order


def test_auto_chooses_anew() -> None:
    learner = new("auto")
    learner.meta_step(batch())
    assert learner.engine.name == "fused"
    learner.model.act = nn.RReLU()  # draws
    learner.meta_step(batch())
    assert learner.engine.name == "autograd" and "act" in learner.engine_reason
    learner.model.act = nn.ReLU()
    learner.meta_step(batch())
    assert learner.engine.name == "fused"
    strict = new("fused")
    strict.model.act = nn.RReLU()
    for _ in range(2):
        with pytest.raises(ValueError, match="engine: expected a model"):
            strict.meta_step(batch())


def test_auto_writes_no_program_for_each_value_of_an_attribute() -> None:
    config = mf.MAMLConfig.maml(steps=2, inner_lr=0.1)
    learners = [new(engine, config=config) for engine in ("auto", "reference")]
    served = []
    for i in range(serving._SHORT + serving._FEW + 4):
        found = []
        for learner in learners:
            learner.model.options["scales"][0] = 1 + min(i, serving._SHORT + 2) / 8  # type: ignore[index, operator]
            found.append(learner.meta_step(batch(seed=i)).loss)
        assert_close(*found, rtol=1e-9, atol=1e-12)
        served.append(learners[0].engine.name)
        if i == serving._SHORT:
            assert "changes from call to call" in learners[0].engine_reason
    assert served[0] == served[-1] == "fused" and served[serving._SHORT] == "autograd"


def test_another_model_or_loss_altogether() -> None:
    learner = new("auto")
    learner.meta_step(batch())
    torch.manual_seed(4)
    learner.model = Net().double()
    learner.loss_fn = functools.partial(F.cross_entropy, label_smoothing=0.1)
    found = learner.evaluate(batch())
    made = mf.MAMLPlusPlus(
        copy.deepcopy(learner.model), CONFIG, engine="reference", precision="float64", loss_fn=learner.loss_fn
    )
    made.rates.load_state_dict(learner.rates.state_dict())
    assert_close(found, made.evaluate(batch()), rtol=1e-9, atol=1e-12)


def test_a_batch_norm_put_in_later_becomes_a_per_step_one() -> None:
    learner = new(
        "autograd",
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).double(),
        mf.MAMLConfig(steps=2),
    )
    x, y = torch.randn(2, 3, 1, 5, 5, dtype=torch.float64), torch.arange(3).repeat(2, 1)
    b = mf.EpisodeBatch(x, y, x + 0.1, y)
    learner.meta_step(b)
    learner.model[1] = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())  # type: ignore[operator]
    learner.meta_step(b)
    norm = learner.model.get_submodule("1.0")
    assert isinstance(norm, mf.PerStepBatchNorm2d) and norm.weight.shape == (2, 4)
    assert id(norm.weight) in {id(p) for p in learner.optimizer.param_groups[0]["params"]}


def test_what_a_pass_itself_changes_is_no_change() -> None:
    """Else every iteration would make a new engine, and capture a new graph."""

    class Keeps(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            self.kept = super().forward(x)
            return self.kept

    learner = new("autograd", Keeps().double())
    learner.meta_step(batch())
    engine = learner.engine
    for seed in range(2):
        learner.evaluate(batch(seed=seed))
        learner.adapt(batch().support_x[0], batch().support_y[0])
        learner.meta_step(batch(seed=seed))
    assert learner.engine is engine
    learner.model.skip = True
    learner.meta_step(batch())
    assert learner.engine is not engine


def test_channels_last_parameters_and_loaded_moments_are_updated_rightly() -> None:
    """PyTorch's fused Adam walks through parameter, gradient and moments as they lie in memory."""

    def made(layout: torch.memory_format) -> mf.MAMLPlusPlus:
        torch.manual_seed(0)
        model = mf.Conv4(3, 5, filters=4, image_size=12, stages=2, num_steps=2)
        return mf.MAMLPlusPlus(
            model.to(memory_format=layout), mf.MAMLConfig(steps=2), engine="fused", precision="float64"
        )

    plain, ours = made(torch.contiguous_format), made(torch.channels_last)
    x, y = torch.randn(2, 5, 3, 12, 12), torch.arange(5).repeat(2, 1)
    b = mf.EpisodeBatch(x, y, x + 0.1, y)
    for _ in range(2):
        plain.meta_step(b)
        ours.meta_step(b)
    ours.load_state_dict(plain.state_dict())
    for _ in range(2):
        plain.meta_step(b)
        ours.meta_step(b)
    found, expected = (dict(own.model.named_parameters()) for own in (ours, plain))
    assert_close(found, expected, rtol=1e-7, atol=1e-9, check_stride=False)


def test_a_parameter_that_is_a_slice_is_updated_rightly() -> None:
    def made(dense: bool) -> mf.MAMLPlusPlus:
        model = Net().double()
        torch.manual_seed(3)
        part = torch.randn(5, 32, dtype=torch.float64)[:, ::2]
        model.head.weight = nn.Parameter(part.contiguous() if dense else part)
        return mf.MAMLPlusPlus(model, CONFIG, engine="autograd", precision="float64")

    torch.manual_seed(0)
    expected = made(True)
    torch.manual_seed(0)
    ours = made(False)
    for learner in (expected, ours):
        learner.meta_step(batch())
    assert_close(dict(ours.model.named_parameters()), dict(expected.model.named_parameters()), rtol=0, atol=0)


# The fingerprint itself.


def test_a_fingerprint_stays_while_nothing_but_values_and_our_own_controls_change() -> None:
    model = mf.Conv4(1, 5, num_steps=2)
    before = fingerprint(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
            p.grad = torch.ones_like(p)
    mf.set_step(model, 1)
    mf.set_eval_stats(model, "running")
    assert fingerprint(model) == before and hash(fingerprint(model)) == hash(before)
    model(torch.randn(2, 1, 28, 28))
    assert fingerprint(model) == before
    network = nn.LSTM(3, 4)
    before = fingerprint(network)
    network.flatten_parameters()
    assert fingerprint(network) == before


def grad_hook(model: Any) -> None:
    model.head.weight.register_hook(lambda g: g)


def accumulate_hook(model: Any) -> None:
    model.head.weight.register_post_accumulate_grad_hook(lambda p: None)


def unregistered(model: Any) -> None:
    model.options["layers"][0].bias.requires_grad_(False)


SEEN: dict[str, Callable[[Any], Any]] = CHANGES | {
    "gradient-hook": grad_hook,
    "accumulate-hook": accumulate_hook,
    "backward-hook": lambda m: m.body.register_full_backward_hook(lambda *_: None),
    "pre-hook": lambda m: m.body.register_forward_pre_hook(lambda *_: None),
    "mode-of-one": lambda m: m.act.eval(),
    "buffer": lambda m: m.register_buffer("mean", torch.zeros(1)),
    "dtype": lambda m: m.float(),
    "namespace": lambda m: setattr(m.options["args"], "depth", 3),
    "module-in-a-list": unregistered,
    "another-function": lambda m: m.options.update(fn=torch.tanh),
    "true-for-one": lambda m: m.options.update(one=True),
    "grown": lambda m: m.options["many"].append(0),
    "class": lambda m: setattr(m, "__class__", type("Other", (Net,), {})),
}


@pytest.mark.parametrize("name", [n for n in SEEN if n not in ("values-in-place", "load-state-dict")])
def test_a_fingerprint_tells_changes(name: str) -> None:
    model = Net().double()
    model.options |= {
        "args": types.SimpleNamespace(depth=2), "layers": [nn.Linear(1, 1)], "fn": torch.relu, "one": 1,
        "many": [0] * 2000,
    }  # fmt: skip
    model.options["itself"] = model.options
    before, watch = fingerprint(model), Watch(model)
    assert not watch.changed(model)
    SEEN[name](model)
    assert fingerprint(model) != before and watch.changed(model)


def test_hooks_of_all_modules_are_seen() -> None:
    model = Net()
    before = fingerprint(model)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert fingerprint(model) != before
    assert fingerprint(model) == before


def test_an_address_used_again_is_not_taken_for_what_was_there() -> None:
    model = Net()
    prints = []
    for _ in range(20):
        model.act = nn.ReLU()
        prints.append(fingerprint(model))
    assert all(a != b for i, a in enumerate(prints) for b in prints[:i])


def test_a_scripted_module_is_looked_at_like_any_other() -> None:
    learner, plain = new("auto"), new("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of torch.jit
        warnings.simplefilter("ignore", FutureWarning)  # as of torch 2.14
        learner.model.act = torch.jit.script(nn.ReLU())  # type: ignore[no-untyped-call]
    for one in (learner, plain):
        one.meta_gradient(batch())
    assert learner.engine_reason == "not fused: act: is compiled"
    found, expected = ([p.grad for p in one.model.parameters()] for one in (learner, plain))
    assert_close(found, expected)


@pytest.mark.parametrize("read", [lambda: os.environ.get("SCALE", "1"), lambda: os.getenv("SCALE", "1")])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_environment_is_read_anew(
    engine: str, read: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scaled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(read())

    torch.manual_seed(0)
    learner = new(engine, Scaled().double())
    assert_as_if_made_anew(learner, batch())
    monkeypatch.setenv("SCALE", "3")
    assert_as_if_made_anew(learner, batch())
