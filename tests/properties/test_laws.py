"""Laws that follow from the formulas, for every loss and option and for random combinations of the
options: what may change without changing the loss, and by how much the loss changes."""

import math

import pytest
import torch
from hypothesis import strategies as st
from support.examples import examples
from support.losses_table import ROWS, Inputs
from support.problems import AVAILABLE
from torch.nn.functional import normalize

import ito_kernels as ik
from ito_kernels.similarity import panelwise

F64 = torch.float64
CASES = [(loss, option) for loss, rows in ROWS.items() for option in rows]
DENSE = [b for b in AVAILABLE if b in ("reference", "chunked")]
QUICK = [b for b in AVAILABLE if b in ("reference", "chunked", "cpu")]
# Their options name rows by number, or draw random numbers: not the same for other rows.
BY_NUMBER = {
    case
    for case in CASES
    if "pairs" in case[1]
    or case[1] in ("hard_negative_ids", "guide_queries, guide_keys", 'empty="drop"')
    or case[0] == "mixup_infonce"
    or case == ("symile_loss", "generator")
}
sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def features(n: int, d: int, seed: int, dtype=F64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(n, d, generator=g, dtype=F64), dim=1).to(dtype) for _ in range(3)]


def value_and_gradients(case, inputs: Inputs, backend: str, dtype=None) -> list[torch.Tensor]:
    """The loss and its gradients for x, y and the scale."""
    x, y, z = (v.detach().to(v.dtype if dtype is None else dtype) for v in inputs[:3])
    wide = F64 if x.dtype == F64 else torch.float32
    scale = torch.as_tensor(inputs.scale).to(wide).detach().clone().requires_grad_()
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss, option = case
    value = ROWS[loss][option].call(
        loss, inputs._replace(x=x, y=y, z=z, scale=scale), backend=backend
    )
    grads = torch.autograd.grad(value, (x, y, scale), materialize_grads=True)
    return [value.detach(), *grads]


def close(found, expected, rtol: float) -> None:
    """Relative to the largest element of each."""
    for a, b in zip(found, expected, strict=True):
        a, b = a.double(), b.double()
        assert (a - b).abs().max() <= rtol * b.abs().max() + rtol * 1e-2, (a - b).abs().max()


def tolerance(backend: str) -> tuple[torch.dtype, float]:
    return (F64, 1e-10) if backend in DENSE else (torch.float32, 1e-4)


# ---- every loss and option

of_rows = {"n": st.integers(2, 40), "d": st.integers(5, 12), "seed": seeds}


@examples(
    60,
    3000,
    case=st.sampled_from([x for x in CASES if x not in BY_NUMBER]),
    backend=st.sampled_from(QUICK),
    **of_rows,
)
def test_items_may_come_in_any_order(case, backend, n, d, seed):
    dtype, rtol = tolerance(backend)
    x, y, z = features(n, d, seed, dtype)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    plain, moved = (
        value_and_gradients(case, Inputs(x[at], y[at], z[at], at, n), backend)
        for at in (torch.arange(n), order)
    )
    plain[1:3] = plain[1][order], plain[2][order]
    close(moved, plain, rtol)


