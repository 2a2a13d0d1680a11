"""The shared problem set: what every backend is asked, and the dense formula that judges it.

`dense` writes the primitive out on the full matrix with plain autograd. In fp64 it is the truth; in
the features' own dtype it is the PyTorch result whose error ours may exceed at most twofold
(threefold for gradients), plus a stated ε.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from ito_kernels import backends, similarity_logsumexp, similarity_softplus

AVAILABLE = [name for name, status in backends().items() if status.available]


@dataclass(frozen=True)
class Case:
    n: int
    m: int
    d: int
    scale: float = 10.0
    scale_per_row: bool = False
    biases: bool = False
    ids: str | None = None  # "groups", "padded", "none" (no positives), "all padded"
    positives: str | None = None
    exclude_self: bool = False
    exclude_positives: bool = False
    diagonal: int = 0
    rows: bool = True
    cols: bool = True
    hardest: bool = False
    limit: bool = False  # negatives beyond a limit are left out: about a third of them
    same: bool = False  # queries are the keys

    def __str__(self) -> str:
        size = f"{self.n}x{self.m}x{self.d}"
        return "-".join(
            [
                size,
                *(
                    f"{f.name}={v}"
                    for f in fields(self)[3:]
                    if (v := getattr(self, f.name)) != f.default
                ),
            ]
        )


SIZES = [
    Case(1, 1, 1),  # the smallest
    Case(1, 7, 3),  # one row: every row statistic over less than a vector
    Case(7, 1, 3),
    Case(33, 257, 70),  # ragged against any tile or vector width
    Case(257, 33, 512),
    Case(300, 300, 64),  # several tiles both ways
]
OPTIONS = [
    Case(65, 130, 24, ids="groups", positives="linear", hardest=True),
    Case(65, 130, 24, ids="groups", positives="lse", hardest=True),
    Case(65, 130, 24, ids="groups", positives="linear", exclude_positives=True),
    Case(65, 130, 24, ids="groups", positives="lse", exclude_positives=True),
    Case(65, 130, 24, ids="padded", positives="linear", hardest=True),
    Case(65, 130, 24, ids="padded", positives="lse"),
    Case(65, 130, 24, ids="none", positives="linear"),
    Case(65, 130, 24, ids="none", positives="lse"),
    Case(65, 130, 24, ids="all padded", positives="linear"),
    Case(65, 65, 24, positives="linear", exclude_self=True),
    Case(65, 65, 24, ids="groups", positives="lse", exclude_self=True, hardest=True),
    Case(65, 130, 24, positives="linear", diagonal=40),
    Case(65, 130, 24, positives="linear", diagonal=-9, exclude_positives=True),
    Case(130, 65, 24, exclude_self=True, diagonal=-20),
    Case(65, 130, 24, biases=True, positives="linear"),
    Case(65, 130, 24, scale_per_row=True, biases=True, ids="groups", positives="lse"),
    Case(65, 130, 24, cols=False, ids="groups", positives="linear"),
    Case(65, 130, 24, rows=False, ids="groups", positives="linear"),
    Case(130, 130, 24, same=True, exclude_self=True, ids="groups", positives="linear"),
    Case(130, 130, 24, same=True, exclude_self=True, cols=False, ids="groups", positives="lse"),
    Case(130, 130, 24, same=True, cols=False, ids="padded", exclude_self=True, positives="linear"),
    Case(
        130, 130, 24, same=True, scale_per_row=True, biases=True, ids="groups", positives="linear"
    ),
    Case(65, 130, 24, scale=0.01, positives="linear"),
    Case(65, 130, 24, scale=200.0, positives="linear"),
    Case(65, 130, 24, scale=200.0, ids="groups", positives="lse"),
    Case(130, 130, 24, same=True, biases=True, ids="groups", positives="lse"),  # not symmetric
    Case(300, 300, 512, scale=100.0, ids="groups", positives="linear", exclude_self=True),
]
LIMITS = [
    Case(65, 130, 24, limit=True, ids="groups", positives="linear", hardest=True),
    Case(65, 130, 24, limit=True, ids="padded", positives="lse", scale_per_row=True, biases=True),
    Case(65, 130, 24, limit=True, positives="lse", diagonal=9, cols=False),
    Case(130, 130, 24, limit=True, same=True, exclude_self=True, ids="groups", positives="linear"),
    Case(
        150, 150, 64, limit=True, exclude_positives=True, cols=False, ids="groups", positives="lse"
    ),
]
CASES = [replace(c, positives="linear") if c.positives is None else c for c in SIZES]
CASES += OPTIONS + LIMITS


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def spread(cases: list[Case], dtypes=(FP32, BF16, FP16)) -> list:
    """Every case, the dtypes in turn."""
    pairs = [(case, dtypes[i % len(dtypes)]) for i, case in enumerate(cases)]
    return [pytest.param(*p, id=f"{p[0]}-{str(p[1])[6:]}") for p in pairs]


def turned(cases: list[Case], others: list[str]) -> list:
    """Every case with every one of the others, the dtypes in turn: neighbours have another one."""
    return [
        pytest.param(other, *p.values, id=f"{other}-{p.id}")
        for i, other in enumerate(others)
        for p in spread(cases, [(FP32, BF16, FP16)[(i + j) % 3] for j in range(3)])
    ]


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | None]:
    """The tensors of a case. Features are unit vectors, scale and biases fp32 (fp64 for fp64)."""
    g = torch.Generator().manual_seed(seed)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32

    def features(rows: int) -> Tensor:
        x = torch.randn(rows, case.d, generator=g, dtype=torch.float64)
        return torch.nn.functional.normalize(x, dim=1).to(dtype)

    def ids(rows: int) -> Tensor | None:
        if case.ids is None:
            return None
        out = torch.randint(0, max(2, case.n // 4), (rows,), generator=g)
        if case.ids == "padded":
            out = torch.where(torch.rand(rows, generator=g) < 0.3, -1 - out, out)
        if case.ids == "all padded":
            out = torch.full_like(out, -1)
        return out

    a = features(case.n)
    b = a if case.same else features(case.m)
    row_ids, col_ids = ids(case.n), ids(case.m)
    if case.ids == "none":
        col_ids = col_ids + 10 * case.n
    if case.same:
        col_ids = row_ids
    scale = torch.tensor(case.scale, dtype=accumulate)
    if case.scale_per_row:
        scale = scale * (0.5 + torch.rand(case.n, generator=g, dtype=accumulate))

    def bias(rows: int) -> Tensor | None:
        return torch.randn(rows, generator=g, dtype=accumulate) if case.biases else None

    if case.ids == "padded":  # padding may hold anything
        for x, i in ((a, row_ids), (b, col_ids)):
            x[i < 0] = torch.nan
    return {
        "a": a,
        "b": b,
        "scale": scale,
        "row_bias": bias(case.n),
        "col_bias": bias(case.m),
        "row_ids": row_ids,
        "col_ids": col_ids,
    }


def exact_products(t: dict) -> Tensor:
    a, b = t["a"].detach().double(), t["b"].detach().double()
    if t["row_ids"] is not None:
        a = a.masked_fill((t["row_ids"] < 0)[:, None], 0)
        b = b.masked_fill((t["col_ids"] < 0)[:, None], 0)
    return a @ b.T


def row_limit(t: dict) -> Tensor:
    """For each row a number in the widest gap between the inner products of the middle third, so
    that no rounding decides which side one is on."""
    ordered = exact_products(t).sort(1).values
    m = ordered.shape[1]
    middle = ordered[:, m // 2 : m // 2 + m // 3]
    at = middle.diff(dim=1).argmax(1, keepdim=True)
    return (0.5 * (middle.gather(1, at) + middle.gather(1, at + 1))).squeeze(1).to(t["scale"].dtype)


def leaves(tensors: dict, names=("a", "b", "scale", "row_bias", "col_bias")) -> dict:
    """The same tensors, with gradients wanted for `names`; `b` stays `a` where it is."""
    same = tensors["b"] is tensors["a"]
    out = dict(tensors)
    for name in names:
        if tensors[name] is not None and not (same and name == "b"):
            out[name] = tensors[name].detach().clone().requires_grad_()
    if same:
        out["b"] = out["a"]
    return out


def dense(case: Case, t: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every output of both primitives, as absolute scores, on the dense matrix in `dtype`."""
    a, b = t["a"].to(dtype), t["b"].to(dtype)
    n, m = case.n, case.m
    i, j = torch.arange(n)[:, None], torch.arange(m)[None, :]
    self_pair = j == i + case.diagonal
    positive, candidate = self_pair, torch.ones(n, m, dtype=torch.bool)
    if t["row_ids"] is not None:
        positive = t["row_ids"][:, None] == t["col_ids"]
        candidate = (t["row_ids"] >= 0)[:, None] & (t["col_ids"] >= 0)
        a = torch.where((t["row_ids"] >= 0)[:, None], a, 0)
        b = torch.where((t["col_ids"] >= 0)[:, None], b, 0)
    if case.exclude_self:
        candidate = candidate & ~self_pair
    positive = positive & candidate
    for_softplus = candidate
    if case.limit:
        candidate = candidate & (positive | (exact_products(t) <= row_limit(t)[:, None]))
    allowed = candidate & ~positive if case.exclude_positives else candidate
    S = t["scale"].to(dtype).reshape(-1, 1) * (a @ b.T)
    if case.biases:
        S = S + t["row_bias"].to(dtype)[:, None] + t["col_bias"].to(dtype)
    out = {}
    for side, dim in (("row", 1), ("col", 0)):
        masked = torch.where(allowed, S, -torch.inf)
        out[f"{side}_max"] = masked.amax(dim)
        out[f"{side}_lse"] = safe_logsumexp(masked, dim)
        out[f"{side}_linear"] = torch.where(positive, S, 0).sum(dim)
        out[f"{side}_lse_pos"] = safe_logsumexp(torch.where(positive, S, -torch.inf), dim)
        out[f"{side}_count"] = positive.sum(dim)
        out[f"{side}_neg_max"] = torch.where(candidate & ~positive, S, -torch.inf).amax(dim)
    signed = torch.where(positive, -S, S)
    pair = signed.clamp(min=0) + torch.log1p(torch.exp(-signed.abs()))
    out["softplus"] = torch.where(for_softplus, pair, 0).sum(1)
    return out


