"""Ranks that call otherwise, or refuse their arguments, raise on every rank at once, and by name.

Each number of ranks is one start of processes, in a group whose time-out is minutes. After every
case the same group computes a loss that is right: nothing is left in flight.
"""

import os
import re
import time
from contextlib import suppress
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.losses_on_ranks import LOSSES, QUEUE, SHARES, Model, N, batch, local_rows
from support.losses_table import ROWS
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ito_kernels as ik
from ito_kernels.distributed import GlobalBatch, collectives, global_row_numbers

SECONDS = 5  # of the group's 240
X = torch.arange(24.0).view(4, 6).sin()
Y = X.cos()


def world():
    return dist.group.WORLD


def infonce(x=X, y=Y, scale=2.0, **options):
    return ik.multi_positive_infonce(x, y, scale, group=world(), **options)


def under(context, call):
    def inside():
        with context():
            return call()

    return inside


def wanted(x=X):
    return x.clone().requires_grad_()


def siglip_of_pairs(pairs):
    return ik.siglip_loss(X, Y, 2.0, positive_pairs=pairs, group=world())


def ito(views=2, **options):
    x = X.expand(views, 4, 6)
    return ik.ito_loss(x, Y, torch.stack([X, Y]), 2.0, group=world(), **options)


def heads(number):
    x, scale = X.expand(number, 4, 6), torch.ones(number)
    return ik.multi_head_loss(ik.clip_loss, x, x, logit_scale=scale, group=world())


def heads_twice(raises=False):
    """A loss of two heads, twice. If its function raises at the second head, the second call meets
    the second head of the others."""
    left = [False, raises]

    def loss(*x, **o):
        if left and left.pop(0):
            raise KeyError("of the user")
        return ik.clip_loss(*x, **o)

    x, scale = X.expand(2, 4, 6), torch.ones(2)
    with suppress(KeyError):
        ik.multi_head_loss(loss, x, x, logit_scale=scale, group=world())
    return ik.multi_head_loss(loss, x, x, logit_scale=scale, group=world())


def clustered(size=3, rows=None, **options):
    rows = torch.tensor([0, 1, 2, 0]) if rows is None else rows
    return ik.cluster_weighted_infonce(
        *(X, Y, 2.0),
        query_clusters=rows,
        key_clusters=torch.zeros(4, dtype=torch.long),
        weights=torch.ones(size, size),
        group=world(),
        **options,
    )


def nested(loss):
    return lambda: ik.matryoshka_loss(
        lambda *x, **o: loss(*x, **o), X, Y, dims=[2, 6], logit_scale=2.0, group=world()
    )


# every option of multi_positive_infonce, given on one rank alone
IDS_OF_FOUR = torch.tensor([3, 1, 3, 0])
OPTIONS = {
    "query_ids": IDS_OF_FOUR,
    "key_ids": IDS_OF_FOUR,
    "positives": "in",
    "symmetric": False,
    "exclude_self": True,
    "empty": "drop",
    "label_smoothing": 0.1,
    "query_weights": torch.ones(4),
    "key_weights": torch.ones(4),
    "key_bias": torch.ones(4),
    "queue": X,
    "hard_negatives": X[:, None],
    "false_negative_margin": 0.1,
    "debias": 0.1,
    "hardness": 0.5,
    "normalize": True,
    "reduction": "sum",
    "return_stats": True,
    "chunk_size": 3,
}
PAIRS = torch.tensor([[0, 0]])  # the first rank's

