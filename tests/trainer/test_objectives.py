"""Each objective's loss against its formula, written out in fp64 on random features."""

import math

import pytest
import torch
import torch.nn.functional as F

from ito.config import Config
from ito.model.encoders import DualEncoder
from ito.model.fusion import Fusion
from ito.objectives import OBJECTIVES, Step

N, E, SCALE = 5, 16, 7.0


def make(name: str, **options):
    config = Config(objective=name, width=E, heads=2, **options)
    model = DualEncoder(
        image_size=16,
        width=E,
        heads=2,
        image_depth=1,
        text_depth=1,
        vocab_size=20,
        context_length=6,
    )
    return OBJECTIVES[name](config, model).double(), model.double(), config


def rows(*shape) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, E, dtype=torch.float64), dim=-1)


def loss(objective, *features, progress=0.0):
    scale = torch.tensor(SCALE, dtype=torch.float64)
    step = Step(1, progress, torch.arange(N), torch.Generator())
    return objective.loss(*features, logit_scale=scale, step=step, group=None)


def one_way(scores) -> float:
    return -sum(scores[i, i] - scores[i].logsumexp(0) for i in range(len(scores))) / len(scores)


def clip(x, y):
    return 0.5 * (one_way(SCALE * x @ y.T) + one_way(SCALE * y @ x.T))


def nt_xent(a, b, scale):
    z, total = torch.cat([a, b]), 0
    for i in range(2 * N):
        others = [j for j in range(2 * N) if j != i]
        scores = scale * z[others] @ z[i]
        total += scores.logsumexp(0) - scale * z[i] @ z[(i + N) % (2 * N)]
    return total / (2 * N)


@pytest.mark.parametrize("name", ["clip", "clip-aug"])
def test_clip(name):
    objective, _, _ = make(name)
    x, y = rows(1, N), rows(1, N)
    total, terms = loss(objective, x, y)
    torch.testing.assert_close(total, clip(x[0], y[0]))
    assert list(terms) == ["align"]


def test_slip_adds_nt_xent_at_a_temperature_of_a_tenth():
    objective, _, _ = make("slip")
    x, y, z = rows(1, N), rows(1, N), rows(2, N)
    total, terms = loss(objective, x, y, z)
    torch.testing.assert_close(terms["align"], clip(x[0], y[0]))
    torch.testing.assert_close(terms["views"], nt_xent(z[0], z[1], 10))
    torch.testing.assert_close(total, terms["align"] + terms["views"])


def test_slip_s_projector_sees_the_two_further_views_alone():
    objective, model, _ = make("slip")
    patches, ids = torch.randn(3, N, E, 2, 2).double(), torch.randint(1, 20, (1, N, 6))
    image, _, views = objective.encode(model, patches, ids)
    assert (image.shape, views.shape) == ((1, N, E), (2, N, E))
    changed = patches.clone()
    changed[0] = torch.randn(N, E, 2, 2)
    other = objective.encode(model, changed, ids)
    assert torch.equal(other[2], views)
    assert not torch.equal(other[0], image)


def test_siglip_starts_at_10_and_minus_10():
    objective, model, _ = make("siglip")
    assert model.logit_scale.exp().item() == pytest.approx(10)
    x, y = rows(1, N), rows(1, N)
    total, _ = loss(objective, x, y)
    scores = SCALE * x[0] @ y[0].T - 10
    sign = 2 * torch.eye(N).double() - 1
    torch.testing.assert_close(total, F.softplus(-sign * scores).sum() / N)


