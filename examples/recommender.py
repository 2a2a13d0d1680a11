"""A two-tower recommender with in-batch negatives: logQ correction and accidental hits.

Users click items by their taste and by the items' popularity, which follows Zipf's law. The
negatives of a click are the items of the other clicks in the batch, so popular items are negatives
far more often than others, and the towers learn to avoid them. `key_bias` = -log of an item's
frequency corrects this (logQ). A batch also has the same item many times; `equal_ids="ignore"`
keeps these accidental hits out of the negatives.

Recall@20 of unseen clicks, mean ± standard deviation of 3 seeds: 12.8 ± 0.6 % without both,
33.4 ± 0.5 % with logQ. The most popular items reach 24.6 ± 0.7 %, so without logQ the model is
worse than none. Ignoring accidental hits adds 0.1 points without logQ and nothing with it: all
copies of an item have the same embedding, which they pull and push at once.

    python examples/recommender.py
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ito_kernels import multi_positive_infonce

USERS, ITEMS, TASTES = 1000, 500, 8
TASTE, NOISE = 1.5, 0.5  # strength of the tastes; how badly a user's features show them
TRAIN_CLICKS, TEST_CLICKS, K = 20, 5, 20
DIM, BATCH, EPOCHS, SCALE = 32, 512, 4, 20.0
SEEDS = range(3)


def make_clicks(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The users' features (USERS, TASTES), and the items that each of them clicks, for training
    and for the test."""
    random = torch.Generator().manual_seed(seed)
    log_popularity = -torch.arange(1.0, ITEMS + 1).log()
    taste = torch.randn(USERS, TASTES, generator=random)
    item_taste = torch.randn(ITEMS, TASTES, generator=random) / TASTES**0.5
    chance = (log_popularity + TASTE * taste @ item_taste.T).softmax(1)
    clicks = torch.multinomial(chance, TRAIN_CLICKS + TEST_CLICKS, generator=random)
    features = taste + NOISE * torch.randn(taste.shape, generator=random)
    return features, *clicks.split([TRAIN_CLICKS, TEST_CLICKS], 1)


def train(
    features: Tensor, clicks: Tensor, log_q: bool, ignore_hits: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """The embeddings of all users and of all items."""
    torch.manual_seed(seed)
    user_tower = nn.Sequential(nn.Linear(TASTES, 64), nn.ReLU(), nn.Linear(64, DIM))
    item_tower = nn.Embedding(ITEMS, DIM)
    parameters = [*user_tower.parameters(), *item_tower.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-2)

    users = torch.arange(USERS).repeat_interleave(TRAIN_CLICKS)
    items = clicks.flatten()
    log_frequency = (items.bincount(minlength=ITEMS) / len(items)).log()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(users)).split(BATCH):
            user, item = users[rows], items[rows]
            ids = {"query_ids": item, "key_ids": item, "equal_ids": "ignore"}
            loss = multi_positive_infonce(
                normalize(user_tower(features[user]), dim=1),
                normalize(item_tower(item), dim=1),
                SCALE,
                symmetric=False,
                key_bias=-log_frequency[item] if log_q else None,
                **(ids if ignore_hits else {}),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return normalize(user_tower(features), dim=1), normalize(item_tower.weight, dim=1)


def recall(scores: Tensor, seen: Tensor, wanted: Tensor) -> float:
    """The share of the wanted items among the K best that the user has not clicked, in per cent."""
    best = scores.scatter(1, seen, -torch.inf).topk(K, dim=1).indices
    return 100 * (best[:, None] == wanted[:, :, None]).any(2).float().mean().item()


def main() -> None:
    arms = {
        "plain": (False, False),
        "accidental hits ignored": (False, True),
        "logQ": (True, False),
        "both": (True, True),
    }
    found = {name: [] for name in [*arms, "the most popular items"]}
    for seed in SEEDS:
        features, seen, wanted = make_clicks(seed)
        for name, (log_q, ignore_hits) in arms.items():
            user, item = train(features, seen, log_q, ignore_hits, seed)
            found[name].append(recall(user @ item.T, seen, wanted))
        popularity = seen.flatten().bincount(minlength=ITEMS).float()
        found["the most popular items"].append(recall(popularity.repeat(USERS, 1), seen, wanted))

    print(f"recall@{K} of unseen clicks, {len(SEEDS)} seeds (chance about {100 * K / ITEMS:.0f} %)")
    found = {name: torch.tensor(values) for name, values in found.items()}
    for name, values in found.items():
        print(f"  {name:24} {values.mean():.1f} ± {values.std():.1f} %")
    if not (found["logQ"] > found["the most popular items"] + 5).all():
        raise SystemExit("logQ should beat the most popular items by 5 points with every seed")
    if not (found["plain"] < found["the most popular items"]).all():
        raise SystemExit("without logQ the model should be worse than the most popular items")


if __name__ == "__main__":
    main()
