"""Laws of a batch that is spread over ranks: however its rows are shared out, in whatever order,
chunks and transport, every loss and option gives the loss and the gradients of one process."""

import os
import traceback
from functools import partial
from itertools import pairwise
from random import Random
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from support import processes
from support.combinations import random_combination
from support.examples import drawn
from support.infonce_options import F64, OPTIONS, RULES, WITH_GRADIENT, M, N, arguments
from support.losses_table import ROWS, Inputs
from torch import Tensor
from torch.nn.functional import normalize

import ito_kernels as ik

# Their calls make an argument of the rows of one process, or the mean of its anchors.
OF_ONE_PROCESS = ("guide_queries, guide_keys", 'reduction="none"')
CASES = [(loss, option) for loss, rows in ROWS.items() for option in rows]
CASES = [case for case in CASES if case[1] not in OF_ONE_PROCESS]
# Their options name rows by number: not the same in another order.
BY_NUMBER = [
    case
    for case in CASES
    if "pairs" in case[1]
    or case[1] in ("hard_negative_ids", 'empty="drop"', "generator")
    or case[0] == "mixup_infonce"
]


def shares(total: int, size: int):
    """The rows of each rank, at least one."""
    cuts = st.lists(st.integers(1, total - 1), min_size=size - 1, max_size=size - 1, unique=True)

    def between(cuts):
        edges = [0, *sorted(cuts), total]
        return [list(range(a, b)) for a, b in pairwise(edges)]

    return cuts.map(between)


def examples_of(size: int, **strategies):
    """Of a law on so many ranks, with how keys travel."""
    return st.fixed_dictionaries(
        {
            "chunk_size": st.sampled_from([None, 1, 3, 100]),
            "environment": st.fixed_dictionaries(
                {
                    "ITO_TRANSPORT": st.sampled_from(["gather", "ring"]),
                    "ITO_GATHER_CACHE_BYTES": st.sampled_from(["0", "500", "1000000"]),
                }
            ),
            **strategies,
        }
    )


def near(found: Tensor, truth: Tensor, rtol: float, what: str) -> str | None:
    """What is wrong. No rank raises while others wait for it."""
    if found.shape != truth.shape:
        return f"{what} has shape {tuple(found.shape)}, not {tuple(truth.shape)}"
    differ = found != truth  # equal infinities do not
    error = (found - truth)[differ].double().abs()
    size = truth[truth.isfinite()].double().abs().amax().item() if truth.isfinite().any() else 0.0
    if (error <= rtol * size + 1e-2 * rtol).all():
        return None
    return f"{what}: off by {error.max():.3g} of {size:.3g}"


def averaged(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


# ---- every loss and option


def features(n: int, d: int, seed: int, dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(n, d, generator=g, dtype=F64), dim=1).to(dtype) for _ in range(3)]