# name: what all ranks call but the odd one, what that one calls, what every rank says
UNLIKE = {
    **{
        f"{name} on one rank": (infonce, partial(infonce, **{name: value}), f"{name} must be the")
        for name, value in OPTIONS.items()
    },
    "positive_pairs on one rank": (
        infonce,
        partial(infonce, positive_pairs=PAIRS),
        "positive_pairs must be the same on every rank, got None on .* a tensor of integers on",
    ),
    "queue_ids on one rank": (
        partial(infonce, queue=X),
        partial(infonce, queue=X, queue_ids=IDS_OF_FOUR),
        "queue_ids must be the",
    ),
    "numbers": (infonce, partial(infonce, scale=3), "logit_scale .* got 2 on .* and 3 on rank"),
    "a number and a tensor": (
        infonce,
        partial(infonce, scale=torch.tensor(2.0)),
        "logit_scale .* got 2 on .* and a tensor without gradient on rank",
    ),
    "options": (
        partial(infonce, hardness=0.5, positives="in"),
        partial(infonce, hardness=0.25, positives="in"),
        "hardness .* got 0.5 on .* and 0.25 on rank",
    ),
    "ids in one tensor or in two": (
        partial(infonce, query_ids=IDS_OF_FOUR, key_ids=IDS_OF_FOUR),
        partial(infonce, query_ids=IDS_OF_FOUR, key_ids=IDS_OF_FOUR.clone()),
        "whether query_ids and key_ids are one tensor .* got True on .* and False on rank",
    ),
    "queries frozen": (
        lambda: infonce(wanted(), wanted(Y)),
        lambda: infonce(X, wanted(Y)),
        "queries .* with gradient on .* without gradient on rank",
    ),
    "keys frozen": (
        lambda: ik.clip_loss(wanted(), wanted(Y), 2.0, group=world()),
        lambda: ik.clip_loss(wanted(), Y, 2.0, group=world()),
        "text_features .* with gradient on .* without gradient on rank",
    ),
    "scale frozen": (
        lambda: infonce(scale=wanted(torch.tensor(2.0))),
        lambda: infonce(scale=torch.tensor(2.0)),
        "logit_scale .* a tensor with gradient on .* a tensor without gradient on rank",
    ),
    "no_grad": (
        lambda: infonce(wanted(), wanted(Y)),
        under(torch.no_grad, lambda: infonce(wanted(), wanted(Y))),
        "queries .* with gradient on .* without gradient on rank",
    ),
    "autocast": (
        infonce,
        under(partial(torch.autocast, "cpu", torch.bfloat16), infonce),
        "queries .* a torch.float32 tensor .* a torch.bfloat16 tensor",
    ),
    "dtype": (
        infonce,
        lambda: infonce(X.double(), Y.double()),
        "queries .* a torch.float32 tensor .* a torch.float64 tensor",
    ),
    "width": (
        infonce,
        lambda: infonce(X[:, :5], Y[:, :5]),
        r"queries .* \(…, 6\) .* \(…, 5\)",
    ),
    "ito: views": (ito, partial(ito, 3), r"image_views .* \(2, …, 6\) .* \(3, …, 6\)"),
    "ito: lambda": (ito, partial(ito, lambda_fusion=0), "lambda_fusion .* got 2 on .* and 0 on"),
    "ito: denominator": (ito, partial(ito, denominator="pooled"), "denominator must be the"),
    "heads": (partial(heads, 2), partial(heads, 3), r"features 0 .* \(2, …, 6\) .* \(3, …, 6\)"),
    "a head left out": (
        heads_twice,
        partial(heads_twice, raises=True),
        r"the number of the call must .* got \d+ on .* and \d+ on rank",
    ),
    "dims": (
        lambda: ik.matryoshka_loss(ik.clip_loss, X, Y, dims=[2], logit_scale=2.0, group=world()),
        lambda: ik.matryoshka_loss(ik.clip_loss, X, Y, dims=[2, 6], logit_scale=2.0, group=world()),
        r"dims .* got \[2\] on .* and \[2, 6\] on rank",
    ),
    "the wrapped loss": (
        nested(ik.clip_loss),
        nested(ik.decoupled_contrastive_loss),
        "the call .* got clip_loss on .* and decoupled_contrastive_loss on rank",
    ),
    "clusters": (clustered, partial(clustered, 4), r"weights .* \(…, 3\) .* \(…, 4\)"),
    "a batch of its own": (
        lambda: GlobalBatch(world(), X, Y, chunk_size=2),
        lambda: GlobalBatch(world(), X, Y, chunk_size=3),
        "chunk_size .* got 2 on .* and 3 on rank",
    ),
    "a batch and a loss": (
        lambda: GlobalBatch(world(), X, Y),
        infonce,
        "the call .* got GlobalBatch on .* and multi_positive_infonce on rank",
    ),
    "row numbers and a loss": (
        lambda: global_row_numbers(4, world(), X.device),
        lambda: ik.nt_xent_loss(X, Y, group=world()),
        "the call .* got row numbers on .* and nt_xent_loss on rank",
    ),
}


def of_model(name, gradient=True, some=True):
    """A loss of all ranks' rows, or with none of this rank's."""
    rows, (x, y) = local_rows(), batch()
    rows = rows if some else rows[:0]
    features = Model()(x[rows], y[rows])
    if not gradient:
        features = (z.detach() for z in features)
    return LOSSES[name](*features, rows, group=world(), chunk_size=3)