def safe_logsumexp(x: Tensor, dim: int) -> Tensor:
    """logsumexp with a zero gradient, not NaN, where everything is -inf."""
    empty = (x == -torch.inf).all(dim, keepdim=True)
    return torch.where(empty.squeeze(dim), -torch.inf, torch.where(empty, 0, x).logsumexp(dim))


def run(case: Case, t: dict, backend: str, exact_max: bool = True, half_values: bool = False):
    """Our statistics of a case."""
    return similarity_logsumexp(
        **t,
        row_limit=row_limit(t) if case.limit else None,
        positives=case.positives,
        exclude_self=case.exclude_self,
        exclude_positives=case.exclude_positives,
        diagonal=case.diagonal,
        rows=case.rows,
        cols=case.cols,
        hardest=case.hardest,
        exact_max=exact_max,
        half_values=half_values,
        backend=backend,
    )


def run_softplus(case: Case, t: dict, backend: str) -> Tensor:
    return similarity_softplus(
        **t, exclude_self=case.exclude_self, diagonal=case.diagonal, backend=backend
    )


def tensors(*structs) -> list[Tensor]:
    """What statistics and gradients hold, side by side, without what was not asked for."""
    out = []
    for x in structs:
        if isinstance(x, tuple):
            out += tensors(*x)
        elif x is not None:
            out.append(x)
    return out


