"""The authors' code as far as its files go: experiment files, and a network with their names, order and Adam."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_fast as mf


def shipped(dataset: str, ways: int, shots: int, *, maml: bool = False) -> dict[str, Any]:
    """One of their shipped experiments: the table of ways, shots, batch, filters, rates and epochs."""
    omniglot = dataset == "omniglot"
    return {
        "batch_size": 8 if omniglot else 2,
        "image_height": 28 if omniglot else 84,
        "image_width": 28 if omniglot else 84,
        "image_channels": 1 if omniglot else 3,
        "gpu_to_use": 0,
        "num_dataprovider_workers": 4,
        "max_models_to_save": 5,
        "dataset_name": "omniglot_dataset" if omniglot else "mini_imagenet_full_size",
        "dataset_path": "omniglot_dataset" if omniglot else "mini_imagenet_full_size",
        "reset_stored_paths": False,
        "experiment_name": f"{dataset}_{ways}_{shots}_{'maml' if maml else 'maml++'}",
        "train_seed": 0,
        "val_seed": 0,
        "train_val_test_split": [0.70918052988, 0.03080714725, 0.2606284658]
        if omniglot
        else [0.64, 0.16, 0.2],
        "indexes_of_folders_indicating_class": [-3, -2],
        "load_from_npz_files": False,
        "sets_are_pre_split": not omniglot,
        "load_into_memory": True,
        "init_inner_loop_learning_rate": 0.1 if omniglot else 0.01,
        "train_in_stages": False,
        "multi_step_loss_num_epochs": 10 if omniglot else 15,
        "minimum_per_task_contribution": 0.01,
        "num_evaluation_tasks": 600,
        "learnable_per_layer_per_step_inner_loop_learning_rate": not maml,
        "enable_inner_loop_optimizable_bn_params": False,
        "evaluate_on_test_set_only": False,
        "total_epochs": 100,
        "total_iter_per_epoch": 500,
        "continue_from_epoch": -2,
        "max_pooling": True,
        "per_step_bn_statistics": not maml,
        "learnable_batch_norm_momentum": False,
        "evalute_on_test_set_only": False,
        "learnable_bn_gamma": True,
        "learnable_bn_beta": True,
        "weight_decay": 0.0,
        "dropout_rate_value": 0.0,
        "min_learning_rate": 0.00001 if omniglot else 0.001,
        "meta_learning_rate": 0.001,
        "total_epochs_before_pause": 100,
        "first_order_to_second_order_epoch": -1,
        "norm_layer": "batch_norm",
        "cnn_num_filters": 64 if omniglot else 48,
        "num_stages": 4,
        "conv_padding": True,
        "number_of_training_steps_per_iter": 5,
        "number_of_evaluation_steps_per_iter": 5,
        "cnn_blocks_per_stage": 1,
        "num_classes_per_set": ways,
        "num_samples_per_class": shots,
        "num_target_samples": 1 if omniglot else 15,
        "second_order": True,
        "use_multi_step_loss_optimization": not maml,
    }


# A 2-way task of 8x8 images, small enough to train in a test.
TINY: dict[str, Any] = {
    "batch_size": 2,
    "image_height": 8,
    "image_width": 8,
    "num_classes_per_set": 2,
    "num_target_samples": 2,
    "cnn_num_filters": 4,
    "num_stages": 2,
    "number_of_training_steps_per_iter": 2,
    "number_of_evaluation_steps_per_iter": 2,
    "total_epochs": 3,
    "total_iter_per_epoch": 3,
    "multi_step_loss_num_epochs": 2,
    "num_evaluation_tasks": 4,
}


def write_experiment(path: Path, **changes: Any) -> Path:
    """An experiment file: the shipped 5-way 1-shot Omniglot one with changes."""
    path.write_text(json.dumps(shipped("omniglot", 5, 1) | changes))
    return path


class _Named(nn.Module):
    """Parameters by name, in order."""

    def __init__(self, **parameters: nn.Parameter) -> None:
        super().__init__()
        for name, p in parameters.items():
            self.register_parameter(name, p)


class _Stage(nn.Module):
    def __init__(self, channels: int, filters: int, rows: tuple[int, ...], gamma: bool, beta: bool) -> None:
        super().__init__()

        def fixed(value: float) -> nn.Parameter:
            return nn.Parameter(torch.full((*rows, filters), value), requires_grad=False)

        self.conv = _Named(
            weight=nn.Parameter(torch.randn(filters, channels, 3, 3) * 0.3),
            bias=nn.Parameter(torch.zeros(filters)),
        )
        self.norm_layer = _Named(
            running_mean=fixed(0.0),
            running_var=fixed(1.0),
            bias=nn.Parameter(torch.randn(*rows, filters) * 0.1, requires_grad=beta),
            weight=nn.Parameter(1 + torch.randn(*rows, filters) * 0.1, requires_grad=gamma),
        )


_STAGES = 2


class TheirSystem(nn.Module):
    """Their learner in plain PyTorch: state dict, inner loop, multi-step loss, Adam over all that is trained."""

    def __init__(self, config: mf.MAMLConfig, *, gamma: bool = True, beta: bool = True) -> None:
        super().__init__()
        self.config, self.iteration = config, 0
        steps = config.steps
        self.classifier = nn.Module()
        layers = nn.ModuleDict()
        for i in range(_STAGES):
            rows = (steps,) if config.bnwb else ()
            layers[f"conv{i}"] = _Stage(1 if i == 0 else 4, 4, rows, gamma, beta)
        layers["linear"] = _Named(
            weights=nn.Parameter(torch.randn(2, 16) * 0.3), bias=nn.Parameter(torch.zeros(2))
        )
        self.classifier.layer_dict = layers
        self.inner_loop_optimizer = nn.Module()
        rates = self.inner_loop_optimizer.names_learning_rates_dict = nn.ParameterDict()
        for name, p in self.classifier.named_parameters():
            if p.requires_grad and (config.adapt_norm or "norm_layer" not in name):
                # One by one, as they do: from a dict they would be sorted.
                rates[name.replace(".", "-")] = nn.Parameter(
                    torch.full((steps + 1,), 0.1) + torch.rand(steps + 1) * 0.05, requires_grad=config.lslr
                )
        self.double()
        self.optimizer = torch.optim.Adam(
            [p for p in self.parameters() if p.requires_grad], lr=config.meta_lr
        )

    def _forward(self, x: Tensor, fast: dict[str, Tensor], step: int) -> Tensor:
        def get(name: str) -> Tensor:
            return fast[name] if name in fast else self.classifier.get_parameter(name)

        for i in range(_STAGES):
            layer = f"layer_dict.conv{i}"
            x = F.conv2d(x, get(f"{layer}.conv.weight"), get(f"{layer}.conv.bias"), padding=1)
            gamma, beta = get(f"{layer}.norm_layer.weight"), get(f"{layer}.norm_layer.bias")
            if self.config.bnwb:
                gamma, beta = gamma[step], beta[step]
            x = F.batch_norm(x, None, None, gamma, beta, training=True)
            x = F.max_pool2d(F.leaky_relu(x), 2)
        return F.linear(x.flatten(1), get("layer_dict.linear.weights"), get("layer_dict.linear.bias"))

    def step(self, batch: mf.EpisodeBatch) -> float:
        """One meta-update."""
        c = self.config
        epoch = self.iteration // c.iterations_per_epoch
        weights = mf.reference.msl_weights(epoch, c.steps, c.msl_epochs) if c.msl else None
        rates = self.inner_loop_optimizer.names_learning_rates_dict
        losses = []
        for t in range(batch.num_tasks):
            fast = {n.replace("-", "."): self.classifier.get_parameter(n.replace("-", ".")) for n in rates}
            total = torch.zeros((), dtype=torch.float64)
            for k in range(c.steps):
                loss = F.cross_entropy(self._forward(batch.support_x[t], fast, k), batch.support_y[t])
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {
                    name: p - rates[name.replace(".", "-")][k] * g
                    for (name, p), g in zip(fast.items(), grads, strict=True)
                }
                if weights is not None or k == c.steps - 1:
                    target = F.cross_entropy(self._forward(batch.target_x[t], fast, k), batch.target_y[t])
                    total = total + target * (1 if weights is None else weights[k])
            losses.append(total)
        for group in self.optimizer.param_groups:
            group["lr"] = mf.reference.cosine_annealing(epoch, c.epochs, c.meta_lr, c.min_meta_lr)
        self.optimizer.zero_grad()
        mean = torch.stack(losses).mean()
        mean.backward()
        self.optimizer.step()
        self.iteration += 1
        return float(mean.detach())

    def trained(self, updates: int, seed: int = 0) -> Self:
        """After so many meta-updates on :func:`their_batches`."""
        for batch in their_batches(updates, seed):
            self.step(batch)
        return self

    def state(self, accuracies: list[float]) -> dict[str, Any]:
        """What they save at the end of an epoch; ``accuracies`` are those of validation, an epoch each."""
        names = ("train_loss_mean", "train_accuracy_mean", "val_loss_mean", "val_accuracy_mean")
        best = int(np.argmax(accuracies))
        return {
            "best_val_acc": np.float64(accuracies[best]),
            "best_val_iter": (best + 1) * self.config.iterations_per_epoch,
            "current_iter": self.iteration,
            "best_epoch": best + 1,
            # They add the epoch that ends to the lists after saving.
            "per_epoch_statistics": {n: [np.float64(a) for a in accuracies[:-1]] for n in names},
            **{n: np.float64(accuracies[-1]) for n in names},
            "network": self.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }


def their_batches(count: int, seed: int = 0) -> Iterator[mf.EpisodeBatch]:
    """Meta-batches of two 2-way tasks of 8x8 images, in float64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2).repeat_interleave(2).expand(2, 4)
    for _ in range(count):
        x = torch.rand(2, 2, 4, 1, 8, 8, generator=generator, dtype=torch.float64)
        yield mf.EpisodeBatch(x[:, 0], labels, x[:, 1], labels)
