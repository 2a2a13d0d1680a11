"""What is asked of kernels, for the tests of each backend: the shared problem set against the dense
fp64 formula, and what the two GPU backends are asked beyond it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ito_kernels.similarity import dispatch
from ito_kernels.similarity.pairs import classify, features
from ito_kernels.similarity.spec import Needs, Problem, SideUpstream, Upstream
from support import problems
from support.problems import (
    BF16,
    CASES,
    FP16,
    FP32,
    OPTIONS,
    Case,
    assert_accurate,
    dense,
    gradients,
    leaves,
    make,
    row_limit,
    run,
    run_softplus,
    tensors,
    weights,
)

reference = dispatch.load("reference")


# ---- the problem set

# ε of the accuracy rule: losses (times 1 + scale in fp32), gradients (relative)
EPS = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (1e-2, 2e-2)}


def eps_of(dtype, scale: float) -> tuple[float, float]:
    if dtype == torch.float64:
        return 1e-14 * (1 + scale), 1e-13
    loss, grad = EPS[dtype]
    return (loss * (1 + scale) if dtype == torch.float32 else loss), grad


def supported(backend: str, case, dtype) -> None:
    t = make(case, dtype)
    limit = row_limit(t) if case.limit else None
    problem = Problem(t["a"], t["b"], t["scale"], row_limit=limit)
    ok, reason = dispatch.load(backend).supports(problem)
    if not ok:
        pytest.skip(reason)


def check_logsumexp(backend, case, dtype, cancelled: float = 0.0, exact_max: bool = True) -> None:
    """cancelled: the size of the terms of a gradient, for problems in which they may all cancel."""
    supported(backend, case, dtype)
    t = leaves(make(case, dtype))
    truth_t, same_t = leaves(t), leaves(t)
    truth, same = dense(case, truth_t, torch.float64), dense(case, same_t, dtype)
    stats = run(case, t, backend, exact_max)
    eps, grad_eps = eps_of(dtype, case.scale)

    for side, wanted in (("row", case.rows), ("col", case.cols)):
        ours = stats.row if side == "row" else stats.col
        if not wanted:
            assert ours is None
            continue
        top, logsum, pos, neg_max = ours
        shift = top.masked_fill(top == -torch.inf, 0)
        count = truth[f"{side}_count"]
        absolute = {"lse": top + logsum}
        if exact_max:
            absolute["max"] = top
        if case.positives == "linear":
            # the mean, as a loss uses it; 0 positives give 0
            k = count.clamp(min=1)
            for x in (truth, same):
                x[f"{side}_mean"] = x[f"{side}_linear"] / k
            absolute["mean"] = pos / k + shift * (count > 0)
        elif case.positives == "lse":
            absolute["lse_pos"] = pos + shift
        if case.hardest:
            absolute["neg_max"] = neg_max
        for name, value in absolute.items():
            key = f"{side}_{name}"
            assert_accurate(value, truth[key], same[key], 2, eps)
        assert (logsum[top > -torch.inf] > -0.01).all()  # the shift is not far above

    w = weights(case, truth)
    kind = "linear" if case.positives == "linear" else "lse_pos"

    def functional(outputs: dict) -> torch.Tensor:
        total = 0
        for side in ("row", "col"):
            for ours, name in (("logsum", "lse"), ("pos", kind)):
                value, weight = outputs[f"{side}_{name}"], w[f"{side}_{ours}"]
                total = total + (torch.where(weight != 0, value, 0).double() * weight).sum()
        return total

    total = 0
    for key, weight in w.items():
        value = getattr(stats, key)
        if value is not None:
            total = total + (torch.where(weight != 0, value, 0).double() * weight).sum()
    if not total.requires_grad:  # nothing is allowed anywhere
        return
    ours = gradients(total, t)
    expected = gradients(functional(truth), truth_t)
    peer = gradients(functional(same), same_t)
    for name, value in ours.items():
        assert value.dtype == t[name].dtype
        size = max(expected[name].abs().max().item(), cancelled)
        assert_accurate(value, expected[name], peer[name], 3, grad_eps * size + 1e-30)


def check_softplus(backend, case, dtype, cancelled: float = 0.0) -> None:
    supported(backend, case, dtype)
    t = leaves(make(case, dtype))
    truth_t, same_t = leaves(t), leaves(t)
    truth = dense(case, truth_t, torch.float64)["softplus"]
    same = dense(case, same_t, dtype)["softplus"]
    out = run_softplus(case, t, backend)
    eps, grad_eps = eps_of(dtype, case.scale)
    assert_accurate(out, truth, same, 2, eps * max(1, truth.abs().max().item()))

    w = torch.rand(case.n, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.5
    ours = gradients((out.double() * w).sum(), t)
    expected = gradients((truth.double() * w).sum(), truth_t)
    peer = gradients((same.double() * w).sum(), same_t)
    for name, value in ours.items():
        size = max(expected[name].abs().max().item(), cancelled)
        assert_accurate(value, expected[name], peer[name], 3, grad_eps * size + 1e-30)


def check_half_values(backend, exact_max: bool = True) -> None:
    """Values as exact as in fp32, gradients to 2^-16 of the largest."""
    case = Case(70, 90, 24, positives="linear", scale=20.0)
    t = leaves({k: v.bfloat16().float() if k in "ab" else v for k, v in make(case, FP32).items()})
    truth_t = leaves(t)
    truth = dense(case, truth_t, torch.float64)
    stats = run(case, t, backend, exact_max, half_values=True)
    loss, expected = (stats.row_max + stats.row_logsum).sum(), truth["row_lse"].sum()
    assert abs(loss - expected) <= 1e-6 * expected
    ours, wanted = gradients(loss, t), gradients(expected, truth_t)
    for name, value in ours.items():
        assert (value - wanted[name]).abs().max() <= 2.0**-16 * wanted[name].abs().max()


def check_strides(backend) -> None:
    """Transposed, sliced and broadcast inputs give the bits of their contiguous copies."""
    case = OPTIONS[0]
    t = make(case, torch.float32)
    a, b = t["a"], t["b"]
    wide = torch.zeros(case.m, 2 * case.d)
    wide[:, ::2] = b
    strided = t | {"a": a.T.contiguous().T, "b": wide[:, ::2], "scale": t["scale"].expand(case.n)}
    plain = t | {"scale": t["scale"].expand(case.n).contiguous()}
    ours, expected = run(case, strided, backend), run(case, plain, backend)
    for x, y in zip(tensors(ours), tensors(expected), strict=True):
        assert torch.equal(x, y)


def check_same_bits_every_time(backend, exact_max: bool = True) -> None:
    case = replace(OPTIONS[0], hardest=exact_max)
    results = []
    for _ in range(3):
        t = leaves(make(case, torch.float32))
        stats = run(case, t, backend, exact_max)
        grads = gradients((stats.row_logsum - stats.row_pos).sum() + stats.col_logsum.sum(), t)
        results.append(tensors(stats, tuple(grads.values())))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def check_far_rows_do_not_underflow(backend, scale, exact_max: bool = True) -> None:
    """One row's scores lie 4·scale below its neighbours': its statistics keep their digits."""
    case = CASES[4]
    t = make(case, torch.float32)
    t["scale"] = torch.tensor(scale)
    t["row_bias"] = torch.zeros(case.n)
    t["row_bias"][::3] = -4 * scale
    t["col_bias"] = torch.zeros(case.m)
    t["col_bias"][5] = -3 * scale
    biased = type(case)(case.n, case.m, case.d, scale=scale, biases=True, positives="linear")
    truth, same = dense(biased, t, torch.float64), dense(biased, t, torch.float32)
    stats = run(biased, t, backend, exact_max)
    for side in ("row", "col"):
        ours = stats.row if side == "row" else stats.col
        lse = ours.max + ours.logsum
        assert_accurate(lse, truth[f"{side}_lse"], same[f"{side}_lse"], 2, 1e-6 * (1 + 5 * scale))


# ---- memory

# widths that end within 16 bytes
GUARDED = [
    replace(OPTIONS[15], n=70, m=100, d=39, positives="linear", hardest=True),
    Case(100, 70, 38, positives="lse", diagonal=-20, exclude_positives=True),
    Case(100, 100, 37, same=True, exclude_self=True, ids="padded", positives="lse"),
]


class Guarded:
    """A pool that hands out tensors full of NaN between guard bands of a known value.

    The kernels' outputs, slots and panels come from `new_empty`: what they leave unwritten shows as
    NaN in a result, what they write out of bounds in a band.
    """

    BAND, MARK = 4096, 77.0
    SIGNALLING = 0x7FA00000  # a NaN in fp32 whose bits change also where 0 is added to it

    def __init__(self, monkeypatch):
        self.pools = []
        pool = self

        original = torch.Tensor.new_empty

        def new_empty(tensor, *size, dtype=None, **rest):
            if rest:  # the interpreter's own
                return original(tensor, *size, dtype=dtype, **rest)
            shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
            whole = torch.full(
                (shape.numel() + 2 * pool.BAND,), pool.MARK, dtype=dtype or tensor.dtype
            )
            if whole.dtype == torch.float32:
                whole.view(torch.int32).fill_(pool.SIGNALLING)
            inner = whole[pool.BAND : pool.BAND + shape.numel()]
            pool.pools.append((whole, inner.fill_(torch.nan)))
            return inner.view(shape)

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)

    def check(self) -> int:
        for whole, inner in self.pools:
            end = self.BAND + inner.numel()
            mark = self.MARK
            if whole.dtype == torch.float32:
                whole, mark = whole.view(torch.int32), self.SIGNALLING
            bands = torch.cat([whole[: self.BAND], whole[end:]])
            assert (bands == mark).all(), "written out of bounds"
        return len(self.pools)


def banded(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x` between bands of NaN: what is read beyond its ends gets into the result."""
    if x is None:
        return None
    band = 4096
    poison = torch.nan if x.is_floating_point() else 1  # as an id: equal to real ones
    whole = torch.full((x.numel() + 2 * band,), poison, dtype=x.dtype)
    inner = whole[band : band + x.numel()].view(x.shape)
    return inner.copy_(x)


