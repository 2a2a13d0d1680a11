"""The binding of the CPU kernels, given arguments of any kind: it raises, or its results are right.

A valid call is spoiled in up to three places: another number, another dtype or size, other strides,
no tensor, memory that belongs to another tensor. The results of a call that goes through are
compared with the dense fp64 formula for the arguments that it was given.

A few hundred calls are made here. As a script it goes on for so many seconds, best on a module that
was built with sanitizers: bash .ci/sanitized address tests/kernels/test_binding.py 600
"""

import random
import sys
import time
import traceback
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ito_kernels.similarity import dispatch
from ito_kernels.similarity.cpu import POSITIVES
from ito_kernels.similarity.native import _native
from ito_kernels.similarity.spec import (
    Needs,
    Problem,
    SideUpstream,
    Stats,
    Upstream,
)

pytestmark = pytest.mark.skipif(_native is None, reason="installed without a C++ compiler")

reference = dispatch.load("reference")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = (-1, 0, 1, 2, 3, 7, 2**24, 2**31 - 1, 2**31, 2**40, -(2**31), 2**63 - 1, -(2**63), 2**64)
REFUSALS = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    OverflowError,
    IndexError,
    MemoryError,
)

outcomes = Counter()


# ---- valid calls


def problem(r: random.Random) -> Problem:
    n, m, d = (r.choice((1, 2, 3, 17, r.randint(1, 70))) for _ in range(3))
    g = torch.Generator().manual_seed(r.randrange(2**31))
    dtype = r.choice(FLOATS)

    def features(rows):
        return torch.nn.functional.normalize(torch.randn(rows, d, generator=g), dim=1).to(dtype)

    def maybe(x):
        return x if r.random() < 0.3 else None

    same = r.random() < 0.3
    m = n if same else m
    ids = r.random() < 0.4
    draw = [torch.randint(-1, 4, (k,), generator=g) if ids else None for k in (n, m)]
    return Problem(
        a=features(n),
        b=None if same else features(m),
        scale=torch.rand(n, generator=g) if r.random() < 0.3 else torch.tensor(2.0),
        row_bias=maybe(torch.randn(n, generator=g)),
        col_bias=maybe(torch.randn(m, generator=g)),
        row_ids=draw[0],
        col_ids=draw[0] if same else draw[1],
        row_limit=maybe(torch.randn(n, generator=g)),
        positives=r.choice(POSITIVES),
        exclude_self=r.random() < 0.3,
        exclude_positives=r.random() < 0.3,
        diagonal=r.choice((0, 0, 1, -3)),
        rows=True,
        cols=r.random() < 0.7,
        hardest=r.random() < 0.3,
    )


def fields(p: Problem) -> list:
    flags = (p.exclude_self, p.exclude_positives, p.diagonal, p.rows, p.cols, p.hardest)
    return [*p.tensors[:2], p.scale.ndim == 1, *p.tensors[2:], POSITIVES.index(p.positives), *flags]


def exact(given: tuple) -> Problem:
    """The problem of such fields, in fp64."""
    a, b, per_row, *vectors, positives = given[:10]
    vectors = [x if x is None else x.reshape(-1) for x in vectors]
    if not per_row:
        vectors[0] = vectors[0].reshape(())
    tensors = [
        x.double() if x is not None and x.is_floating_point() else x for x in (a, b, *vectors)
    ]
    return Problem(*tensors, POSITIVES[positives], *given[10:])


