"""Distillation: a small dual encoder learns from a larger, frozen one.

The student has 500 pairs of an "image" and a "text". The teacher has seen 10,000 pairs of the same
kind, which come in 100 groups of similar pairs. `soft_target_infonce` trains the student to rank a
batch as the teacher does, so it also learns how similar the other pairs are, not just which pair is
the right one. It needs the teacher's embeddings of the 500 pairs only, computed once.

R@1 among 1,000 unseen pairs, mean ± standard deviation of 3 seeds: 20.5 ± 1.9 % alone, 29.3 ± 1.5 %
with the teacher (26.3 ± 2.4 % with alpha=0.5); the teacher has 62.9 ± 0.4 %. A teacher of the same
size that has seen the 500 pairs only helps too, to 24.0 ± 2.3 %. The rest of the gain is what the
teacher knows from other pairs.

    python examples/distill.py
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ito_kernels import clip_loss, soft_target_infonce

GROUPS, HIDDEN, WIDTH, NOISE = 100, 16, 64, 0.5
MANY, FEW, UNSEEN = 10000, 500, 1000
TEACHER, STUDENT, BATCH, STEPS = (256, 64), (32, 32), 128, 200  # width and dimension
SCALE, TARGET_SCALE = 20.0, 10.0
SEEDS = range(3)


def make_pairs(seed: int) -> tuple[Tensor, Tensor]:
    """Images and texts, (MANY + UNSEEN, WIDTH) each."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    count = MANY + UNSEEN
    group = torch.randint(GROUPS, (count,), generator=random)
    hidden = 2 * normal(GROUPS, HIDDEN)[group] + normal(count, HIDDEN)
    views = normal(2, HIDDEN, WIDTH) / HIDDEN**0.5
    images, texts = (hidden @ views).tanh() + NOISE * normal(2, count, WIDTH)
    return images, texts


class DualEncoder(nn.Module):
    def __init__(self, width: int, dim: int):
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, width), nn.ReLU(), nn.Linear(width, dim))
            for _ in range(2)
        )

    def forward(self, images: Tensor, texts: Tensor) -> list[Tensor]:
        pairs = zip(self.towers, (images, texts), strict=True)
        return [normalize(tower(x), dim=1) for tower, x in pairs]


def train(size: tuple[int, int], images: Tensor, texts: Tensor, seed: int, **teaching):
    """A dual encoder, trained by `clip_loss`, or by a teacher (see `student`)."""
    torch.manual_seed(seed)
    model = DualEncoder(*size)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,))
        image, text = model(images[rows], texts[rows])
        if teaching:
            loss = soft_target_infonce(
                image,
                text,
                SCALE,
                target_queries=teaching["image"][rows],
                target_keys=teaching["text"][rows],
                target_scale=TARGET_SCALE,
                alpha=teaching["alpha"],
            )
        else:
            loss = clip_loss(image, text, SCALE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def student(teacher: DualEncoder, alpha: float, images: Tensor, texts: Tensor, seed: int):
    """alpha: the weight of the teacher's targets; the pairs themselves have weight 1 - alpha."""
    image, text = teacher(images, texts)
    return train(STUDENT, images, texts, seed, image=image, text=text, alpha=alpha)


def recall(model: DualEncoder, images: Tensor, texts: Tensor) -> float:
    """How often the other half of a pair is found, mean of both directions, in per cent."""
    image, text = model(images, texts)
    right = torch.arange(len(image))
    scores = image @ text.T
    return 50 * sum((s.argmax(1) == right).float().mean().item() for s in (scores, scores.T))


def main() -> None:
    found = {}
    for seed in SEEDS:
        images, texts = make_pairs(seed)
        parts = slice(MANY), slice(FEW), slice(MANY, None)
        many, few, unseen = ((images[part], texts[part]) for part in parts)
        teacher = train(TEACHER, *many, seed)
        models = {
            f"teacher, {MANY} pairs": teacher,
            "student alone": train(STUDENT, *few, seed),
            "student, alpha=0.5": student(teacher, 0.5, *few, seed),
            "student, alpha=1": student(teacher, 1.0, *few, seed),
            f"of a teacher with {FEW} pairs": student(train(TEACHER, *few, seed), 1.0, *few, seed),
        }
        for name, model in models.items():
            found.setdefault(name, []).append(recall(model, *unseen))

    print(f"R@1 among {UNSEEN} unseen pairs, {len(SEEDS)} seeds (chance {100 / UNSEEN:.1f} %)")
    found = {name: torch.tensor(values) for name, values in found.items()}
    for name, values in found.items():
        print(f"  {name:28} {values.mean():.1f} ± {values.std():.1f} %")
    if not (found["student, alpha=1"] > found["student alone"] + 5).all():
        raise SystemExit("the teacher should add 5 points with every seed")


if __name__ == "__main__":
    main()