UNLIKE |= {
    f"frozen, {name}": (
        partial(of_model, name),
        partial(of_model, name, gradient=False),
        " must be the same on every rank, got .*with gradient.* on .*without gradient]? on rank",
    )
    for name in LOSSES
}
# each loss, and the next one
EACH = tuple(ROWS)
UNLIKE |= {
    f"{one} and {other}": (partial(of_model, one), partial(of_model, other), "the call must be the")
    for one, other in zip(EACH, (*EACH[1:], EACH[0]), strict=True)
}

# name: what all ranks call but the odd one, what that one calls, what it says
REFUSED = {
    **{
        f"no rows, {name}": (
            partial(of_model, name),
            partial(of_model, name, some=False),
            r"ValueError: .* (must have at least one row|must have shape).*\(.*0",
        )
        for name in LOSSES
    },
    "a flag": (infonce, partial(infonce, symmetric=1), "TypeError: symmetric must be True or"),
    "a choice": (infonce, partial(infonce, empty="none"), "ValueError: empty must be one of"),
    "an unknown option": (infonce, partial(infonce, beta=1), "TypeError: .* 'beta'"),
    "a missing argument": (
        lambda: ik.clip_loss(X, Y, 2.0, group=world()),
        lambda: ik.clip_loss(X, Y, group=world()),
        "TypeError: .*logit_scale",
    ),
    "features": (infonce, partial(infonce, x=None), "TypeError: queries must be a tensor"),
    "chunk_size": (infonce, partial(infonce, chunk_size=0), "ValueError: chunk_size must be"),
    "scale": (infonce, partial(infonce, scale=-1), "ValueError: logit_scale must be finite"),
    "ids": (
        partial(infonce, query_ids=IDS_OF_FOUR),
        partial(infonce, query_ids=IDS_OF_FOUR[:3]),
        "ValueError: query_ids must have shape",
    ),
    "an option": (
        partial(infonce, queue=X),
        partial(infonce, queue=X[:, :5]),
        "ValueError: queue must have shape",
    ),
    "debias": (partial(infonce, debias=0.1), partial(infonce, debias=2), "ValueError: debias must"),
    "weights": (
        partial(infonce, query_weights=torch.ones(4)),
        partial(infonce, query_weights=-torch.ones(4)),
        "ValueError: query_weights must be 0 or more",
    ),
    "pairs of other ranks": (
        partial(infonce, positive_pairs=torch.zeros(0, 2, dtype=torch.long)),
        partial(infonce, positive_pairs=torch.tensor([[1, 10**6]])),
        "ValueError: positive_pairs must be row numbers of",
    ),
    "pairs of images": (
        partial(siglip_of_pairs, torch.zeros(0, 2, dtype=torch.long)),
        partial(siglip_of_pairs, torch.tensor([[0, 10**6]])),
        "ValueError: positive_pairs must be row numbers of",
    ),
    "partners": (
        lambda: ik.mixup_infonce(X, Y, 2.0, partners=IDS_OF_FOUR, mixing=0.5, group=world()),
        lambda: ik.mixup_infonce(X, Y, 2.0, partners=99 + IDS_OF_FOUR, mixing=0.5, group=world()),
        "ValueError: partners must be row numbers of",
    ),
    "an unknown backend": (
        infonce,
        partial(infonce, backend="abacus"),
        "ValueError: unknown backend 'abacus'",
    ),
    "a backend that cannot run": (
        lambda: ik.siglip_loss(X.double(), Y.double(), 2.0, 0.0, group=world()),
        lambda: ik.siglip_loss(X.double(), Y.double(), 2.0, 0.0, group=world(), backend="cpu"),
        "RuntimeError: backend 'cpu' cannot run: ",
    ),
    "another backend's name": (
        lambda: ik.cacr_loss(X, Y, group=world()),
        lambda: ik.cacr_loss(X, Y, group=world(), backend="abacus"),
        "ValueError: unknown backend 'abacus'",
    ),
    "base_temperature": (
        lambda: ik.supcon_loss(X, IDS_OF_FOUR, base_temperature=0.1, group=world()),
        lambda: ik.supcon_loss(X, IDS_OF_FOUR, base_temperature=0, group=world()),
        "ValueError: base_temperature must be finite",
    ),
    "reference": (
        lambda: ik.cwcl_loss(X, Y, 2.0, reference=X, group=world()),
        lambda: ik.cwcl_loss(X, Y, 2.0, reference=X[:3], group=world()),
        "ValueError: reference must have 4 rows, got 3",
    ),
    "clusters": (
        clustered,
        partial(clustered, rows=torch.tensor([0, 1, 2, 3])),
        "ValueError: query_clusters must be from 0 to 2, got 0 to 3",
    ),
    "t": (
        lambda: ik.uniformity_loss(X, group=world()),
        lambda: ik.uniformity_loss(X, t=torch.ones(4), group=world()),
        r"ValueError: t must be a number or a 0-d tensor, got shape \(4,\)",
    ),
    "a caption too few": (
        ito,
        lambda: ik.ito_loss(X[None], Y[:3], None, 2.0, group=world()),
        "ValueError: text must have 4 items",
    ),
    "inside of a loss": (
        lambda: ik.mnrl_loss(X, Y, group=world()),
        lambda: ik.mnrl_loss(X, Y, normalize="no", group=world()),
        "TypeError: normalize must be True or False, got 'no'",
    ),
    "dims": (
        nested(ik.clip_loss),
        lambda: ik.matryoshka_loss(ik.clip_loss, X, Y, dims=[7], logit_scale=2.0, group=world()),
        "ValueError: dims must be widths from 1 to 6",
    ),
    "the environment": (
        infonce,
        under(partial(patch.dict, os.environ, ITO_TRANSPORT="pigeon"), infonce),
        "ValueError: ITO_TRANSPORT must be 'gather' or 'ring', got 'pigeon'",
    ),
    "a device without a backend": (
        infonce,
        lambda: infonce(X.to("meta"), Y.to("meta")),
        "ValueError: group must serve meta",
    ),
}