@examples(
    60,
    3000,
    case=st.sampled_from(CASES),
    backend=st.sampled_from(DENSE),
    panel=st.integers(1, 200),
    kept=st.sampled_from([0, 1000, 1 << 20]),
    **of_rows,
)
def test_panels_may_have_any_size(case, backend, panel, kept, n, d, seed):
    """What is computed a panel of rows at a time, and what of it is kept for backward."""
    inputs = Inputs.of(*features(n, d, seed))
    expected = value_and_gradients(case, inputs, "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panelwise, "PANEL_SCORES", panel)
        patch.setattr(panelwise, "MIN_ROWS", 1)
        patch.setenv("ITO_TILE_CACHE_BYTES", str(kept))
        found = value_and_gradients(case, inputs, backend)
    close(found, expected, 1e-10)


@examples(
    60,
    3000,
    case=st.sampled_from(CASES),
    backend=st.sampled_from(QUICK),
    **of_rows,
)
def test_dtypes(case, backend, n, d, seed):
    """The same features in bf16, fp16 and fp32: the wider the dtype, the nearer to fp64."""
    inputs = Inputs.of(*(x.bfloat16() for x in features(n, d, seed)))
    wide = inputs._replace(**{k: getattr(inputs, k).double() for k in "xyz"})
    truth = value_and_gradients(case, wide, "reference")
    # Unit rows are rounded once more: by u = 2⁻⁹ (bf16) of each, which moves a score by up to
    # 2·12·u = 0.05 and a softmax's share by e^±0.1, a tenth. In fp16 u is an eighth of that.
    more = 3 if "normalize" in case[1] or case[0] == "mnrl_loss" else 1
    for dtype, rtol in (
        (torch.float32, 1e-4),
        (torch.float16, 5e-3 * more),
        (torch.bfloat16, 4e-2 * more),
    ):
        found = value_and_gradients(case, inputs, backend, dtype)
        assert found[0].dtype == torch.float32
        assert found[1].dtype == found[2].dtype == dtype
        close(found, truth, rtol)


@examples(60, 3000, case=st.sampled_from(CASES), backend=st.sampled_from(QUICK), **of_rows)
def test_one_tower_is_two_equal_ones(case, backend, n, d, seed):
    """A self-similarity takes another path: the same loss, the gradients of both sides added."""
    dtype, rtol = tolerance(backend)
    x, _, z = features(n, d, seed, dtype)
    loss, option = case
    leaf = x.clone().requires_grad_()
    one = ROWS[loss][option].call(loss, Inputs.of(leaf, leaf, z), backend=backend)
    (grad,) = torch.autograd.grad(one, leaf)
    two, of_x, of_y, _ = value_and_gradients(case, Inputs.of(x, x, z), backend)
    close([one.detach(), grad], [two, of_x + of_y], rtol)


# S depends on the product of scale and queries alone; margins, floors and α compare or add products
SCALED = [
    (loss, option)
    for loss, option in CASES
    if (
        loss in ("clip_loss", "siglip_loss", "cwcl_loss", "soft_target_infonce", "rince_loss")
        or loss in ("one_to_k_loss", "mixup_infonce", "cluster_weighted_infonce")
        or loss.startswith(("multi_positive", "decoupled"))
    )
    and not any(word in option for word in ("normalize", "margin", "guide", "debias", "hardness_m"))
]


@examples(
    60,
    3000,
    case=st.sampled_from(SCALED),
    backend=st.sampled_from(QUICK),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    power=st.integers(-6, 6),
    **of_rows,
)
def test_scale_and_queries_are_one_factor(case, backend, dtype, power, n, d, seed):
    """Twice the queries at half the scale: the same bits, twice the gradient of the scale, half of
    that of the queries."""
    x, y, z = (v.to(dtype) for v in features(n, d, seed))
    factor = 2.0**power
    plain, moved = (
        value_and_gradients(case, Inputs.of(f * x, y, z)._replace(scale=12.0 / f), backend)
        for f in (1.0, factor)
    )
    plain[1], plain[3] = plain[1] / factor, plain[3] * factor
    for a, b in zip(moved, plain, strict=True):
        assert torch.equal(a, b)


# ---- `multi_positive_infonce`: n and m cross the edges of tiles

of_infonce = {
    "backend": st.sampled_from(QUICK),
    "n": st.sampled_from([1, 2, 7, 40, 300]),
    "d": st.integers(2, 12),  # with 1, unit vectors give ties, at which debias has a kink
    "seed": seeds,
    "positives": st.sampled_from(["mean", "in", "sum"]),
}
REWEIGHTED = st.sampled_from(
    [
        {},
        {"label_smoothing": 0.2},
        {"debias": 0.1},
        {"hardness": 0.7},
        {"false_negative_margin": 0.2},
        {"false_negative_margin": 0.2, "debias": 0.1, "hardness": 0.7},
    ]
)


def infonce(backend: str, q, k, **options) -> list[torch.Tensor]:
    """The loss at scale 5 and its gradients for queries and keys; one of both if k is q."""
    dtype, _ = tolerance(backend)
    q, k = (x.detach().to(dtype).requires_grad_() for x in (q, k))
    for name, x in options.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            options[name] = x.to(dtype)
    loss = ik.multi_positive_infonce(q, k, 5.0, backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (q, k))]


@examples(40, 2000, more=REWEIGHTED, extra=st.integers(1, 30), **of_infonce)
def test_a_queue_is_more_keys(backend, n, d, seed, positives, more, extra):
    """So are hard negatives that all queries have in common."""
    q, k, _ = features(n, d, seed)
    queue = features(extra, d, seed + 1)[0]
    ids = torch.arange(n + extra)
    options = {"positives": positives, "symmetric": False, **more}
    value, of_q, of_k = infonce(
        backend, q, torch.cat([k, queue]), query_ids=ids[:n], key_ids=ids, **options
    )
    for kind in ({"queue": queue}, {"hard_negatives": queue.expand(n, -1, -1)}):
        found = infonce(backend, q, k, **kind, **options)
        close(found, [value, of_q, of_k[:n]], 1e-9 if backend in DENSE else 1e-4)


