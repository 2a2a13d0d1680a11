"""Three modalities of which no two have anything in common: pairwise losses learn nothing.

An item is a code of 16 random signs in each of two modalities, and the product of the two codes,
sign by sign, in the third (an exclusive or). Any two of them are independent, and any two determine
the third. Each modality is seen through a random matrix of its own, and with noise.

The task is to find the third modality of an item, given the other two, among 1,000 items.

    python examples/three_modalities.py
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ito_kernels import clip_loss, symile_loss

SIGNS, WIDTH, NOISE = 16, 32, 0.1
DIM, BATCH, STEPS, SCALE = 32, 128, 300, 100.0  # of the embeddings and the training
CANDIDATES = 1000


class World:
    """Draws items: three tensors (count, WIDTH), one for each modality."""

    def __init__(self):
        self.random = torch.Generator().manual_seed(0)
        self.views = torch.randn(3, SIGNS, WIDTH, generator=self.random)

    def items(self, count: int) -> list[Tensor]:
        first, second = torch.randint(2, (2, count, SIGNS), generator=self.random) * 2.0 - 1
        codes = torch.stack([first, second, first * second])
        seen = codes @ self.views / SIGNS**0.5
        return list(seen + NOISE * torch.randn(seen.shape, generator=self.random))


def symile(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return symile_loss([x, y, z], SCALE)


def pairwise(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (clip_loss(x, y, SCALE) + clip_loss(y, z, SCALE) + clip_loss(x, z, SCALE)) / 3


def accuracy(scores: Tensor) -> float:
    """How often the highest score of a row is that of its own item, in per cent."""
    return 100 * (scores.argmax(1) == torch.arange(len(scores))).float().mean().item()


def train(loss) -> tuple[Tensor, Tensor, Tensor]:
    """Train one linear encoder for each modality. Returns the embeddings of unseen items."""
    torch.manual_seed(0)
    world = World()
    encoders = nn.ModuleList(nn.Linear(WIDTH, DIM) for _ in range(3))
    optimizer = torch.optim.Adam(encoders.parameters(), lr=3e-3)

    def encode(items: list[Tensor]) -> list[Tensor]:
        return [normalize(f(x), dim=1) for f, x in zip(encoders, items, strict=True)]

    for _ in range(STEPS):
        value = loss(*encode(world.items(BATCH)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    with torch.no_grad():
        return encode(world.items(CANDIDATES))


def main() -> None:
    x, y, z = train(symile)
    found_by_symile = accuracy((x * y) @ z.T)
    x, y, z = train(pairwise)
    found_by_pairs = accuracy(x @ z.T + y @ z.T)
    print(
        f"found among {CANDIDATES} items: {found_by_symile:.1f} % with symile_loss,"
        f" {found_by_pairs:.1f} % with three pairwise losses (chance {100 / CANDIDATES:.1f} %)"
    )
    if not (found_by_symile > 90 and found_by_pairs < 1):
        raise SystemExit("symile_loss should find nearly all items, the pairwise losses none")


if __name__ == "__main__":
    main()