def said(call):
    """How it failed, and how long that took."""
    start = time.monotonic()
    try:
        call()
        text = "nothing"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return {"text": text, "seconds": time.monotonic() - start}


@cache
def encoded():
    """All rows' features, without gradient, and the loss of one process."""
    given = Model()(*batch())
    return [x.detach() for x in given], LOSSES["clip"](*given, torch.arange(N)).detach()


def right():
    """Whether the group still computes what one process does."""
    (x, y, scale, _), truth = encoded()
    rows = local_rows()
    value = ik.clip_loss(x[rows], y[rows], scale, group=world())
    return bool((value - truth).abs() <= 1e-12 * truth.abs())


def disagreements(names, odd):
    found = {}
    for kind, name in names:
        call, other, _ = {"unlike": UNLIKE, "refused": REFUSED}[kind][name]
        found[kind, name] = said(other if dist.get_rank() == odd else call)
        found[kind, name]["right"] = right()
    return found


CASES = [("unlike", name) for name in UNLIKE] + [("refused", name) for name in REFUSED]
AT_THREE = [
    *(("unlike", name) for name in ("symmetric on one rank", "query_ids on one rank")),
    *(("unlike", name) for name in ("dtype", "width", "a head left out")),
    *(("refused", name) for name in ("no rows, clip", "dims")),
]


@pytest.fixture(scope="module")
def found(request):
    wanted = {2: [], 3: []}
    for params in processes.selected(request, "test_every_rank_ends_at_once_and_by_name"):
        wanted[params["size"]].append(params["case"])
    return {
        size: processes.run(disagreements, size, cases, 1, seconds=240)
        for size, cases in wanted.items()
        if cases
    }


ON_RANKS = [*((2, case) for case in CASES), *((3, case) for case in AT_THREE)]


@pytest.mark.parametrize(
    ("size", "case"), ON_RANKS, ids=[f"{size}-{kind}: {name}" for size, (kind, name) in ON_RANKS]
)
def test_every_rank_ends_at_once_and_by_name(found, size, case):
    results = [results.get(case) for results in found[size]]
    assert all(results), "a rank did not come to this"
    for result in results:
        assert result["seconds"] < SECONDS
        assert result["right"], "the group is of no use behind it"
    kind, name = case
    texts = [result["text"] for result in results]
    own = texts.pop(1)
    _, _, pattern = {"unlike": UNLIKE, "refused": REFUSED}[kind][name]
    if kind == "refused":
        assert re.match(pattern, own), own
        assert texts == [f"ValueError: rank 1 has invalid arguments: {own}"] * (size - 1)
    else:
        assert re.search(f"^ValueError: .*{pattern}", own), own
        assert re.search("got .* on rank 0 and .* on rank 1$", own), own
        assert texts == [own] * (size - 1)


# --- what it costs


def collectives_of_calls():
    """The names of the transfers of each of three equal calls; "an object" is of the details."""
    found, started, objects = [], collectives.Started.__init__, dist.all_gather_object

    def counted(self, name, *args):
        found[-1].append(name)
        started(self, name, *args)

    def counted_object(*args):
        found[-1].append("an object")
        objects(*args)

    with (
        patch.object(collectives.Started, "__init__", counted),
        patch.object(dist, "all_gather_object", counted_object),
    ):
        for _ in range(3):
            found.append([])
            infonce()
    return {"calls": found}


