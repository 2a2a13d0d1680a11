"""`ito_loss` of a batch in which captions are equal, against its formula, one anchor at a time."""

import pytest
import torch
from support.formulas import check, unit
from support.problems import AVAILABLE

import ito_kernels as ik

N, D = 7, 5
# no slot is a partition of the items alone: item 0 shares a caption with 1, and another with 2;
# item 4 has one caption twice, item 5 lacks one, item 6 has none
IDS = torch.tensor([[3, 3, 8, 5, 9, -1, -2], [8, 4, 6, 3, 9, 3, -1], [1, 7, 8, 0, 2, -1, -1]])
FUSED_IDS = torch.tensor([1, 2, 1, 2, 4, -1, 1])


def one_softmax(scores, anchors, candidates, is_positive, is_equal, ignore):
    """The mean over the anchors of log D - T; all are named, not numbered."""
    losses = []
    for a in anchors:
        left = [b for b in candidates if not (ignore and is_equal(a, b) and not is_positive(a, b))]
        of_anchor = [b for b in left if is_positive(a, b) or (is_equal(a, b) and not ignore)]
        log_d = torch.stack([scores(a, b) for b in left]).logsumexp(0)
        losses.append(log_d - sum(scores(a, b) for b in of_anchor) / len(of_anchor))
    return sum(losses) / len(losses) if losses else 0


def align(x, y, scale, ids, denominator, ignore):
    def of(images, texts):
        """images (v, i) and texts (c, i) that are there."""

        def scores(image, text):
            return scale * x[image] @ y[text]

        slots = {c for c, _ in texts}

        def equal(image, text):
            own = {int(ids[c, image[1]]) for c in slots}
            return int(ids[text]) in own

        def same_item(image, text):
            return image[1] == text[1]

        def flipped(f):
            return lambda a, b: f(b, a)

        there = [image for image in images if any(ids[c, image[1]] >= 0 for c in slots)]
        texts = [text for text in texts if ids[text] >= 0]
        rows = one_softmax(scores, there, texts, same_item, equal, ignore)
        back = (flipped(f) for f in (scores, same_item, equal))
        scores, same, equal_ = back
        return 0.5 * (rows + one_softmax(scores, texts, there, same, equal_, ignore))

    views, captions = range(len(x)), range(len(y))
    if denominator == "pooled":
        return of(
            [(v, i) for v in views for i in range(N)], [(c, i) for c in captions for i in range(N)]
        )
    pairs = [
        of([(v, i) for i in range(N)], [(c, i) for i in range(N)]) for v in views for c in captions
    ]
    return sum(pairs) / len(pairs)


def fusion(h, scale, ids, ignore):
    rows = [(f, i) for f in range(len(h)) for i in range(N) if ids[i] >= 0]
    losses = 0
    for a in rows:
        losses += one_softmax(
            lambda a, b: scale * h[a] @ h[b],
            [a],
            [b for b in rows if b != a],
            lambda a, b: a[1] == b[1],
            lambda a, b: ids[a[1]] == ids[b[1]],
            ignore,
        )
    return losses / len(rows)


def inputs(views, captions):
    x, y, h = unit(views, N, D), unit(captions, N, D, seed=1), unit(3, N, D, seed=2)
    scales = [torch.tensor(s, dtype=torch.float64) for s in (6.0, 4.0)]
    return [z.requires_grad_() for z in (x, y, h, *scales)]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("equal_ids", ["positive", "ignore"])
@pytest.mark.parametrize("denominator", ["pair", "pooled"])
@pytest.mark.parametrize(("views", "captions"), [(1, 1), (2, 1), (2, 3)])
def test_formula(views, captions, denominator, equal_ids, backend):
    leaves = x, y, h, scale, fusion_scale = inputs(views, captions)
    ids, ignore = IDS[:captions], equal_ids == "ignore"
    loss, terms = ik.ito_loss(
        *(x, y if captions > 1 else y[0], h, scale),
        lambda_fusion=1.5,
        denominator=denominator,
        fusion_scale=fusion_scale,
        caption_ids=ids if captions > 1 else ids[0],
        fused_ids=FUSED_IDS,
        equal_ids=equal_ids,
        backend=backend,
    )
    want = align(x, y, scale, ids, denominator, ignore)
    fused = fusion(h, fusion_scale, FUSED_IDS, ignore)
    torch.testing.assert_close(terms, {"align": want, "fusion": fused})
    check(loss, want + 1.5 * fused, leaves)


@pytest.mark.parametrize("equal_ids", ["positive", "ignore"])
def test_fused_views_are_of_the_first_caption_and_their_scale_is_the_other(equal_ids):
    x, y, h, scale, _ = inputs(2, 3)
    _, terms = ik.ito_loss(x, y, h, scale, caption_ids=IDS, equal_ids=equal_ids)
    want = fusion(h, scale, IDS[0], equal_ids == "ignore")
    torch.testing.assert_close(terms["fusion"], want)


