"""What every peer on PyTorch starts from: Conv4 of torch's own modules, and the tasks as tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bench.peers.problem import STAGES, Problem

__all__ = ["Task", "adapts", "conv4", "finished", "tasks"]

Task = tuple[Tensor, Tensor, Tensor, Tensor]
# float32 means float32 on a GPU too.
torch.backends.cudnn.allow_tf32 = False


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def conv4(problem: Problem, device: str) -> nn.Sequential:
    """The network at the problem's weights; its batch norms know batch statistics only."""
    sizes, blocks, channels, size = problem.sizes, [], 1, problem.sizes.image_size
    for _ in range(STAGES):
        blocks.append(
            _named(
                conv=nn.Conv2d(channels, sizes.filters, 3, padding=1),
                norm=nn.BatchNorm2d(sizes.filters, track_running_stats=False),
                act=nn.LeakyReLU(0.01),
                pool=nn.MaxPool2d(2),
            )
        )
        channels, size = sizes.filters, size // 2
    model = _named(
        blocks=nn.Sequential(*blocks), flat=nn.Flatten(), head=nn.Linear(channels * size * size, sizes.ways)
    )
    state = {name: torch.from_numpy(value) for name, value in problem.weights.items()}
    model.to(device, state["head.weight"].dtype).load_state_dict(state)
    return model


def adapts(name: str) -> bool:
    """Whether the inner loop adapts the parameter of this name."""
    return ".norm." not in name


def tasks(problem: Problem, device: str) -> Task:
    """Support images and labels, target images and labels, each [tasks, ...]."""
    support_x, support_y, target_x, target_y = (torch.from_numpy(t).to(device) for t in problem.tasks)
    return support_x, support_y, target_x, target_y


def finished(loss: Tensor, model: nn.Module) -> tuple[Tensor, Mapping[str, Tensor | None]]:
    """Loss and ``.grad`` of every parameter, once the device is done."""
    if loss.is_cuda:
        torch.cuda.synchronize()
    return loss, {name: p.grad for name, p in model.named_parameters()}
