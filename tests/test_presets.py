"""Presets against the published settings, and the settings of a run."""

import dataclasses

import pytest

from mamlpp_fast.train.config import TrainConfig, parse_settings
from mamlpp_fast.train.presets import DEFAULT_PRESET, preset, preset_names


def test_every_name_resolves() -> None:
    names = preset_names()
    assert len(names) == len(set(names))
    assert len({preset(name) for name in names}) > 100


@pytest.mark.parametrize("ways", [5, 20])
@pytest.mark.parametrize("shots", [1, 5])
def test_omniglot_is_as_the_authors_run_it(ways: int, shots: int) -> None:
    c = preset(f"omniglot-{ways}w{shots}s")
    assert (c.dataset, c.ways, c.shots, c.targets, c.tasks, c.filters) == ("omniglot", ways, shots, 1, 8, 64)
    assert (c.steps, c.msl_epochs, c.inner_lr, c.da_epoch) == (5, 10, 0.1, -1)
    assert (c.meta_lr, c.min_meta_lr, c.adam_betas) == (1e-3, 1e-5, (0.9, 0.999))
    assert (c.epochs, c.iterations_per_epoch, c.val_tasks, c.test_tasks, c.ensemble) == (
        100,
        500,
        600,
        600,
        5,
    )
    assert c.second_order
    assert c.msl
    assert c.lslr
    assert c.bnwb
    assert c.bnrs
    assert c.clamp_meta_gradient is None


@pytest.mark.parametrize("shots", [1, 5])
def test_mini_imagenet_has_the_documented_inner_rate(shots: int) -> None:
    c = preset(f"miniimagenet-5w{shots}s")
    assert (c.dataset, c.ways, c.shots, c.targets, c.tasks, c.filters) == (
        "miniimagenet",
        5,
        shots,
        15,
        2,
        48,
    )
    assert (c.steps, c.msl_epochs, c.inner_lr) == (5, 15, 0.01)
    assert (c.meta_lr, c.min_meta_lr, c.clamp_meta_gradient) == (1e-3, 1e-3, 10.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_inner_steps_by_name(steps: int) -> None:
    name = f"miniimagenet-5w1s-{steps}step{'s' if steps > 1 else ''}"
    assert preset(name) == preset("miniimagenet-5w1s", {"steps": steps})


def test_authors_code_differs_in_rate_draws_and_seeds_alone() -> None:
    ours, theirs = preset("miniimagenet-5w1s"), preset("miniimagenet-5w1s-authors-code")
    changed = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)}
    assert changed == {"inner_lr", "sampling", "init_seed", "val_seed", "test_seed"}
    assert theirs.inner_lr == 0.1
    assert (theirs.initial_seed, theirs.training_seed, theirs.val_seed, theirs.test_seed) == (925765, 0, 0, 0)


def test_paper_is_as_published() -> None:
    omniglot, one, five = (
        preset(f"{n}-paper") for n in ("omniglot-20w1s", "miniimagenet-5w1s", "miniimagenet-5w5s")
    )
    assert (omniglot.tasks, one.tasks, five.tasks) == (16, 4, 2)
    for c in (omniglot, one, five):
        assert (c.epochs, c.adam_betas, c.da_epoch, c.ensemble) == (150, (0.9, 0.99), 50, 3)
        assert (c.cosine_annealing, c.min_meta_lr) == (True, 1e-5)
    maml = preset("omniglot-20w1s-maml-paper")
    assert (maml.da_epoch, maml.cosine_annealing) == (-1, False)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("maml", {}),
        ("maml-msl", {"msl": True}),
        ("maml-lslr", {"lslr": True}),
        ("maml-bnwb-bnrs", {"bnwb": True, "bnrs": True}),
        ("maml-da", {"da_epoch": 50}),
        ("fomaml", {"second_order": False}),
        ("meta-sgd", {"lslr": True, "rates": "element"}),
        ("anil", {"adapt": "head"}),
    ],
)
def test_variants_are_rows_of_the_table(variant: str, changes: dict[str, object]) -> None:
    off = {"msl": False, "lslr": False, "bnwb": False, "bnrs": False}
    assert preset(f"omniglot-20w1s-{variant}") == preset("omniglot-20w1s", off | changes)


def test_default_is_embedded_and_small() -> None:
    c = preset(DEFAULT_PRESET)
    assert c.dataset == "strokes"
    assert c.iterations <= 1000
    assert c.msl
    assert c.lslr
    assert c.bnwb


@pytest.mark.parametrize("name", ["omniglot-20w1", "strokes-paper", "maml", "omniglot-20w1s-", ""])
def test_unknown_preset(name: str) -> None:
    with pytest.raises(ValueError, match=r"^preset: expected .* got "):
        preset(name)


def test_near_miss_is_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'omniglot-20w1s'"):
        preset("omniglot-20w1")
    with pytest.raises(ValueError, match="did you mean 'inner_lr'"):
        parse_settings(["inner_rl=0.1"])


def test_settings_take_the_type_of_their_key() -> None:
    texts = [
        "steps=3",
        "inner-lr=1e-2",
        "msl=off",
        "eval_steps=none",
        "adam_betas=0.9,0.99",
        "adapt=head",
        "seed=7",
    ]
    assert parse_settings(texts) == {
        "steps": 3,
        "inner_lr": 0.01,
        "msl": False,
        "eval_steps": None,
        "adam_betas": (0.9, 0.99),
        "adapt": "head",
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "expected key=value"),
        ("steps=many", "steps: expected an integer, got 'many'"),
        ("msl=maybe", "msl: expected true or false"),
        ("inner_lr=x", "inner_lr: expected a number"),
        ("adam_betas=0.9,x", "adam_betas: expected numbers"),
        ("steps=0", "steps: expected at least 1, got 0"),
        ("ways=1", "ways: expected at least 2, got 1"),
        ("meta_lr=nan", "meta_lr: expected a number"),
        ("meta_lr=inf", "meta_lr: expected a number"),
        ("checkpoint_seconds=-1", "checkpoint_seconds: expected at least 0"),
        ("dataset=omniglott", "did you mean 'omniglot'"),
        ("model=vgg", "model: expected one of conv4, resnet12"),
        ("loss=mse", "loss: expected cross_entropy"),
    ],
)
def test_a_wrong_setting_says_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("strokes", parse_settings([text]))


def test_seeds_of_initialisation_and_tasks_are_independent() -> None:
    runs = [TrainConfig(seed=s) for s in range(50)]
    assert len({r.initial_seed for r in runs} | {r.training_seed for r in runs}) == 100
    one = TrainConfig(seed=3, init_seed=5)
    assert (one.initial_seed, one.training_seed) == (5, runs[3].training_seed)
