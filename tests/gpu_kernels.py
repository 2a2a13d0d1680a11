"""What the kernels of both GPU backends are asked beyond the shared problem set, for the tests of
each; `backend` is what `dispatch.load(name)` gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import OPTIONS, Case, dense, gradients, leaves, make, run, tensors

from ito_kernels.similarity import dispatch
from ito_kernels.similarity.spec import Needs, Problem, SideUpstream, Upstream

reference = dispatch.load("reference")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def spread(cases: list[Case], dtypes=(FP32, BF16, FP16)) -> list:
    """Every case, the dtypes in turn."""
    pairs = [(case, dtypes[i % len(dtypes)]) for i, case in enumerate(cases)]
    return [pytest.param(*p, id=f"{p[0]}-{str(p[1])[6:]}") for p in pairs]


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
            inner = whole[pool.BAND : pool.BAND + shape.numel()]
            pool.pools.append((whole, inner.fill_(torch.nan)))
            return inner.view(shape)

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)

    def check(self) -> int:
        for whole, inner in self.pools:
            end = self.BAND + inner.numel()
            bands = torch.cat([whole[: self.BAND], whole[end:]])
            assert (bands == self.MARK).all(), "written out of bounds"
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


def nothing_outside_is_read_or_written(backend, case: Case, monkeypatch) -> None:
    t = {k: banded(v) for k, v in make(case, FP32).items()}
    if case.same:
        t["b"], t["col_ids"] = t["a"], t["row_ids"]
    names = ("positives", "exclude_self", "exclude_positives", "diagonal", "hardest")
    fields = {name: getattr(case, name) for name in names}
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
    for x, y in zip(tensors(stats), tensors(expected_stats), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    for x in softplus:
        torch.testing.assert_close(x, expected_softplus, rtol=1e-4, atol=1e-4)
    for name, x, y in zip(Needs._fields, grads, expected, strict=True):
        if y is not None and name == "scale" and y.ndim and problem.scale.ndim == 0:
            x, y = x.sum(), y.sum()  # only the sum is defined for a 0-d scale
        if y is not None:
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * y.abs().max().item())


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
        t = make(case, dtype, seed)
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
