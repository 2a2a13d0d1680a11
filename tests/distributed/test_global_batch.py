"""The global batch on W processes is the batch of one: losses, gradients, statistics, traffic.

Each W is one start of processes, which run every check; the tests read what they found.
"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.costs_on_ranks import memory, traffic
from support.losses_on_ranks import (
    IDS,
    LOSSES,
    SHARES,
    D,
    Model,
    N,
    all_options,
    assert_equal_gradients,
    batch,
    by_ids,
    gradients,
    local_rows,
    pairs,
    replica,
    rows_of,
    single,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import ito_kernels as ik
from ito_kernels.distributed import collectives

SIZES = (1, 2, 3, 4)


def exact(name, chunk_size, dtype=torch.float64, even=False, tolerance=1e-12):
    rows = local_rows(even)
    all_rows = torch.arange(N // dist.get_world_size() * dist.get_world_size()) if even else None
    truth, grads = single(LOSSES[name], all_rows, dtype)
    x, y = batch(dtype)
    model = replica(dtype)
    model.zero_grad()
    where = {"group": dist.group.WORLD, "chunk_size": chunk_size}
    value = LOSSES[name](*model(x[rows], y[rows]), rows, **where)
    value.backward()
    assert (value - truth).abs() <= tolerance * truth.abs()
    assert_equal_gradients(gradients(model.module), grads, tolerance)


def averaged(model, group):
    """As DistributedDataParallel does, for groups that are not worth one."""
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)


def subgroup():
    """Two of the ranks; the others take no part, and may not."""
    size, rank = dist.get_world_size(), dist.get_rank()
    members = [0, size - 1] if size > 1 else [0]
    group = dist.new_group(members)
    x, y = batch()
    all_rows = [rows_of(SHARES[size], r) for r in members]
    if rank not in members:
        with pytest.raises(ValueError, match="group does not hold this process"):
            ik.clip_loss(x, x, 1.0, group=group)
        return
    truth, grads = single(LOSSES["mean"], torch.cat(all_rows))
    rows, model = all_rows[members.index(rank)], Model()
    value = LOSSES["mean"](*model(x[rows], y[rows]), rows, group=group, chunk_size=4)
    value.backward()
    averaged(model, group)
    assert (value - truth).abs() <= 1e-12 * truth.abs()
    assert_equal_gradients(gradients(model), grads, 1e-12)


def device_mesh():
    size, rows = dist.get_world_size(), local_rows()
    x, y = batch()
    features = Model()(x[rows], y[rows])
    mesh = init_device_mesh("cpu", (size,))
    value = LOSSES["mean"](*features, rows, group=mesh)
    assert torch.equal(value, LOSSES["mean"](*features, rows, group=dist.group.WORLD))
    with pytest.raises(ValueError, match="mesh of one dimension, got 2"):
        LOSSES["mean"](*features, rows, group=init_device_mesh("cpu", (size, 1)))
    if size == 4:  # data in parallel along one dimension of a mesh: a batch for each row of it
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "data"))
        first = dist.get_rank() // 2 * 2
        group_rows = torch.cat([rows_of(SHARES[4], r) for r in (first, first + 1)])
        truth, grads = single(LOSSES["options"], group_rows)
        model = Model()
        value = LOSSES["options"](*model(x[rows], y[rows]), rows, group=mesh["data"], chunk_size=3)
        value.backward()
        averaged(model, mesh["data"].get_group())
        assert (value - truth).abs() <= 1e-12 * truth.abs()
        assert_equal_gradients(gradients(model), grads, 1e-12)


def fully_sharded():
    from torch.distributed.fsdp import fully_shard

    rows, (x, y) = local_rows(), batch()
    truth, grads = single(LOSSES["mean"])
    model = Model()
    for tower in (model.image, model.text):
        fully_shard(tower, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    value = LOSSES["mean"](*model(x[rows], y[rows]), rows, group=dist.group.WORLD)
    value.backward()
    ours = gradients(model)
    for name, grad in ours.items():
        if name == "logit_scale":
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        else:
            ours[name] = grad.full_tensor()
    assert (value - truth).abs() <= 1e-12 * truth.abs()
    assert_equal_gradients(ours, grads, 1e-12)


def compiled_step(name):
    """The loss breaks the graph of a compiled step, and does not change it."""
    rows, (x, y) = local_rows(), batch()
    truth, grads = single(LOSSES[name])
    model = Model()

    @partial(torch.compile, backend="eager")
    def step(x, y):
        return 2 * LOSSES[name](*model(x, y), rows, group=dist.group.WORLD)

    value = step(x[rows], y[rows])
    (value / 2).backward()
    averaged(model, dist.group.WORLD)
    assert (value / 2 - truth).abs() <= 1e-12 * truth.abs()
    assert_equal_gradients(gradients(model), grads, 1e-12)


def compiled_encoders():
    """Only they are compiled; the replica reduces the gradients of the compiled module."""
    if dist.get_world_size() != 2:  # dynamo takes a second of every rank
        return
    rows, (x, y) = local_rows(), batch()
    truth, grads = single(LOSSES["siglip"])
    model = DistributedDataParallel(torch.compile(Model(), backend="eager"))
    value = LOSSES["siglip"](*model(x[rows], y[rows]), rows, group=dist.group.WORLD)
    value.backward()
    assert (value - truth).abs() <= 1e-12 * truth.abs()
    ours = {k.removeprefix("_orig_mod."): v for k, v in gradients(model.module).items()}
    assert_equal_gradients(ours, grads, 1e-12)


def accumulated():
    """Two batches, one reduction: the sum of their gradients."""
    rows, (x, y) = local_rows(), batch()
    model, names = replica(torch.float64), ("mean", "siglip")
    model.zero_grad()
    with model.no_sync():
        LOSSES[names[0]](*model(x[rows], y[rows]), rows, group=dist.group.WORLD).backward()
    LOSSES[names[1]](*model(x[rows], y[rows]), rows, group=dist.group.WORLD).backward()
    (_, first), (_, second) = (single(LOSSES[name]) for name in names)
    truth = {name: first.get(name, 0) + grad for name, grad in second.items()}
    assert_equal_gradients(gradients(model.module), truth, 1e-12)


def per_anchor():
    """reduction="none": this rank's anchors; gradients of the sum over ranks of what each makes of
    them, which is what averaging divides by W."""
    rows, (x, y) = local_rows(), batch()
    size = dist.get_world_size()

    def loss(x, y, s, b, r, **o):
        row, col = by_ids(x, y, s, b, r, reduction="none", **o)
        pairs = ik.siglip_loss(x, y, s, b, reduction="none", **o)
        options = all_options(x, y, s, b, r, reduction="none", **o)
        return row, col, pairs, *options

    def total(losses, r):
        weights = 1 + r
        return sum((weights * x).sum() for x in losses)

    whole, model = Model(), Model()
    truth = loss(*whole(x, y), torch.arange(N))
    total(truth, torch.arange(N)).backward()
    ours = loss(*model(x[rows], y[rows]), rows, group=dist.group.WORLD, chunk_size=3)
    total(ours, rows).backward()
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b[rows], rtol=1e-12, atol=1e-12)
    averaged(model, dist.group.WORLD)
    grads = {name: grad / size for name, grad in gradients(whole).items()}
    assert_equal_gradients(gradients(model), grads, 1e-12)


def statistics():
    rows, (x, y) = local_rows(), batch()
    model = Model()
    for loss in (by_ids, partial(by_ids, positives="in", symmetric=False), all_options, pairs):
        value, truth = loss(*model(x, y), torch.arange(N), return_stats=True)
        ours, stats = loss(
            *model(x[rows], y[rows]), rows, return_stats=True, group=dist.group.WORLD, chunk_size=3
        )
        assert (ours - value).abs() <= 1e-12
        assert stats.keys() == truth.keys()
        for name, x_ in truth.items():
            if x_ is None:
                assert stats[name] is None
            else:
                expected = x_[rows] if x_.ndim else x_
                torch.testing.assert_close(stats[name], expected, rtol=1e-12, atol=1e-12)


def modules():
    rows, (x, y) = local_rows(), batch()
    size = dist.get_world_size()
    for module, name in ((ik.ClipLoss, "clip"), (ik.SigLipLoss, "siglip")):
        truth, grads = single(LOSSES[name])
        grads.setdefault("logit_bias", x.new_zeros(()))  # which ClipLoss keeps in the graph
        model = replica(torch.float64)
        model.zero_grad()
        image, text, scale, bias = model(x[rows], y[rows])
        value = module(rank=dist.get_rank(), world_size=size)(image, text, scale, bias)
        value.backward()
        assert (value - truth).abs() <= 1e-12 * truth.abs()
        assert_equal_gradients(gradients(model.module), grads, 1e-12)
    image, text, scale = (z.detach() for z in (image, text, scale))
    where = {"group": dist.group.WORLD, "chunk_size": 3}
    for module, args, name in (
        (ik.SupConLoss(0.1, **where), (image, IDS[rows]), "supcon_loss"),
        (ik.NTXentLoss(0.1, **where), (image, text), "nt_xent_loss"),
        (ik.ItoLoss(0, **where), (image[None], text, None, scale), "ito_loss"),
    ):
        options = {"lambda_fusion": 0} if name == "ito_loss" else {"temperature": 0.1}
        value, truth = module(*args), getattr(ik, name)(*args, **options, **where)
        assert value == truth if name != "ito_loss" else value[0] == truth[0]
    with pytest.raises(ValueError, match="world_size must be that of the default group"):
        ik.ClipLoss(world_size=size + 1)(image, text, scale)


def data_set_averages():
    """u of the data set is that of one process, on every rank, also of a sample that two ranks hold
    and if the ranks change places."""
    size, rank = dist.get_world_size(), dist.get_rank()
    image, text, *_ = (z.detach() for z in Model()(*batch()))
    alone = ik.GlobalContrastiveLoss(20, gamma=0.3)
    shared = ik.GlobalContrastiveLoss(20, gamma=0.3, group=dist.group.WORLD, chunk_size=3)
    for step in range(3):
        indices = (3 * torch.arange(N) + step) % 11
        order = torch.cat([rows_of(SHARES[size], (r + step) % size) for r in range(size)])
        rows = rows_of(SHARES[size], (rank + step) % size)
        truth = alone(image[order], text[order], 0.2, indices[order])
        value = shared(image[rows], text[rows], 0.2, indices[rows])
        torch.testing.assert_close(value, truth, rtol=1e-7, atol=1e-7)
        for ours, theirs in zip(shared.buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="indices must be row numbers of 20 samples"):
        shared(image[rows], text[rows], 0.2, indices[rows] + 20 * (rank == 0))


def narrow(dtype, backend):
    """bf16 and fp16 within twice the error of one process, and fp32 sums over ranks."""
    g = torch.Generator().manual_seed(1)
    size, rank, n = dist.get_world_size(), dist.get_rank(), 24
    x, y = (normalize(torch.randn(n, 64, generator=g), dim=1).to(dtype) for _ in range(2))
    rows = rows_of([n // size] * size, rank)

    def run(x, y, **o):
        x, y = (z.clone().requires_grad_() for z in (x, y))
        loss = ik.clip_loss(x, y, 50.0, **o) + ik.siglip_loss(x, y, 50.0, -5.0, **o)
        (1024 * loss).backward()
        return loss.detach(), x.grad, y.grad

    truth = run(x.double(), y.double())
    same = run(x, y, backend=backend)
    ours = run(x[rows], y[rows], backend=backend, group=dist.group.WORLD, chunk_size=7)
    assert (ours[0] - truth[0]).abs() <= 2 * (same[0] - truth[0]).abs() + 1e-5
    for a, b, t in zip(ours[1:], same[1:], truth[1:], strict=True):
        error = (a.double() / size - t[rows]).abs().max()
        assert error <= 2 * (b - t).abs().max() + 1e-6 * t.abs().max()


def autocast():
    """Features travel in autocast's dtype; the result is that of features given so."""
    rows, (x, y) = local_rows(), batch(torch.float32)
    x, y = x[rows], torch.cat([y, y[:, :2]], 1)[rows]
    where = {"group": dist.group.WORLD, "chunk_size": 5}
    with torch.autocast("cpu", torch.bfloat16):
        a = x.clone().requires_grad_()
        value = ik.clip_loss(a, y, 3.0, **where)
    value.backward()
    b = x.bfloat16().requires_grad_()
    truth = ik.clip_loss(b, y.bfloat16(), 3.0, **where)
    truth.backward()
    assert torch.equal(value, truth)
    assert torch.equal(a.grad, b.grad.float())