@examples(40, 2000, more=REWEIGHTED, m=st.sampled_from([1, 5, 60, 270]), **of_infonce)
def test_symmetric_is_the_mean_of_two_directions(backend, n, d, seed, positives, more, m):
    q, k = features(n, d, seed)[0], features(m, d, seed + 1)[0]
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(-1, 8, (size,), generator=g) for size in (n, m)]
    weights = [torch.rand(size, generator=g, dtype=F64) for size in (n, m)]
    options = {"positives": positives, **more}
    both = infonce(
        *(backend, q, k),
        query_ids=ids[0],
        key_ids=ids[1],
        query_weights=weights[0],
        key_weights=weights[1],
        **options,
    )
    there, back = (
        infonce(
            *(backend, a, b),
            query_ids=ids[i],
            key_ids=ids[1 - i],
            query_weights=weights[i],
            symmetric=False,
            **options,
        )
        for i, (a, b) in enumerate([(q, k), (k, q)])
    )
    mean = [0.5 * (x + y) for x, y in zip(there, [back[0], back[2], back[1]], strict=True)]
    close(both, mean, tolerance(backend)[1])


@examples(40, 2000, more=REWEIGHTED, symmetric=st.booleans(), **of_infonce)
def test_padding_is_as_if_it_were_not_there(backend, n, d, seed, positives, more, symmetric):
    q, k, _ = features(n, d, seed)
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(-3, 8, (n,), generator=g) for _ in range(2)]
    there = [i >= 0 for i in ids]
    if not (there[0].any() and there[1].any()):
        return
    options = {"positives": positives, "symmetric": symmetric, **more}
    spoilt = (x.masked_fill(~t[:, None], torch.nan) for x, t in zip((q, k), there, strict=True))
    padded = infonce(backend, *spoilt, query_ids=ids[0], key_ids=ids[1], **options)
    removed = infonce(
        *(backend, q[there[0]], k[there[1]]),
        query_ids=ids[0][there[0]],
        key_ids=ids[1][there[1]],
        **options,
    )
    for x, t in zip(padded[1:], there, strict=True):
        assert not x[~t].any()
    padded[1:] = padded[1][there[0]], padded[2][there[1]]
    close(padded, removed, tolerance(backend)[1])


@examples(40, 2000, more=REWEIGHTED, symmetric=st.booleans(), **of_infonce)
def test_ids_are_pairs(backend, n, d, seed, positives, more, symmetric):
    q, k, _ = features(n, d, seed)
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, n // 2 + 1, (n,), generator=g) for _ in range(2)]
    options = {"positives": positives, "symmetric": symmetric, **more}
    by_ids = infonce(backend, q, k, query_ids=ids[0], key_ids=ids[1], **options)
    pairs = (ids[0][:, None] == ids[1]).nonzero()
    by_pairs = infonce(backend, q, k, positive_pairs=pairs, **options)
    close(by_pairs, by_ids, 1e-9 if backend in DENSE else 1e-4)


@examples(40, 2000, **of_infonce)
def test_everything_twice(backend, n, d, seed, positives):
    """Two copies of each item under one id double the denominator, and for "sum" the numerator too.
    Copies have the same gradients, half of the item's."""
    q, k, _ = features(n, d, seed)
    ids = torch.arange(n) // 2
    once = infonce(backend, q, k, query_ids=ids, key_ids=ids, positives=positives)
    ids = ids.repeat(2)
    twice = infonce(
        backend, q.repeat(2, 1), k.repeat(2, 1), query_ids=ids, key_ids=ids, positives=positives
    )
    more = 0.0 if positives == "sum" else math.log(2)
    halves = [x.repeat(2, 1) / 2 for x in once[1:]]
    close(twice, [once[0] + more, *halves], tolerance(backend)[1])


@examples(40, 2000, more=REWEIGHTED, shift=st.floats(-20, 20), **of_infonce)
def test_a_constant_shift_of_the_scores_changes_nothing(
    backend, n, d, seed, positives, more, shift
):
    """A bias that all keys share, and a vector added to all keys: the gradients sum to 0."""
    if "debias" in more or "false_negative_margin" in more:
        return  # they compare scores and products with constants
    q, k, _ = features(n, d, seed)
    g = torch.Generator().manual_seed(seed)
    dtype, rtol = tolerance(backend)
    bias = torch.rand(n, generator=g, dtype=F64).to(dtype)
    by_id = {x: torch.randint(0, n // 2 + 1, (n,), generator=g) for x in ("query_ids", "key_ids")}
    options = {"positives": positives, "symmetric": False, **by_id, **more}
    plain = infonce(backend, q, k, key_bias=bias.clone(), **options)
    shifted = infonce(backend, q, k, key_bias=bias + shift, **options)
    close(shifted, plain, 10 * rtol)
    moved = infonce(backend, q, k + features(1, d, seed + 1)[0], key_bias=bias.clone(), **options)
    close(moved[::2], plain[::2], 10 * rtol)
    assert (plain[2].sum(0).abs() <= rtol * (1 + plain[2].abs().sum(0))).all()
    leaf = bias.clone().requires_grad_()
    loss = ik.multi_positive_infonce(
        q.to(dtype), k.to(dtype), 5.0, key_bias=leaf, backend=backend, **options
    )
    assert torch.autograd.grad(loss, leaf)[0].sum().abs() <= rtol
