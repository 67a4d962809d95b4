"""Networks: sizes, parameter counts of the published ones, layer norm, bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mamlpp_fast as mf
from mamlpp_fast.models import DropBlock


@pytest.mark.parametrize(
    ("channels", "ways", "size", "filters", "adapted", "trainable", "with_rates"),
    [
        (1, 5, 28, 64, 111_749, 114_309, 114_369),
        (1, 20, 28, 64, 112_724, 115_284, 115_344),
        (3, 5, 84, 48, 69_701, 71_621, 71_681),
    ],
    ids=["omniglot-5w", "omniglot-20w", "miniimagenet"],
)
def test_conv4_has_the_published_number_of_parameters(
    channels: int, ways: int, size: int, filters: int, adapted: int, trainable: int, with_rates: int
) -> None:
    """Spec 1.1; the authors count K + 1 rates a tensor, one of which no step uses."""
    learner = mf.MAMLPlusPlus(mf.Conv4(channels, ways, image_size=size, filters=filters), engine="reference")
    total = sum(p.numel() for p in learner.model.parameters())
    assert sum(learner.rates.sizes) == adapted
    assert total == trainable
    assert total + learner.rates.rates.numel() + len(learner.rates.names) == with_rates


@pytest.mark.parametrize(
    ("size", "max_pool", "features"),
    [(28, True, 64), (84, True, 25 * 64), (28, False, 64), (84, False, 64), (42, True, 4 * 64)],
)
def test_conv4_spatial_sizes(size: int, max_pool: bool, features: int) -> None:
    model = mf.Conv4(1, 5, image_size=size, max_pool=max_pool)
    assert model.head.in_features == features
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 5)


def test_conv4_with_layer_norm_keeps_its_scale_fixed() -> None:
    model = mf.Conv4(1, 5, image_size=14, filters=4, stages=2, norm="layer")
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert [n.normalized_shape for n in norms] == [(4, 14, 14), (4, 7, 7)]
    assert not any(n.weight.requires_grad for n in norms) and all(n.bias.requires_grad for n in norms)
    learner = mf.MAMLPlusPlus(model, engine="reference")
    assert "blocks.0.conv.bias" in learner.rates.names
    assert not any("norm" in name for name in learner.rates.names)


def test_conv4_starts_as_the_authors_initialise() -> None:
    model = mf.Conv4(1, 5)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".norm." in name:
            assert (p == 1).all(), name
        else:
            fan = p.shape[1] * p[0, 0].numel() + p.shape[0] * p[0, 0].numel()
            bound = (6 / fan) ** 0.5
            assert bound * 0.9 < p.abs().max() <= bound, name


@pytest.mark.parametrize("size", [32, 84])
def test_resnet12_shape_and_width(size: int) -> None:
    model = mf.ResNet12(3, 5, filters=(4, 6, 8, 10), num_steps=2)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 5)


def test_resnet12_has_the_usual_number_of_parameters() -> None:
    """12.4 million in the backbone, as in MetaOptNet (Lee et al. 2019)."""
    model = mf.ResNet12(3, 5, num_steps=1)
    backbone = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head"))
    assert backbone == 12_424_320


def test_drop_block_keeps_the_mean_in_training_and_everything_in_evaluation() -> None:
    torch.manual_seed(0)
    drop, x = DropBlock(0.2, 3), torch.ones(64, 4, 12, 12)
    y = drop(x)
    assert y.mean() == pytest.approx(1, abs=1e-5)
    assert (y == 0).float().mean() == pytest.approx(0.2, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 8}, "image_size: expected at least 16 for 4 stages, got 8"),
        ({"filters": 0}, "filters: expected at least 1"),
        ({"norm": "group"}, "norm: expected 'batch' or 'layer', got 'group'"),
        ({"num_steps": 0}, "num_steps: expected at least 1"),
    ],
    ids=["size", "filters", "norm", "steps"],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mf.Conv4(1, 5, **arguments)  # type: ignore[arg-type]