def partly_kept():
    """Wherever the chunks that forward keeps end, backward has the same bits."""
    rows, (x, y) = local_rows(), batch()
    size, found = dist.get_world_size(), []
    for chunks in (0, 1, size, size + 1, 100):
        nbytes = chunks * 2 * D * 8
        model = Model()
        with patch.dict(os.environ, ITO_GATHER_CACHE_BYTES=str(nbytes)):
            loss = LOSSES["mean"](
                *model(x[rows], y[rows]), rows, group=dist.group.WORLD, chunk_size=2
            )
            loss.backward()
        found.append([loss.detach(), *gradients(model).values()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def deterministic():
    rows, (x, y) = local_rows(), batch(torch.float32)

    def run():
        model = Model(torch.float32)
        loss = LOSSES["mean"](*model(x[rows], y[rows]), rows, group=dist.group.WORLD, chunk_size=3)
        loss.backward()
        return [loss.detach(), *gradients(model).values()]

    assert all(map(torch.equal, run(), run()))


def not_a_number():
    """One bad feature on one rank: not finite anywhere. In a padded row: no harm."""
    rows, (x, y) = local_rows(), batch()
    model = Model()
    image, text, scale, bias = (z.detach() for z in model(x, y))
    for name in ("mean", "siglip by ids"):
        clean = LOSSES[name](image[rows], text[rows], scale, bias, rows, group=dist.group.WORLD)
        for bad, finite in ((4, False), (3, True)):
            assert (IDS[bad] < 0) == finite
            a = image.index_fill(0, torch.tensor(bad), torch.nan)
            value = LOSSES[name](a[rows], text[rows], scale, bias, rows, group=dist.group.WORLD)
            assert value.isfinite() == finite
            assert not finite or torch.equal(value, clean)


def unlike():
    """What decides the sizes of transfers and what their bytes mean: on gloo they end the process,
    and fp16 would be read as bf16."""
    size, last = dist.get_world_size(), dist.get_rank() == dist.get_world_size() - 1
    x = torch.ones(4, 6)

    def both(features=x, chunk_size=2):
        return lambda: ik.clip_loss(
            features, features, 1.0, group=dist.group.WORLD, chunk_size=chunk_size
        )

    def under(**environment):
        def call():
            with patch.dict(os.environ, environment):
                both()()

        return call

    for message, one, other in (
        (
            r"image_features .* got a torch.float32 tensor \(…, 6\) .* on rank 0 and .* \(…, 5\)",
            both(),
            both(x[:, :5]),
        ),
        (
            "image_features .* got a torch.float16 tensor .* on rank 0 and a torch.bfloat16",
            both(x.half()),
            both(x.bfloat16()),
        ),
        ("chunk_size .* got 2 on rank 0 and None", both(), both(chunk_size=None)),
        ("ITO_TRANSPORT .* gather on rank 0 and ring", both(), under(ITO_TRANSPORT="ring")),
        ("ITO_GATHER_CACHE_BYTES .* and 0", both(), under(ITO_GATHER_CACHE_BYTES="0")),
    ):
        if size > 1:
            with pytest.raises(ValueError, match=f"{message}.* on rank {size - 1}$"):
                (other if last else one)()
    both()()  # the group is whole


CHECKS = {
    **{name: partial(exact, name, 7) for name in LOSSES},
    **{
        f"{name}, chunk {chunk}": partial(exact, name, chunk)
        for name in ("clip", "in", "one tower", "siglip")
        for chunk in (1, 1000)
    },
    **{
        f"{name}, fp32": partial(exact, name, 7, torch.float32, tolerance=5e-6)
        for name in ("mean", "one tower, lse", "siglip", "nt_xent")
    },
    **{
        f"{name}, even": partial(exact, name, None, even=True)
        for name in ("clip", "supcon", "siglip by ids")
    },
    **{
        f"{str(dtype).removeprefix('torch.')}, {backend}": partial(narrow, dtype, backend)
        for dtype in (torch.bfloat16, torch.float16)
        for backend in ("chunked", "reference", None)
    },
}
for check in (
    *(subgroup, device_mesh, fully_sharded, accumulated, compiled_encoders, per_anchor, statistics),
    *(
        modules,
        data_set_averages,
        autocast,
        partly_kept,
        deterministic,
        not_a_number,
        unlike,
        traffic,
        memory,
    ),
):
    CHECKS[check.__name__] = check


def on_ring(check):
    with patch.dict(os.environ, ITO_TRANSPORT="ring"):
        check()


# what blocks, statistics and gradients of one owner's keys may do otherwise
RINGS = ["rows only", "mean", "in", "scale per query", "self excluded", "one tower"]
RINGS += ["one tower, lse", "siglip", "siglip by ids", "options", "margin"]
CHECKS |= {
    f"ring, {name}": partial(on_ring, check)
    for name, check in {
        **{name: partial(exact, name, 2) for name in RINGS},
        "self excluded, chunk 1": partial(exact, "self excluded", 1),
        "mean, chunk 1000": partial(exact, "mean", 1000),
        **{name: CHECKS[name] for name in ("mean, fp32", "bfloat16, None", "float16, None")},
        **{check.__name__: check for check in (subgroup, partly_kept, deterministic)},
        **{check.__name__: check for check in (not_a_number, traffic, memory)},
    }.items()
}


# Four ranks share two cores: the ring has its cases with three, and one chunk size is enough.
AT_FOUR = ("ring, mean", "ring, one tower", "ring, siglip", "ring, traffic", "ring, memory")


def checks_of(size):
    if size < 4:
        return [name for name in CHECKS if not name.endswith("memory")]
    return [
        name
        for name in CHECKS
        if name in AT_FOUR or not (name.startswith("ring") or ", chunk " in name)
    ]


def run_checks(names):
    return processes.findings({name: CHECKS[name] for name in names})


@pytest.fixture(scope="module")
def found(request):
    wanted = {size: [] for size in SIZES}
    for params in processes.selected(request, "test_as_one_process"):
        wanted[params["size"]].append(params["check"])
    return {
        size: processes.run(run_checks, size, names, seconds=30)
        for size, names in wanted.items()
        if names
    }


@pytest.mark.parametrize(("size", "check"), [(n, name) for n in SIZES for name in checks_of(n)])
def test_as_one_process(found, size, check):
    results = [ranks.get(check, "ended before it came to this") for ranks in found[size]]
    failed = [f"rank {rank}: {why}" for rank, why in enumerate(results) if why is not None]
    assert not failed, "\n".join(failed)


COMPILED = ("mean", "options", "cacr")


def compiled_steps():
    return processes.findings({name: partial(compiled_step, name) for name in COMPILED})


@pytest.mark.slow  # dynamo takes as long as everything else
def test_inside_torch_compile():
    assert processes.run(compiled_steps, 2) == [dict.fromkeys(COMPILED)] * 2


def test_the_package_does_not_import_dynamo():
    """2 s of every start."""
    script = "import sys, ito_kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def abandoned(where, how):
    """Rank 1 leaves or hangs before the forward or the backward pass, or raises before it calls the
    loss, or is killed when it starts to send its keys; what do the others say?"""
    x = torch.randn(4, 3, requires_grad=True)
    loss = None
    if where == "ring":
        os.environ |= {"ITO_TRANSPORT": "ring", "ITO_GATHER_CACHE_BYTES": "0"}
        loss = ik.clip_loss(x, x.flip(0), 1.0, symmetric=False, group=dist.group.WORLD)
    if where == "backward":
        loss = ik.clip_loss(x, x.flip(0), 1.0, group=dist.group.WORLD)
    if dist.get_rank() == 1:
        if how == "dies":
            os._exit(1)
        if how == "raises":
            raise KeyError("of the user's own code")
        if how == "is killed":
            started = collectives.Started.__init__

            def killed(self, name, *args):
                if "keys" in name:
                    os.kill(os.getpid(), signal.SIGKILL)
                started(self, name, *args)

            collectives.Started.__init__ = killed
        else:
            time.sleep(8)
    start = time.monotonic()
    try:
        if where in ("forward", "keys"):
            ik.clip_loss(x, x.flip(0), 1.0, group=dist.group.WORLD)
        else:
            loss.backward()
        return {"error": None}
    except RuntimeError as error:
        return {"error": str(error), "seconds": time.monotonic() - start}


ENDS = list(product(("forward", "backward", "ring"), ("dies", "hangs")))
ENDS += [("forward", "raises"), ("keys", "is killed")]


@pytest.fixture(scope="module")
def ended():
    with ThreadPoolExecutor(3) as pool:  # they sleep most of the time
        found = pool.map(lambda end: processes.run(abandoned, 3, *end, seconds=3), ENDS)
        return dict(zip(ENDS, found, strict=True))


@pytest.mark.parametrize(("where", "how"), ENDS)
def test_a_rank_that_ends_ends_the_others(ended, where, how):
    first, _, third = ended[where, how]
    message = {
        "forward": "all-gather of batch sizes",
        "keys": "all-gather of keys 0 to 4 of each rank",
        "backward": "all-gather of column statistics",
        "ring": "ring transfer of keys 0 to 4 of each rank",
    }[where]
    for result in (first, third):
        assert result["error"].startswith(f"{message} failed on rank ")
        assert result["seconds"] < 7
