"""ANIL as learn2learn's users write it: the body computes features, `MAML` adapts the head; or, as KFO, `GBML` does."""

import random

import learn2learn as l2l
import numpy as np
import torch
from learn2learn.data.transforms import ConsecutiveLabels, FusedNWaysKShots, LoadData, RemapLabels
from torch import nn


def main(
    images, labels, ways=5, shots=1, tasks=4, steps=5, iterations=1, hidden=64, kronecker=False, seed=42
):
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)

    dataset = l2l.data.MetaDataset(torch.utils.data.TensorDataset(images, labels))
    taskset = l2l.data.Taskset(
        dataset,
        task_transforms=[
            FusedNWaysKShots(dataset, n=ways, k=2 * shots),
            LoadData(dataset),
            RemapLabels(dataset),
            ConsecutiveLabels(dataset),
        ],
        num_tasks=20000,
    )

    model = l2l.vision.models.CNN4(ways, hidden_size=hidden, channels=1, embedding_size=hidden)
    model.to(images.dtype)
    features, head = model.features, model.classifier
    if kronecker:
        transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
        head = l2l.algorithms.GBML(head, transform=transform, lr=0.1, adapt_transform=False)
        head.to(images.dtype)
    else:
        head = l2l.algorithms.MAML(head, lr=0.1)
    everything = [*features.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(everything, lr=0.001)
    loss = nn.CrossEntropyLoss(reduction="mean")

    losses, accuracies, gradients = [], [], []
    for _ in range(iterations):
        optimizer.zero_grad()
        for _ in range(tasks):
            learner = head.clone()
            data, targets = taskset.sample()
            (support, support_y), (query, query_y) = l2l.data.partition_task(
                features(data), targets, shots=shots
            )
            for _ in range(steps):
                learner.adapt(loss(learner(support), support_y))
            predictions = learner(query)
            error = loss(predictions, query_y)
            error.backward()
            losses.append(error.detach())
            accuracies.append((predictions.argmax(1) == query_y).double().mean())
        gradients = gradients or [p.grad.clone() for p in everything]
        optimizer.step()
    return {
        "losses": losses,
        "accuracies": accuracies,
        "meta-gradients": gradients,
        "parameters": [p.detach() for p in everything],
        "buffers": [b.double() for b in features.buffers()],
    }
