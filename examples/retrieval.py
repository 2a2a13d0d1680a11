"""Retrieval with hard negatives, some of which are false: `mnrl_loss` and its options.

A query and its document state the same fact. Facts come in 300 topics, and a batch of 32 rarely has
two of one topic, so each query brings two hard negatives, documents of its topic. With mined
negatives some are false: here 30 % of them state the same fact as the query. `margin=0.2` leaves
out candidates whose cosine with the query comes within 0.2 of that of its positive. `directions`
adds to the denominator the queries and documents that the batch has anyway.

R@1 among 1,000 unseen documents, mean ± standard deviation of 3 seeds: 80.7 ± 2.0 % without hard
negatives, 75.0 ± 2.4 % with them, 84.4 ± 0.3 % with the margin, 86.5 ± 0.6 % with all directions as
well. Weighting hard negatives more (`hardness_mode`) is worst, 67.9 ± 4.3 %, because the false ones
score highest. With none false, hard negatives alone gain nothing here (81.1 ± 2.8 %) and the margin
helps too (85.2 ± 0.9 %): it does more than remove false negatives.

    python examples/retrieval.py
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ito_kernels import mnrl_loss

TOPICS, HIDDEN, WIDTH, NOISE = 300, 16, 64, 0.3
FACTS, UNSEEN = 3000, 1000
HARD, FALSE = 2, 0.3  # hard negatives per query, and how many of them are false
DIM, BATCH, STEPS, SCALE, MARGIN = 32, 32, 200, 20.0, 0.2
SEEDS = range(3)
ALL = "query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"


class World:
    """Facts, of which every query and every document is a new statement. FACTS are for training."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        count = FACTS + UNSEEN
        self.topic = torch.randint(TOPICS, (count,), generator=self.random)
        self.hidden = 2 * self.normal(TOPICS, HIDDEN)[self.topic] + self.normal(count, HIDDEN)
        self.views = self.normal(2, HIDDEN, WIDTH) / HIDDEN**0.5

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def queries(self, facts: Tensor) -> Tensor:
        return self.state(facts, self.views[0])

    def documents(self, facts: Tensor) -> Tensor:
        return self.state(facts, self.views[1])

    def state(self, facts: Tensor, view: Tensor) -> Tensor:
        x = (self.hidden[facts] @ view).tanh()
        return x + NOISE * self.normal(*x.shape)

    def negatives(self, facts: Tensor, false: float) -> Tensor:
        """Documents of the same topic, HARD for each fact. A share of them, `false`, state the fact
        itself."""
        topic = self.topic[facts]
        others = (topic[:, None] == topic).fill_diagonal_(False).float()
        others += 1e-9  # for a topic with a single fact
        mined = torch.multinomial(others, HARD, generator=self.random)
        is_false = torch.rand(mined.shape, generator=self.random) < false
        return self.documents(torch.where(is_false, facts[:, None], facts[mined]))


def recall(seed: int, false: float | None, **options) -> float:
    """Train two encoders, without hard negatives if `false` is None. Returns how often the document
    of an unseen query is the nearest of all unseen documents, in per cent."""
    world, facts = World(seed), torch.arange(FACTS)
    queries, documents = world.queries(facts), world.documents(facts)
    negatives = None if false is None else world.negatives(facts, false)

    torch.manual_seed(seed)
    query_encoder, document_encoder = (
        nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, DIM)) for _ in range(2)
    )
    parameters = [*query_encoder.parameters(), *document_encoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(STEPS):
        rows = torch.randint(FACTS, (BATCH,))
        loss = mnrl_loss(
            query_encoder(queries[rows]),
            document_encoder(documents[rows]),
            None if negatives is None else document_encoder(negatives[rows]),
            SCALE,
            **options,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    unseen = torch.arange(FACTS, FACTS + UNSEEN)
    with torch.no_grad():
        query = normalize(query_encoder(world.queries(unseen)), dim=1)
        document = normalize(document_encoder(world.documents(unseen)), dim=1)
    return 100 * ((query @ document.T).argmax(1) == unseen - FACTS).float().mean().item()


def main() -> None:
    arms = {
        "none": (None, {}),
        "none false": (0.0, {}),
        "none false, margin": (0.0, {"margin": MARGIN}),
        "30 % false": (FALSE, {}),
        "30 % false, hardness": (FALSE, {"hardness_mode": "hard", "hardness_strength": 2.0}),
        "30 % false, margin": (FALSE, {"margin": MARGIN}),
        "30 % false, margin, all directions": (FALSE, {"margin": MARGIN, "directions": ALL}),
    }
    print(f"R@1 among {UNSEEN} unseen documents, {len(SEEDS)} seeds; hard negatives:")
    found = {}
    for name, (false, options) in arms.items():
        found[name] = torch.tensor([recall(seed, false, **options) for seed in SEEDS])
        print(f"  {name:36} {found[name].mean():.1f} ± {found[name].std():.1f} %")
    if not (found["30 % false"] < found["none"] - 1).all():
        raise SystemExit("false negatives should cost a point, with every seed")
    if not (found["30 % false, margin"] > found["30 % false"] + 5).all():
        raise SystemExit("the margin should win 5 points, with every seed")
    if not found["30 % false, hardness"].mean() < found["30 % false"].mean():
        raise SystemExit("hardness should be worse with false negatives, on average")


if __name__ == "__main__":
    main()