def test_the_check_is_part_of_the_exchange_of_sizes():
    """No call has a transfer more than the exchange that every batch needs, the first neither."""
    for found in processes.run(collectives_of_calls, 2, seconds=30):
        first, *others = found["calls"]
        assert others == [first, first]
        assert first.count("all-gather of batch sizes") == 1
        assert "an object" not in first


# --- what may differ


def dense(x, y, extra):
    """InfoNCE of the queries at a scale of 3, each with further candidates of its own."""
    rows = [torch.cat([y, more]) for more in extra]
    scores = [3 * more @ x[i] for i, more in enumerate(rows)]
    return torch.stack([row.logsumexp(0) - row[i] for i, row in enumerate(scores)]).mean()


def may_differ():
    """What is each rank's own: rows, queue, hard negatives, generator, backend, mixing; and how the
    same is said."""
    rank, size, rows = dist.get_rank(), dist.get_world_size(), local_rows()
    (x, y, *_), _ = encoded()
    a, b = x[rows], y[rows]
    owner = torch.arange(size).repeat_interleave(torch.tensor(SHARES[size]))
    mesh = init_device_mesh("cpu", (size,))
    where = {"group": world()}

    def near(value, truth):
        assert (value - truth).abs() <= 1e-12 * truth.abs(), (value, truth)

    def queues():
        value = ik.clip_loss(a, b, 3.0, queue=QUEUE[: 2 + rank], symmetric=False, **where)
        near(value, dense(x, y, [QUEUE[: 2 + r] for r in owner]))

    def hard_negatives():
        some = QUEUE[: 1 + rank].expand(len(a), -1, -1)
        value = ik.clip_loss(a, b, 3.0, hard_negatives=some, symmetric=False, **where)
        near(value, dense(x, y, [QUEUE[: 1 + r] for r in owner]))

    def generators():
        generator = torch.Generator().manual_seed(0)
        value = ik.symile_loss([a, b, a], 3.0, generator=None if rank else generator, **where)
        near(value, ik.symile_loss([x, y, x], 3.0, generator=torch.Generator().manual_seed(0)))

    def backends():
        value = ik.clip_loss(a, b, 3.0, backend="reference" if rank else None, **where)
        near(value, ik.clip_loss(x, y, 3.0))

    def mixing():
        partners = (rows + 1) % N
        value = ik.mixup_infonce(a, b, 3.0, partners=partners, mixing=0.1 * rank, **where)
        partners = (torch.arange(N) + 1) % N
        near(value, ik.mixup_infonce(x, y, 3.0, partners=partners, mixing=0.1 * owner.double()))

    def words():
        """A number in two types, defaults that are given, a group as a mesh."""
        value = (
            ik.clip_loss(a, b, 3.0, **where)
            if rank
            else ik.clip_loss(
                a, b, 3, positives="mean", label_smoothing=0, symmetric=True, group=mesh
            )
        )
        near(value, ik.clip_loss(x, y, 3.0))

    def scales():
        """One for all queries, and one for each of the last rank's."""
        scale = torch.full((len(a),) if rank == size - 1 else (), 3.0, dtype=a.dtype)
        value = ik.clip_loss(a, b, scale, false_negative_margin=0.1, **where)
        near(value, ik.clip_loss(x, y, 3.0, false_negative_margin=0.1))

    def no_member():
        first = DeviceMesh("cpu", [0])
        if rank == 0:
            near(ik.clip_loss(a, b, 3.0, group=first), ik.clip_loss(a, b, 3.0))
        else:
            with pytest.raises(ValueError, match="group does not hold this process"):
                ik.clip_loss(a, b, 3.0, group=first)

    checks = (queues, hard_negatives, generators, backends, mixing, words, scales, no_member)
    return processes.findings({check.__name__: check for check in checks})


def test_what_may_differ():
    for found in processes.run(may_differ, 2, seconds=30):
        assert found
        assert found == dict.fromkeys(found)


def alone():
    """The other rank has ended: this one's own error stands."""
    dist.barrier()  # rank 0 has connected too
    if dist.get_rank() == 1:
        time.sleep(0.2)  # until rank 0 has read the last message of the barrier
        os._exit(1)
    return said(partial(infonce, symmetric=1))


def test_a_refusal_that_nobody_hears_is_raised_all_the_same():
    found, _ = processes.run(alone, 2, seconds=30)
    assert found["text"].startswith("TypeError: symmetric must be True or False")
