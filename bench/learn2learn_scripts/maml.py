"""MAML as learn2learn's users write it: one loop over tasks, `clone`, `adapt`, `backward`."""

import random

import learn2learn as l2l
import numpy as np
import torch
from learn2learn.data.transforms import ConsecutiveLabels, KShots, LoadData, NWays, RemapLabels
from torch import nn, optim


def accuracy(predictions, targets):
    predictions = predictions.argmax(dim=1).view(targets.shape)
    return (predictions == targets).sum().float() / targets.size(0)


def fast_adapt(batch, learner, loss, steps, shots, ways):
    data, labels = batch
    adaptation = np.zeros(data.size(0), dtype=bool)
    adaptation[np.arange(shots * ways) * 2] = True
    evaluation = torch.from_numpy(~adaptation)
    adaptation = torch.from_numpy(adaptation)
    for _ in range(steps):
        learner.adapt(loss(learner(data[adaptation]), labels[adaptation]))
    predictions = learner(data[evaluation])
    return loss(predictions, labels[evaluation]), accuracy(predictions, labels[evaluation])


def own_network(ways, hidden):
    layers = []
    for channels in (1, hidden, hidden, hidden):
        layers += [
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden, ways))


def main(
    images, labels, ways=5, shots=1, tasks=4, steps=5, iterations=1, hidden=64,
    first_order=False, learner="maml", own=False, seed=42,
):  # fmt: skip
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)

    dataset = l2l.data.MetaDataset(torch.utils.data.TensorDataset(images, labels))
    taskset = l2l.data.Taskset(
        dataset,
        task_transforms=[
            NWays(dataset, ways),
            KShots(dataset, 2 * shots),
            LoadData(dataset),
            RemapLabels(dataset),
            ConsecutiveLabels(dataset),
        ],
        num_tasks=20000,
    )

    model = own_network(ways, hidden) if own else l2l.vision.models.OmniglotCNN(ways, hidden)
    model.to(images.dtype)
    if learner == "meta-sgd":
        maml = l2l.algorithms.MetaSGD(model, lr=0.1, first_order=first_order)
    else:
        maml = l2l.algorithms.MAML(model, lr=0.1, first_order=first_order)
    optimizer = optim.Adam(maml.parameters(), 0.003)
    loss = nn.CrossEntropyLoss(reduction="mean")

    losses, accuracies, gradients = [], [], []
    for _ in range(iterations):
        optimizer.zero_grad()
        for _ in range(tasks):
            learned = maml.clone()
            error, share = fast_adapt(taskset.sample(), learned, loss, steps, shots, ways)
            error.backward()
            losses.append(error.detach())
            accuracies.append(share)
        for p in maml.parameters():
            p.grad.data.mul_(1.0 / tasks)
        gradients = gradients or [p.grad.clone() for p in maml.parameters()]
        optimizer.step()
    return {
        "losses": losses,
        "accuracies": accuracies,
        "meta-gradients": gradients,
        "parameters": [p.detach() for p in maml.parameters()],
        "buffers": [b.double() for b in maml.buffers()],
    }
