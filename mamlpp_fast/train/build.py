"""From a configuration to the things it names: device, data, samplers, network, learner."""

from __future__ import annotations

import platform
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mamlpp_fast import data as datasets
from mamlpp_fast._seeded import seeded
from mamlpp_fast._version import __version__
from mamlpp_fast.data import EpisodeSampler, FewShotData
from mamlpp_fast.data.classes import SPLITS
from mamlpp_fast.engine import EngineName, Precision, dtype_of
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.models import Conv4, ResNet12
from mamlpp_fast.reference import PerStepBatchNorm2d
from mamlpp_fast.train.config import TrainConfig

__all__ = [
    "build_learner",
    "device_name",
    "fingerprint",
    "load_data",
    "make_sampler",
    "versions",
]


def device_name(device: torch.device) -> str:
    """The GPU's own name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def load_data(config: TrainConfig, path: str | Path | None) -> FewShotData:
    """The data set of a configuration; see :func:`mamlpp_fast.data.load`."""
    return datasets.load(config.dataset, path, protocol=config.data_protocol, image_size=config.image_size)


def make_sampler(
    config: TrainConfig, data: FewShotData, split: str, device: torch.device, precision: Precision
) -> EpisodeSampler:
    """The tasks of a split: those of training, of every validation, or of the test."""
    seeds = {"train": config.training_seed, "val": config.val_seed, "test": config.test_seed}
    return data.sampler(
        split,
        ways=config.ways,
        shots=config.shots,
        targets=config.targets,
        seed=seeds[split],
        device=device,
        dtype=dtype_of(precision),
        sampling=config.sampling,
    )


def build_learner(
    config: TrainConfig,
    channels: int,
    image_size: int,
    *,
    engine: EngineName = "auto",
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
    process_group: dist.ProcessGroup | None = None,
) -> MAMLPlusPlus:
    """A learner at its initial parameters, which depend on ``config.initial_seed`` alone.

    Args:
        config: the run's configuration.
        channels: channels of the images.
        image_size: their height and width in pixels.
        engine: see :class:`mamlpp_fast.MAMLPlusPlus`, as for the others.
        precision: ditto.
        device: ditto.
        process_group: ditto.
    """
    with seeded(config.initial_seed):
        if config.model == "conv4":
            model: torch.nn.Module = Conv4(
                channels,
                config.ways,
                image_size=image_size,
                filters=config.filters,
                stages=config.stages,
                num_steps=config.steps,
                max_pool=config.max_pool,
                norm=config.norm,
                per_step_affine=config.bnwb,
                per_step_stats=config.bnrs,
            )
        else:
            model = ResNet12(
                channels,
                config.ways,
                num_steps=config.steps,
                per_step_affine=config.bnwb,
                per_step_stats=config.bnrs,
            )
    for module in model.modules():
        if isinstance(module, PerStepBatchNorm2d):
            module.weight.requires_grad_(config.learn_gamma)
            module.bias.requires_grad_(config.learn_beta)
    return MAMLPlusPlus(
        model,
        config.learner_config(),
        engine=engine,
        precision=precision,
        device=device,
        process_group=process_group,
    )


def fingerprint(data: FewShotData) -> dict[str, Any]:
    """What tells one data set from another: sizes of the splits and a checksum of 64 images of each."""
    result: dict[str, Any] = {"name": data.name, "protocol": data.protocol}
    for name in SPLITS:
        split = data.split(name)
        rows = torch.linspace(0, len(split.images) - 1, 64).long()
        pixels = np.ascontiguousarray(split.images[rows.to(split.images.device)].cpu().numpy())
        result[name] = [
            split.num_classes,
            len(split.images),
            *split.image_shape,
            zlib.crc32(pixels.tobytes()),
        ]
    return result


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {
        "mamlpp_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found