def absolute(problem: Problem, stats) -> list[tuple]:
    """The statistics as scores: with what they are relative to added."""
    positive = classify(problem, (lambda a, b: a @ b.T)(*features(problem))).positive
    out = []
    for dim, side in ((1, stats.row), (0, stats.col)):
        shift = side.max.masked_fill(side.max == -torch.inf, 0)
        number = positive.sum(dim) if problem.positives == "linear" else 1
        out.append((shift + side.logsum, side.pos + number * shift, side.neg_max))
    return out


def nothing_outside_is_read_or_written(
    backend, case: Case, monkeypatch, exact_max: bool = True
) -> None:
    """fp32 takes true maxima whatever is asked for: without them the features are in bf16."""
    dtype = FP32 if exact_max else BF16
    t = {k: banded(v) for k, v in make(case, dtype).items()}
    if case.same:
        t["b"], t["col_ids"] = t["a"], t["row_ids"]
    names = ("positives", "exclude_self", "exclude_positives", "diagonal")
    fields = {name: getattr(case, name) for name in names}
    fields |= {"hardest": case.hardest and exact_max, "exact_max": exact_max}
    problem = Problem(**(t | {"b": None if case.same else t["b"]}), **fields)
    needs = Needs(True, not case.same, True, case.biases, case.biases)
    g = torch.Generator().manual_seed(3)
    draws = [banded(torch.randn(k, generator=g)) for k in (case.n, case.m) * 2]
    upstream = Upstream(SideUpstream(*draws[::2]), SideUpstream(*draws[1::2]))
    expected_stats = reference.logsumexp_forward(problem)
    expected = reference.logsumexp_backward(problem, expected_stats, upstream, needs)
    expected_softplus = reference.softplus_forward(problem)

    guarded = Guarded(monkeypatch)
    stats = backend.logsumexp_forward(problem)
    grads = backend.logsumexp_backward(problem, stats, upstream, needs)
    softplus = [backend.softplus_forward(problem)]
    softplus.append(backend.softplus_both(problem, upstream.row.logsum, needs)[0])
    assert guarded.check() > 5
    for x, y in zip(
        tensors(*absolute(problem, stats)), tensors(*absolute(problem, expected_stats)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    for x in softplus:
        torch.testing.assert_close(x, expected_softplus, rtol=1e-4, atol=1e-4)
    for name, x, y in zip(Needs._fields, grads, expected, strict=True):
        if y is not None and name == "scale" and y.ndim and problem.scale.ndim == 0:
            x, y = x.sum(), y.sum()  # only the sum is defined for a 0-d scale
        if y is not None:
            rtol = 1e-3 if dtype == FP32 else 1e-2  # W is rounded to bf16
            x, y = x.to(FP32), y.to(FP32)
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * y.abs().max().item())


# ---- accuracy


def gradients_of_a_large_fp16_batch_do_not_underflow(name: str) -> None:
    """W is about 1/N²: in fp16 most of it would round to 0."""
    case = Case(200, 200, 16, scale=20.0, positives="linear")
    t = leaves(make(case, FP16), ("a", "b"))
    truth_t = leaves(t, ("a", "b"))
    weight = 1e-7
    stats = run(case, t, name)
    loss = ((stats.row_logsum - stats.row_pos) * 1e4 * weight).sum()
    truth = dense(case, truth_t, torch.float64)
    expected = gradients(((truth["row_lse"] - truth["row_linear"]) * 1e4 * weight).sum(), truth_t)
    for key, x in gradients(loss, t).items():
        size = expected[key].abs().max()
        assert (x.double() - expected[key].double()).abs().max() <= 0.02 * size


def positives_are_subtracted_before_rounding(name: str) -> None:
    """A hard negative near a good positive: the two halves of W nearly cancel (bf16, scale 100)."""
    g = torch.Generator().manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(64, 32, generator=g), dim=1)
    b = torch.nn.functional.normalize(a + 0.02 * torch.randn(64, 32, generator=g), dim=1)
    b[1::2] = torch.nn.functional.normalize(b[::2] + 0.01 * torch.randn(32, 32, generator=g), dim=1)
    a, b = (x.bfloat16().requires_grad_() for x in (a, b))
    case = Case(64, 64, 32, scale=100.0, positives="linear")
    t = {"a": a, "b": b, "scale": torch.tensor(100.0), "row_bias": None, "col_bias": None,
         "row_ids": None, "col_ids": None}  # fmt: skip
    stats = run(case, t, name)
    ours = gradients(
        (stats.row_logsum - stats.row_pos).sum() + (stats.col_logsum - stats.col_pos).sum(), t
    )
    truth = dense(case, t, torch.float64)
    total = sum((truth[f"{s}_lse"] - truth[f"{s}_linear"]).sum() for s in ("row", "col"))
    for key, expected in gradients(total, t).items():
        error = (ours[key].double() - expected.double()).norm() / expected.double().norm()
        assert error <= 0.03


# ---- on a GPU


def moved(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    """The tensors of `problems.make`, made on the CPU and moved."""
    with torch.device("cpu"):
        t = problems.make(case, dtype, seed)
    return like_case(case, {k: None if v is None else v.cuda() for k, v in t.items()})


def on_cpu(case: Case, t: dict) -> dict:
    return like_case(case, {k: None if v is None else v.cpu() for k, v in t.items()})


def like_case(case: Case, t: dict) -> dict:
    return t | {"b": t["a"], "col_ids": t["row_ids"]} if case.same else t


def runs_here(name: str) -> tuple[bool, str]:
    """Whether a backend has a GPU to run on, and why not."""
    if not torch.cuda.is_available():
        return False, "there is no CUDA device"
    problem = Problem(torch.ones(1, 8, device="cuda"), None, torch.ones((), device="cuda"))
    return dispatch.load(name).supports(problem)