def of_table(case, inputs: Inputs, **where) -> list[Tensor]:
    """The loss and its gradients for x, y, z and the scale."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs[:3], inputs.scale)]
    inputs = inputs._replace(x=leaves[0], y=leaves[1], z=leaves[2], scale=leaves[3])
    loss, option = case
    value = ROWS[loss][option].call(loss, inputs, **where)
    # a loss may leave z alone, or take it for targets without gradient
    return [value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)]


def as_one_process(case, rows, seed, backend, **where) -> list[str | None]:
    n, dtype, rtol = sum(map(len, rows)), F64, 1e-10
    if backend == "cpu":
        dtype, rtol = torch.float32, 1e-4
    whole = Inputs.of(*features(n, 6, seed, dtype))
    whole = whole._replace(scale=torch.tensor(12.0, dtype=dtype))
    order = torch.arange(n) if case in BY_NUMBER else torch.randperm(n)
    at = order[rows[dist.get_rank()]]
    own = whole._replace(x=whole.x[at], y=whole.y[at], z=whole.z[at], rows=at)
    found = of_table(case, own, backend=backend, group=dist.group.WORLD, **where)
    truth = of_table(case, whole, backend=backend)
    found[1:4] = [x / dist.get_world_size() for x in found[1:4]]
    found[4] = averaged(found[4])
    truth[1:4] = [x[at] for x in truth[1:4]]
    names = ("loss", "gradient of x", "of y", "of z", "of the scale")
    return [near(*pair, rtol, name) for *pair, name in zip(found, truth, names, strict=True)]


# ---- combinations of the options of multi_positive_infonce

OF_QUERIES = {"queries", "logit_scale", "query_ids", "query_weights", "hard_negatives"}
OF_QUERIES |= {"hard_negative_ids", "guide_queries", "debias"}
OF_KEYS = {"keys", "key_ids", "key_weights", "key_bias", "guide_keys"}


def own_part(given: dict, rows: Tensor, cols: Tensor) -> dict:
    """The arguments of the rank with these rows and columns."""
    found = {}
    for name, x in given.items():
        at = rows if name in OF_QUERIES else cols if name in OF_KEYS else None
        found[name] = x[at] if at is not None and isinstance(x, Tensor) and x.ndim else x
    if given["positive_pairs"] is not None:
        own = torch.isin(given["positive_pairs"][:, 0], rows)
        for name in ("positive_pairs", "positive_weights"):
            found[name] = None if given[name] is None else given[name][own]
    if given["keys"] is given["queries"]:
        found["keys"] = found["queries"]
    return found


def infonce(given: dict, rows: Tensor, cols: Tensor, **where) -> tuple[dict, dict]:
    """The losses and statistics, and the gradients, by name. With reduction="none" the gradients
    are those of a sum with other weights for each anchor."""
    given = dict(given)
    one_tower = given["keys"] is given["queries"]
    names = [name for name in WITH_GRADIENT if given[name] is not None]
    leaves = {name: given[name].detach().clone().requires_grad_() for name in names}
    given |= leaves
    if one_tower:
        given["keys"] = given["queries"]
        del leaves["keys"]
    found = ik.multi_positive_infonce(**given, **where)
    value, stats = found if given["return_stats"] else (found, {})
    values = dict(
        zip(("rows", "cols"), value if isinstance(value, tuple) else [value], strict=False)
    )
    total = sum(
        ((1 + (cols if side == "cols" else rows)) * x).sum() if x.ndim else x
        for side, x in values.items()
    )
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    values |= {name: x for name, x in stats.items() if x is not None}
    values = {name: x.detach() for name, x in values.items()}
    return values, dict(zip(leaves, grads, strict=True))


def combination_as_one_process(chosen, rows, cols, seed, backend, chunk_size) -> list[str | None]:
    given = arguments(chosen, seed)
    rank, size = dist.get_rank(), dist.get_world_size()
    at_rows = torch.tensor(rows[rank])
    at_cols = torch.tensor(cols[rank]) if chosen["keys"] == "more" else at_rows
    everywhere = torch.arange(len(given["queries"])), torch.arange(len(given["keys"]))
    own = own_part(given, at_rows, at_cols) | {"chunk_size": chunk_size}
    values, grads = infonce(own, at_rows, at_cols, backend=backend, group=dist.group.WORLD)
    truth, expected = infonce(given, *everywhere, backend=backend)
    # the losses of anchors are summed over ranks, means and sums are averaged
    factor = 1 if chosen["reduction"] == "none" else size
    wrong = []
    for name, x in truth.items():
        if x.ndim:
            x = x[at_cols if name.startswith("col") else at_rows]
        wrong.append(near(values[name], x, 1e-10, name))
    for name, x in expected.items():
        if x.ndim:
            found = grads[name] / factor
            x = x[at_cols if name in OF_KEYS else at_rows]
        else:
            found = averaged(grads[name]) * size / factor
        wrong.append(near(found, x, 1e-10, f"gradient of {name}"))
    return [*wrong, None if values.keys() == truth.keys() else f"{values.keys()}"]


# ---- laws between calls on ranks

REWEIGHTED = st.sampled_from(
    [
        {},
        {"label_smoothing": 0.2},
        {"debias": 0.1},
        {"hardness": 0.7},
        {"false_negative_margin": 0.2, "debias": 0.1, "hardness": 0.7},
    ]
)


def of_two_towers(q: Tensor, k: Tensor, **options) -> list[Tensor]:
    q, k = (x.detach().requires_grad_() for x in (q, k))
    loss = ik.multi_positive_infonce(q, k, 5.0, backend="chunked", **options)
    return [loss.detach(), *torch.autograd.grad(loss, (q, k))]


def a_queue_is_more_keys(rows, seed, positives, more, **where) -> list[str | None]:
    """A queue that all ranks have, and keys of the last rank that no query is paired with."""
    n, rank, size = sum(map(len, rows)), dist.get_rank(), dist.get_world_size()
    q, k, queue = features(n, 6, seed, F64)
    at, ids = torch.tensor(rows[rank]), torch.arange(2 * n)
    options = {
        "positives": positives,
        "symmetric": False,
        "group": dist.group.WORLD,
        **more,
        **where,
    }
    last = rank == size - 1
    keys = torch.cat([k[at], queue]) if last else k[at]
    key_ids = torch.cat([at, ids[n:]]) if last else at.clone()
    as_keys = of_two_towers(q[at], keys, query_ids=at, key_ids=key_ids, **options)
    as_queue = of_two_towers(q[at], k[at], queue=queue, **options)
    as_keys[2] = as_keys[2][: len(at)]
    names = ("loss", "gradient of queries", "of keys")
    return [near(*pair, 1e-9, x) for *pair, x in zip(as_queue, as_keys, names, strict=True)]


def symmetric_is_the_mean(rows, cols, seed, positives, more, **where) -> list[str | None]:
    """The queries of a rank and its keys may be of different numbers."""
    q, k = features(N, 6, seed, F64)[0], features(M, 6, seed + 1, F64)[0]
    g = torch.Generator().manual_seed(seed)
    q_ids, k_ids = (torch.randint(-1, 5, (size,), generator=g) for size in (N, M))
    i, j = (torch.tensor(x[dist.get_rank()]) for x in (rows, cols))
    options = {"positives": positives, "group": dist.group.WORLD, **more, **where}
    a, b = (
        {"query_ids": q_ids[i], "key_ids": k_ids[j]},
        {"query_ids": k_ids[j], "key_ids": q_ids[i]},
    )
    both = of_two_towers(q[i], k[j], **a, **options)
    there = of_two_towers(q[i], k[j], **a, symmetric=False, **options)
    back = of_two_towers(k[j], q[i], **b, symmetric=False, **options)
    mean = [0.5 * (x + y) for x, y in zip(there, [back[0], back[2], back[1]], strict=True)]
    names = ("loss", "gradient of queries", "of keys")
    return [near(*pair, 1e-9, x) for *pair, x in zip(both, mean, names, strict=True)]


LAWS = {
    "every loss and option": as_one_process,
    "combinations of options": combination_as_one_process,
    "a queue is more keys": a_queue_is_more_keys,
    "symmetric is the mean of two directions": symmetric_is_the_mean,
}


def examples_on(size: int) -> dict:
    """{law: its examples}"""
    rows = {"rows": st.integers(size, 14).flatmap(partial(shares, size=size))}
    seeds = {"seed": st.integers(0, 2**32 - 2)}
    infonce = {**seeds, "positives": st.sampled_from(["mean", "in", "sum"]), "more": REWEIGHTED}
    uneven = {"rows": shares(N, size), "cols": shares(M, size)}
    chosen = st.integers(0, 2**32).map(lambda x: random_combination(OPTIONS, RULES, Random(x)))
    dense = {"backend": st.sampled_from(["reference", "chunked"])}
    return dict(
        zip(
            LAWS,
            (
                examples_of(
                    size,
                    case=st.sampled_from(CASES),
                    backend=st.sampled_from(["reference", "chunked", "cpu"]),
                    **rows,
                    **seeds,
                ),
                examples_of(size, chosen=chosen, **uneven, **seeds, **dense),
                examples_of(size, **rows, **infonce),
                examples_of(size, **uneven, **infonce),
            ),
            strict=True,
        )
    )


def check(examples: list[tuple[str, dict]]) -> dict:
    """What is wrong on this rank with each example, by its number."""
    found = {}
    for number, (law, example) in enumerate(examples):
        given = dict(example)
        torch.manual_seed(number)  # of all ranks alike
        try:
            with patch.dict(os.environ, given.pop("environment")):
                wrong = [x for x in LAWS[law](**given) if x]
        except Exception:
            wrong = [traceback.format_exc()]
        if wrong:
            found[number] = "\n".join(wrong)
    return {"wrong": found}


@pytest.mark.parametrize(
    ("size", "number"),
    [(3, 5), *(pytest.param(size, 150, marks=pytest.mark.slow) for size in (2, 3))],
)
def test_laws(size, number):
    examples = [
        (law, example)
        for law, strategy in examples_on(size).items()
        for example in drawn(number, strategy, fixed=number == 5)
    ]
    found = processes.run(check, size, examples, timeout=900)
    assert all(found), "a rank has ended"
    for rank, result in enumerate(found):
        for number, wrong in result["wrong"].items():
            raise AssertionError(f"rank {rank}, {examples[number]}: {wrong}")
