"""MoCo: a queue of keys from a momentum encoder, for training in small batches.

The data are 200 classes in 20 groups of similar classes; the labels are not trained on. Two views
of an item show the same content and different nuisances. In a batch of 8 an item rarely meets one
of its own group, so the negatives in the batch are soon too easy. MoCo takes its negatives from a
queue of the last 2,048 keys. A second encoder computes them, whose weights are a moving average of
the first one's, so that old keys stay comparable with new ones. `in_batch=False` leaves the other
keys of the batch out of the negatives.

Accuracy of the 10 nearest neighbours, mean ± standard deviation of 3 seeds: 40.0 ± 2.9 % before
training, 75.7 ± 2.2 % with the negatives in the batch, 79.9 ± 1.9 % with the queue, 76.7 ± 1.9 %
with a queue of the encoder's own keys (no momentum). With batches of 16 and 50 unrelated classes
the negatives in the batch did better than the queue.

    python examples/moco.py
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from ito_kernels import multi_positive_infonce, nt_xent_loss

GROUPS, CLASSES, HIDDEN, WIDTH = 20, 200, 16, 64
WITHIN, NUISANCE = 0.5, 1.5  # standard deviations within a class, and of the nuisances
TRAIN, TEST, NEIGHBOURS = 4000, 1000, 10
DIM, BATCH, STEPS, SCALE, QUEUE = 32, 8, 400, 20.0, 2048
SEEDS = range(3)


class World:
    """Items, of which every look is another view."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.mixing = self.normal(2 * HIDDEN, WIDTH) / HIDDEN**0.5
        group = torch.randint(GROUPS, (CLASSES,), generator=self.random)
        centers = 2 * self.normal(GROUPS, HIDDEN)[group] + self.normal(CLASSES, HIDDEN)
        self.labels = torch.randint(CLASSES, (TRAIN + TEST,), generator=self.random)
        self.content = centers[self.labels] + WITHIN * self.normal(TRAIN + TEST, HIDDEN)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def view(self, items: Tensor | slice) -> Tensor:
        content = self.content[items]
        nuisance = NUISANCE * self.normal(*content.shape)
        return (torch.cat([content, nuisance], 1) @ self.mixing).tanh()


def new_encoder(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, DIM))


def train_in_batch(world: World, seed: int) -> nn.Module:
    encoder = new_encoder(seed)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    for _ in range(STEPS):
        items = torch.randint(TRAIN, (BATCH,))
        x, y = (normalize(encoder(world.view(items)), dim=1) for _ in range(2))
        loss = nt_xent_loss(x, y, 1 / SCALE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder


def train_moco(world: World, seed: int, momentum: float) -> nn.Module:
    encoder = new_encoder(seed)
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    queue = normalize(torch.randn(QUEUE, DIM), dim=1)
    for step in range(STEPS):
        items = torch.randint(TRAIN, (BATCH,))
        queries = normalize(encoder(world.view(items)), dim=1)
        with torch.no_grad():
            keys = normalize(key_encoder(world.view(items)), dim=1)
        loss = multi_positive_infonce(
            queries, keys, SCALE, queue=queue, in_batch=False, symmetric=False
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(key_encoder.parameters(), encoder.parameters(), strict=True):
                slow.lerp_(fast, 1 - momentum)
        start = step * BATCH % QUEUE  # the oldest keys
        queue[start : start + BATCH] = keys
    return encoder


@torch.no_grad()
def knn_accuracy(encoder: nn.Module, world: World) -> float:
    """How often the nearest training items have mostly the label of a test item, in per cent."""
    x = normalize(encoder(world.view(slice(None))), dim=1)
    nearest = (x[TRAIN:] @ x[:TRAIN].T).topk(NEIGHBOURS, dim=1).indices
    votes = one_hot(world.labels[nearest], CLASSES).sum(1)
    return 100 * (votes.argmax(1) == world.labels[TRAIN:]).float().mean().item()


def main() -> None:
    arms = {
        "before training": lambda world, seed: new_encoder(seed),
        "the views themselves": lambda world, seed: nn.Identity(),
        "negatives in the batch": train_in_batch,
        "queue, momentum 0.99": lambda world, seed: train_moco(world, seed, 0.99),
        "queue, without momentum": lambda world, seed: train_moco(world, seed, 0.0),
    }
    print(f"accuracy of {NEIGHBOURS} nearest neighbours, {len(SEEDS)} seeds, batches of {BATCH}")
    found = {}
    for name, arm in arms.items():
        values = []
        for seed in SEEDS:
            world = World(seed)
            values.append(knn_accuracy(arm(world, seed), world))
        found[name] = torch.tensor(values)
        print(f"  {name:24} {found[name].mean():.1f} ± {found[name].std():.1f} %")
    moco = found["queue, momentum 0.99"]
    if not (moco > found["negatives in the batch"] + 1).all():
        raise SystemExit("the queue should add a point with every seed")
    if not moco.mean() > found["queue, without momentum"].mean() + 1:
        raise SystemExit("the momentum should add a point on average")


if __name__ == "__main__":
    main()
