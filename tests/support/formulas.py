"""Formulas of the losses written out for one anchor after the other, and how a loss is held against
one: by value and gradients, in fp64."""

import math

import torch
from torch.nn.functional import normalize


def unit(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)


def anchor_losses(S, row_ids, col_ids, positives="mean", exclude_self=False):
    """One anchor at a time: the list of its losses, None where it has no positive."""
    out = []
    for i in range(len(S)):
        keys = [j for j in range(S.shape[1]) if col_ids[j] >= 0 and not (exclude_self and i == j)]
        same = [j for j in keys if col_ids[j] == row_ids[i]] if row_ids[i] >= 0 else []
        if row_ids[i] < 0:
            continue  # padding is no anchor
        if not same:
            out.append(None)
            continue
        z, s = S[i, keys].logsumexp(0), S[i, same]
        if positives == "mean":
            out.append(z - s.mean())
        else:
            out.append(z - s.logsumexp(0) + (math.log(len(same)) if positives == "in" else 0))
    return out


def mean(losses, empty="zero"):
    found = [x for x in losses if x is not None]
    n = len(losses) if empty == "zero" else len(found)
    return sum(found) / n if found else torch.zeros((), dtype=torch.float64)


def infonce(q, k, scale, row_ids, col_ids, symmetric=True, empty="zero", **options):
    S = torch.as_tensor(scale, dtype=torch.float64).reshape(-1, 1) * (q @ k.T)
    rows = mean(anchor_losses(S, row_ids, col_ids, **options), empty)
    if not symmetric:
        return rows
    return 0.5 * (rows + mean(anchor_losses(S.T, col_ids, row_ids, **options), empty))


def random_ids(n, groups, seed, padded=False):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, groups, (n,), generator=g)
    return torch.where(torch.rand(n, generator=g) < 0.2, -1, ids) if padded else ids


def check(loss, truth, leaves, rtol=1e-10):
    """Value and gradients of two fp64 losses of the same leaves."""
    torch.testing.assert_close(loss, truth, rtol=rtol, atol=1e-12)
    ours = torch.autograd.grad(loss, leaves, allow_unused=True)
    theirs = torch.autograd.grad(truth, leaves, allow_unused=True)
    for x, y in zip(ours, theirs, strict=True):
        y = torch.zeros_like(x) if y is None else y
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-12)


def nt_xent(z1, z2, scale):
    """Method paper's form: for each view and item, its partner against both views of all items."""
    total = 0
    for h, other in ((z1, z2), (z2, z1)):
        for i in range(len(h)):
            cross, same = scale * h[i] @ other.T, scale * h[i] @ h.T
            rest = torch.cat([same[:i], same[i + 1 :]])
            total = total - (cross[i] - torch.cat([cross, rest]).logsumexp(0))
    return total / (2 * len(z1))