@pytest.mark.parametrize("pairs", [1, 16384])
def test_flair_is_the_mean_of_a_text_conditioned_and_a_global_term(pairs):
    """`pairs` is how many are held at a time: one image's, or all."""
    captions = 3
    objective, model, _ = make("flair", captions=captions)
    objective.PAIRS = pairs
    assert model.logit_scale.exp().item() == pytest.approx(10)
    x, y, tokens = rows(1, N), rows(captions, N), torch.randn(1, N, 4, E).double()
    total, terms = loss(objective, x, y, tokens)

    pooling, bias = objective.pooling, -10
    local = 0
    for i in range(N):
        pair = pooling.pair(pooling.norm(tokens[0, i]))
        key = torch.cat([pair[:, :E], torch.zeros(1, E).double()])
        value = torch.cat([pair[:, E:], torch.zeros(1, E).double()])
        own = [(y[k, i], 1) for k in range(captions)]
        for text, sign in own + [(y[0, j], -1) for j in range(N) if j != i]:
            query, heads = pooling.query(text), []
            for part in (slice(0, E // 2), slice(E // 2, E)):
                weights = (key[:, part] @ query[part] / math.sqrt(E // 2)).softmax(0)
                heads.append(weights @ value[:, part])
            found = F.normalize(pooling.out(torch.cat(heads)), dim=0)
            local += F.softplus(-sign * (SCALE * found @ text + bias))
    every = 0
    for i in range(N):
        for j in range(N):
            for k in range(captions):
                sign = 1 if i == j else -1
                every += F.softplus(-sign * (SCALE * x[0, i] @ y[k, j] + bias))
    torch.testing.assert_close(terms["local"], local / (captions + N - 1))
    torch.testing.assert_close(terms["all"], every / (N * captions))
    torch.testing.assert_close(total, (terms["local"] + terms["all"]) / 2)


@pytest.mark.parametrize(
    ("schedule", "progress", "weight"),
    [("constant", 0.9, 2), ("linear", 0.25, 1.5), ("cosine", 0.75, 1 - math.sqrt(0.5))],
)
def test_ito_s_weight_of_fusion_falls_and_its_scale_may_be_its_own(schedule, progress, weight):
    objective, _, _ = make("ito", lambda_schedule=schedule, fusion_scale="own")
    torch.nn.init.constant_(objective.logit_scale, math.log(3))
    x, y, h = rows(2, N), rows(1, N), rows(2, N)
    total, terms = loss(objective, x, y, h, progress=progress)
    align = (clip(x[0], y[0]) + clip(x[1], y[0])) / 2
    torch.testing.assert_close(terms["align"], align)
    torch.testing.assert_close(terms["fusion"], nt_xent(h[0], h[1], 3))
    torch.testing.assert_close(total, align + weight * terms["fusion"])


@pytest.mark.parametrize("text", ["caption", "shuffled", "dropped"])
@pytest.mark.parametrize("stopped", ["none", "image", "text", "both"])
def test_ito_fuses_each_view_with_the_text_that_it_is_told(text, stopped):
    objective, model, _ = make("ito", captions=2, fusion_text=text, fusion_stop_gradient=stopped)
    fusion: Fusion = objective.fusion
    patches = torch.randn(2, N, E, 2, 2).double().requires_grad_()
    ids = torch.randint(1, 20, (2, N, 6))
    ids[:, 1, 4:] = 0
    arranged = objective.texts(ids, torch.Generator().manual_seed(0))
    *_, fused = objective.encode(model, patches, arranged)
    for view in range(2):
        shown = {"caption": ids[0], "dropped": ids[0, :, :0]}.get(text)
        shown = arranged[2 + view] if shown is None else shown
        encoded = model.text(shown)[0] if text != "dropped" else torch.zeros(N, 0, E).double()
        positions = model.text.positions[: shown.shape[1]]
        tokens = model.image.attend(patches[view])[0]
        want = fusion(tokens, encoded, shown != 0, positions)
        torch.testing.assert_close(fused[view], want)
    (fused * torch.randn_like(fused)).sum().backward()

    def arrives(x: torch.Tensor) -> bool:
        return x.grad is not None and bool(x.grad.any())

    assert arrives(patches) == (stopped in ("none", "text"))
    trained = text != "dropped" and stopped in ("none", "image")
    assert arrives(model.text.embedding.weight) == trained