@pytest.mark.parametrize("denominator", ["pair", "pooled"])
@pytest.mark.parametrize("equal_ids", ["positive", "ignore"])
def test_ids_that_all_differ_change_nothing(denominator, equal_ids):
    leaves = x, y, h, scale, _ = inputs(2, 3)
    ids = torch.randperm(3 * N).view(3, N)
    options = {"denominator": denominator}
    plain, _ = ik.ito_loss(x, y, h, scale, **options)
    ours, _ = ik.ito_loss(x, y, h, scale, caption_ids=ids, equal_ids=equal_ids, **options)
    check(ours, plain, leaves[:4])


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("denominator", ["pair", "pooled"])
@pytest.mark.parametrize("equal_ids", ["positive", "ignore"])
def test_padding_is_never_read_and_may_be_all(backend, denominator, equal_ids):
    x, y, h, *_ = (z.detach().float() for z in inputs(2, 3))
    options = {"denominator": denominator, "equal_ids": equal_ids, "backend": backend}

    def run(ids, x, y, h):
        leaves = [z.clone().requires_grad_() for z in (x, y, h)]
        loss, _ = ik.ito_loss(*leaves, 6.0, caption_ids=ids, **options)
        return loss, *torch.autograd.grad(loss, leaves)

    dirty = x.clone(), y.clone(), h.clone()
    dirty[0][:, 6] = dirty[1][:, 6] = dirty[1][0, 5] = dirty[1][2, 5] = torch.nan
    dirty[2][:, 5:] = torch.nan
    for clean, found in zip(run(IDS, x, y, h), run(IDS, *dirty), strict=True):
        torch.testing.assert_close(found, clean)
    for found in run(-torch.ones_like(IDS), *(torch.full_like(z, torch.nan) for z in (x, y, h))):
        assert not found.any()


@pytest.mark.parametrize("equal_ids", ["positive", "ignore"])
@pytest.mark.parametrize("denominator", ["pair", "pooled"])
def test_a_batch_of_one_caption(denominator, equal_ids):
    """ "ignore" leaves no negatives; with "positive" all are positives."""
    x, y, h, scale, _ = inputs(2, 2)
    ids = torch.zeros(2, N, dtype=torch.int64)
    loss, terms = ik.ito_loss(
        x, y, h, scale, caption_ids=ids, denominator=denominator, equal_ids=equal_ids
    )
    want = align(x, y, scale, ids, denominator, equal_ids == "ignore")
    torch.testing.assert_close(terms["align"], want)
    torch.testing.assert_close(terms["fusion"], fusion(h, scale, ids[0], equal_ids == "ignore"))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [x, y, h, scale]))


@pytest.mark.parametrize("denominator", ["pair", "pooled"])
@pytest.mark.parametrize("equal_ids", ["positive", "ignore"])
def test_what_is_not_finite_shows(denominator, equal_ids):
    x, y, h, *_ = (z.detach() for z in inputs(2, 3))
    for side in (x, y):
        broken = side.clone()
        broken[0, 0, 0] = torch.nan
        given = (broken, y) if side is x else (x, broken)
        options = {"denominator": denominator, "equal_ids": equal_ids}
        loss, _ = ik.ito_loss(*given, None, 6.0, lambda_fusion=0, caption_ids=IDS, **options)
        assert loss.isnan()
    broken = h.clone()
    broken[0, 0, 0] = torch.nan
    assert ik.ito_loss(x, y, broken, 6.0, caption_ids=IDS, equal_ids=equal_ids)[0].isnan()


X = torch.ones(2, N, D)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "equal_ids must be one of 'positive', 'ignore', got 'x'", {"equal_ids": "x"}),
        (
            ValueError,
            r"caption_ids must have shape \(2, 7\), .* text, got \(7,\)",
            {"caption_ids": IDS[0]},
        ),
        (TypeError, "caption_ids must be a tensor of integers", {"caption_ids": [0]}),
        (TypeError, "caption_ids must have an integer dtype", {"caption_ids": X[..., 0]}),
        (ValueError, r"fused_ids must have shape \(7,\)", {"fused_ids": IDS}),
        (ValueError, r"fusion_scale .* got shape \(14,\)", {"fusion_scale": torch.ones(14)}),
        (ValueError, "fusion_scale must be finite and greater than 0", {"fusion_scale": 0}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        ik.ito_loss(X, X, X, 6.0, **options)


@pytest.mark.parametrize("option", [{"fusion_scale": 2.0}, {"fused_ids": IDS[0]}])
def test_options_of_fusion_need_it(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} needs fused_views, which is miss"):
        ik.ito_loss(X, X, None, 6.0, lambda_fusion=0, **option)