def weights(case: Case, truth: dict) -> dict[str, Tensor]:
    """A random linear functional of the outputs: upstream gradients, 0 at infinite outputs."""
    g = torch.Generator().manual_seed(1)
    out = {}
    kind = "linear" if case.positives == "linear" else "lse_pos"
    for side, wanted in (("row", case.rows), ("col", case.cols)):
        for ours, name in (("logsum", "lse"), ("pos", kind)):
            value = truth[f"{side}_{name}"]
            w = torch.rand(value.shape, generator=g, dtype=torch.float64) - 0.5
            out[f"{side}_{ours}"] = torch.where(value.isfinite() & wanted, w, 0).detach()
    return out


def gradients(total: Tensor, t: dict) -> dict[str, Tensor]:
    names = [k for k, v in t.items() if v is not None and v.requires_grad]
    names = [k for k in names if not (k == "b" and t["b"] is t["a"])]
    grads = torch.autograd.grad(total, [t[k] for k in names])
    return dict(zip(names, grads, strict=True))


def assert_accurate(ours: Tensor, truth: Tensor, same_dtype: Tensor, factor: float, eps: float):
    """|ours - truth| ≤ factor · |same_dtype - truth| + eps in the maximum norm; -inf must agree."""
    ours, truth, same_dtype = (x.detach().double() for x in (ours, truth, same_dtype))
    assert not ours.isnan().any()
    infinite = truth.isinf()
    assert torch.equal(ours[infinite], truth[infinite])
    if infinite.all():
        return
    error = (ours - truth)[~infinite].abs().max()
    bound = factor * (same_dtype - truth)[~infinite].abs().max() + eps
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"