def unwritten(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def new_stats(p: Problem) -> list:
    def side(length):
        wanted = (True, True, p.positives is not None, p.hardest)
        return [unwritten(length) if want else None for want in wanted]

    return [side(p.n) if p.rows else None, side(p.m) if p.cols else None]


def new_grads(p: Problem, r: random.Random) -> list:
    shapes = (p.a.shape, p.b is not None and p.b.shape, p.scale.shape, *(
        x is not None and x.shape for x in (p.row_bias, p.col_bias)))  # fmt: skip
    dtypes = (p.a.dtype, p.a.dtype, *[torch.float32] * 3)
    return [
        unwritten(*shape, dtype=dtype) if shape is not False and r.random() < 0.7 else None
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def new_weights(p: Problem, r: random.Random) -> list:
    def weight(length):
        return r.choice((None, 0.5, torch.rand(length)))

    sides = ((p.n, p.rows), (p.m, p.cols))
    return [
        [weight(k), weight(k) if p.positives else None] if on else [None, None] for k, on in sides
    ]


def valid_call(r: random.Random) -> tuple[str, list]:
    """A function of the module, and its arguments: lists for tuples."""
    p, threads = problem(r), r.randint(1, 3)
    kind = r.choice(("forward", "backward", "both", "softplus", "count_equal", "describe"))
    if kind == "softplus":
        p = p._replace(exclude_positives=False, row_limit=None)
    if kind == "forward":
        size = r.choice((0, 64, 10**5))
        cache = torch.zeros(size, dtype=torch.uint8) if size else None
        return kind, [fields(p), new_stats(p), [cache, size], threads]
    if kind == "backward":
        found = reference.logsumexp_forward(exact(tuple(fields(p))))
        stats = [None if x is None else [y if y is None else y.float() for y in x] for x in found]
        weights = [[w if type(w) is not float else torch.rand(k) for w in side]
                   for k, side in zip((p.n, p.m), new_weights(p, r), strict=True)]  # fmt: skip
        return kind, [fields(p), stats, weights, new_grads(p, r), [None, 0], threads]
    if kind == "both":
        stats = new_stats(p) if r.random() < 0.5 else [None, None]
        rest = [unwritten(1)], [None, r.choice((0, 10**5))], threads
        return kind, [fields(p), stats, new_weights(p, r), new_grads(p, r), *rest]
    if kind == "softplus":
        loss, total = ([x] if r.random() < 0.5 else [None] for x in (unwritten(p.n), unwritten(1)))
        weights = [r.choice((0.5, torch.rand(p.n)))]
        return kind, [fields(p), loss, weights, new_grads(p, r), total, threads]
    if kind == "count_equal":
        n, m = r.randint(0, 20), r.randint(0, 20)
        ids = [torch.randint(-1, 4, (k,)) for k in (n, m)]
        return kind, [[n, m, *ids, torch.full((n,), -7)]]
    return kind, [fields(p), threads]


# ---- spoiled


def leaves(x: list, path: tuple = ()) -> list:
    out = [path] if path else []
    for i, y in enumerate(x):
        out += leaves(y, (*path, i)) if isinstance(y, list) else [(*path, i)]
    return out


def read(x: list, path: tuple):
    for i in path:
        x = x[i]
    return x


def dense_tensors(x) -> list[torch.Tensor]:
    if isinstance(x, (list, tuple)):
        return [z for y in x for z in dense_tensors(y)]
    dense = isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.layout == torch.strided
    return [x] if dense else []


def odd_tensor(x: torch.Tensor, others: list, r: random.Random):
    """Another tensor in its place. Whether a call can go on with it is for the binding to say."""

    def misaligned():
        memory = bytearray(x.numel() * x.itemsize + 1)
        return torch.frombuffer(memory, dtype=x.dtype, offset=1).view(x.shape) if x.numel() else x

    def of_other():  # memory of another tensor of the call, from somewhere in it
        y = r.choice(others)
        memory = y.reshape(-1).view(torch.uint8)[r.choice((0, 8)) :] if y.numel() else y
        size = x.numel() * x.itemsize
        return memory[:size].view(x.dtype).view(x.shape) if len(memory) >= size else y

    kinds = (
        lambda: None,
        lambda: x.data_ptr(),
        lambda: x.to(
            r.choice((torch.float64, torch.int32, torch.float16, torch.bool, torch.int64))
        ),
        lambda: torch.cat([x, x])[: x.shape[0] + r.choice((-1, 1))] if x.ndim else x.repeat(2),
        lambda: x[:0] if x.ndim else x,
        lambda: torch.stack([x, x], -1)[..., 0],  # every second element
        lambda: x.t() if x.ndim == 2 else x,
        lambda: x.t().contiguous().t() if x.ndim == 2 else x,
        lambda: x[:1].expand(x.shape) if x.ndim else x,
        lambda: x[..., :1].expand(x.shape) if x.ndim else x,
        lambda: x.as_strided(x.shape, (1,) * x.ndim),  # rows that overlap
        lambda: x.unsqueeze(0),
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        misaligned,
        of_other,
        lambda: [x],
        lambda: "tensor",
    )
    return r.choice(kinds)()


def spoil(arguments: list, r: random.Random) -> None:
    path = r.choice(leaves(arguments))
    *before, last = path
    parent, x = read(arguments, before), read(arguments, path)
    others = [y for y in dense_tensors(arguments) if y.is_contiguous()]
    if isinstance(x, torch.Tensor) and dense_tensors(x):
        parent[last] = odd_tensor(x, others, r)
    elif isinstance(x, list):
        choice = r.randrange(4)
        if choice == 0 and x:
            x.pop(r.randrange(len(x)))
        elif choice == 1:
            x.append(r.choice((None, 0, torch.ones(3))))
        else:
            parent[last] = r.choice((None, 0, (), "tuple"))
    elif x is None:
        parent[last] = r.choice((0, 1, *others))
    else:
        parent[last] = r.choice((*NUMBERS, None, 0.5, "1", torch.ones(2)))


def frozen(x):
    return tuple(frozen(y) for y in x) if isinstance(x, list) else x


# ---- judged


def flat(x):
    """Vectors with one dimension: the binding asks for their number of elements only."""
    if isinstance(x, tuple):
        return tuple(flat(y) for y in x)
    return x.reshape(-1) if isinstance(x, torch.Tensor) and x.layout == torch.strided else x


def copied(x):
    if isinstance(x, tuple):
        return tuple(copied(y) for y in x)
    return x.clone() if dense_tensors(x) else x


def ordinary(arguments, largest: float) -> bool:
    """Whether numbers that are read have a usual size: the bits of an id, read as fp32, do not."""
    inputs = [x for x in dense_tensors(arguments) if x.is_floating_point()]
    return all(((x.abs() < 1e3) | (x.abs() == largest)).all() for x in inputs)


def close(found, truth, dtype, size) -> None:
    if found is None:
        return
    rtol = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(
        found.double().reshape(truth.shape), truth, rtol=rtol, atol=rtol * size, equal_nan=True
    )


def same(side, truth) -> bool:
    """Whether statistics that were passed are those of the problem."""
    return (not side and truth is None) or (bool(side) and truth is not None and all(
        (x is None) == (y is None) and (x is None or torch.allclose(x.double(), y, 1e-5, 1e-5))
        for x, y in zip(side, truth, strict=True)
    ))  # fmt: skip


def weighted(weights, stats: Stats) -> float:
    total = 0.0
    for side, of in zip(weights, stats, strict=True):
        for w, x in zip(side, (of and of.logsum, of and of.pos), strict=False):
            if w is not None:
                w = w.double() if isinstance(w, torch.Tensor) else torch.full_like(x, w)
                total = total + torch.where((w == 0) & (x == -torch.inf), 0, w * x).sum()
    return torch.as_tensor(total, dtype=torch.float64)


def judge(kind: str, given: tuple, written: tuple) -> None:
    """Compares what was written with the formula for the arguments as they were before."""
    if kind == "describe":
        return
    fields, given, written = given[0], flat(given), flat(written)
    if kind == "count_equal":
        (n, m, ids, others, _), (*_, counts) = given[0], written[0]
        if n:
            equal = (ids[:, None] == others) & (ids >= 0)[:, None] if m else torch.zeros(n, 1)
            assert torch.equal(counts, equal.sum(1).long())
        return
    p, dtype = exact(fields), fields[0].dtype
    size = 1 + p.scale.abs().max().item() * p.n
    if kind == "softplus":
        _, (loss,), _, grads, (total,), _ = written
        (u,) = given[2]
        truth = reference.softplus_forward(p)
        close(loss, truth, dtype, 1 + p.m)
        u = torch.full_like(truth, u) if type(u) is float else u
        if u is not None and total is not None:
            close(total, (u.double() * truth).sum().reshape(total.shape), dtype, 1 + p.n * p.m)
        if u is not None:
            needs = Needs(*[x is not None for x in grads])
            expected = reference.softplus_backward(p, u.double(), needs)
            for x, y in zip(grads, expected, strict=True):
                close(x, y if x is None or x.numel() == y.numel() else y.sum(), dtype, size)
        return
    stats = (given if kind == "backward" else written)[1]
    truth = reference.logsumexp_forward(p)
    if kind != "backward":
        for side, exactly in zip(stats, truth, strict=True):
            for x, y in zip(side, exactly, strict=True) if side else ():
                close(x, y, dtype, size + p.m)
        if kind == "forward":
            return
    elif not all(same(x, y) for x, y in zip(stats, truth, strict=True)):
        outcomes["statistics of another problem"] += 1
        return
    weights, grads = [side or (None, None) for side in given[2]], written[3]
    if kind == "both":
        total = weighted(weights, truth)
        close(written[4][0], total, dtype, (size + p.m) * (p.n + p.m))
    upstream = Upstream(*(SideUpstream(*side) for side in weights)).tensors(p)
    upstream = Upstream(*(SideUpstream(*(x if x is None else x.double() for x in side))
                          for side in upstream))  # fmt: skip
    if any(x is not None for side in upstream for x in side):
        expected = reference.logsumexp_backward(
            p, truth, upstream, Needs(*[x is not None for x in grads])
        )
        for x, y in zip(grads, expected, strict=True):
            close(x, y if x is None or x.numel() == y.numel() else y.sum(), dtype, size)


def check(r: random.Random) -> None:
    torch.manual_seed(r.randrange(2**31))
    kind, arguments = valid_call(r)
    spoiled = r.choice((0, 1, 1, 1, 2, 3))
    for _ in range(spoiled):
        spoil(arguments, r)
    arguments = frozen(arguments)
    given = copied(arguments)
    try:
        getattr(_native, f"cpu_{kind}")(*arguments)
    except REFUSALS as error:
        if not spoiled:
            raise
        outcomes[type(error).__name__] += 1
        return
    fit = ordinary((given[0], given[2:3]), 0) and (
        kind != "backward" or ordinary(given[1], torch.inf)
    )
    if fit:
        judge(kind, given, arguments)
    outcomes["right" if fit else "not compared"] += 1


def both(n: int = 40, d: int = 8) -> list:
    """The arguments of a valid call, as lists."""
    p = Problem(torch.randn(n, d), torch.randn(n, d), torch.tensor(1.0), positives="linear")
    p = p._replace(row_ids=torch.arange(n), col_ids=torch.arange(n))
    weights = [[torch.ones(n), torch.ones(n)], [torch.ones(n), torch.ones(n)]]
    grads = [torch.empty(n, d), torch.empty(n, d), torch.empty(()), None, None]
    stats = [[torch.empty(n), torch.empty(n), torch.empty(n), None] for _ in range(2)]
    return [fields(p), stats, weights, grads, [torch.empty(1)], [None, 0], 2]


def replaced(path: tuple, x) -> list:
    arguments = both()
    read(arguments, path[:-1])[path[-1]] = x
    return arguments


def overlapping(one: tuple, other: tuple) -> list:
    arguments = both()
    memory = read(arguments, one)
    read(arguments, other[:-1])[other[-1]] = memory
    return arguments


REFUSED = {
    "two results": (
        lambda: overlapping((3, 0), (3, 1)),
        "gradient of .* must not overlap .* gradient of",
    ),
    "a result and an input": (lambda: overlapping((0, 0), (3, 1)), "b must not overlap a in"),
    "a result with gaps": (
        lambda: replaced((1, 0, 0), torch.empty(40, dtype=torch.int64).view(torch.float32)[::2]),
        "max must be contiguous",
    ),
    "too few rows": (
        lambda: replaced((0, 3), torch.ones(39)),
        "scale must have 1 elements, got 39",
    ),
    "other ids": (
        lambda: replaced((0, 6), torch.ones(40, dtype=torch.int32)),
        "row_ids must be torch.int64, got torch.int32",
    ),
    "no memory": (
        lambda: replaced((0, 0), torch.empty(40, 8, device="meta")),
        "a must have its va",
    ),
    "no a": (lambda: replaced((0, 0), None), "a is missing"),
    "no total": (lambda: replaced((4, 0), None), "total is missing"),
    "no statistics of a side": (
        lambda: replaced((1, 1), None),
        "statistics of a side with weights",
    ),
    "no threads": (lambda: replaced((6,), 0), "threads must be from 1 to 4096, got 0"),
    "a far diagonal": (lambda: replaced((0, 12), 2**40), "a number is out of range"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    make, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        _native.cpu_both(*frozen(make()))
    _native.cpu_both(*frozen(both()))


def test_a_size_without_memory_is_refused():
    """It was written to: a null pointer."""
    arguments = both()
    with pytest.raises(ValueError, match="the memory of the cache is missing"):
        _native.cpu_forward(*frozen([*arguments[:2], [None, 10**6], 1]))


@settings(deadline=None, max_examples=400, derandomize=True, database=None)
@given(st.randoms(use_true_random=False))
def test_any_arguments(r):
    check(r)


def main(seconds: float, first: int = 0) -> None:
    """`first`: the number of the first call. A number makes the same call every time."""
    start, number, wrong = time.monotonic(), first, 0
    while time.monotonic() < start + seconds and wrong < 10:
        try:
            check(random.Random(number))
        except Exception:
            wrong += 1
            print("call", number, traceback.format_exc(limit=-2), flush=True)
        number += 1
    print(f"{number - first} calls in {seconds:g} s, {wrong} wrong: {dict(outcomes)}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(float(sys.argv[1]), *map(int, sys.argv[2:]))
