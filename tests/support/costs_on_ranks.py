"""What the global batch costs a rank: the bytes that it receives, and the memory that it holds."""

import os
from functools import partial

import torch
import torch.distributed as dist

import ito_kernels as ik
from ito_kernels.distributed import collectives


class Traffic:
    """Bytes that this rank receives from others, by kind of collective."""

    def __init__(self):
        self.received = {}

    def __enter__(self):
        self.saved = collectives.Started.__init__
        size = dist.get_world_size()

        def counted(started, what, collective, out, x, group):
            # of an all-gather and an all-to-all the own part stays at home; a reduce-scatter sends
            # what it does not keep; a ring's all-reduce is both
            nbytes = {
                collectives.shift: out.nbytes,
                collectives.all_gather: out.nbytes * (size - 1) // size,
                collectives.all_to_all: out.nbytes * (size - 1) // size,
                collectives.reduce_scatter: x.nbytes * (size - 1) // size,
                collectives.all_reduce: 2 * out.nbytes * (size - 1) // size,
            }[collective]
            kinds = ("gradients", "biases", "keys", "statistics", "ids", "sizes", "sum", "rows")
            name = next(kind for kind in kinds if kind in what.replace("key ids", "ids"))
            self.received[name] = self.received.get(name, 0) + nbytes
            self.saved(started, what, collective, out, x, group)

        collectives.Started.__init__ = counted
        return self

    def __exit__(self, *_):
        collectives.Started.__init__ = self.saved


def traffic():
    """The formula of docs/distributed.md, which is that of both transports."""
    size, n, width = dist.get_world_size(), 6, 8
    g = torch.Generator().manual_seed(dist.get_rank())
    for dtype, e in ((torch.float32, 4), (torch.bfloat16, 2)):
        x, y = (torch.randn(n, width, generator=g).to(dtype).requires_grad_() for _ in range(2))
        others = (size - 1) * n
        small = {"sizes": (size - 1) * 24, "ids": others * 8}
        gathered, returned = others * width * e, others * width * 4

        def count(loss, budget, y=y):
            os.environ["ITO_GATHER_CACHE_BYTES"] = str(budget)
            with Traffic() as traffic:
                loss(y).backward()
            return traffic.received

        where = {"group": dist.group.WORLD, "chunk_size": 4}

        def clip(y, x=x, where=where):
            return ik.clip_loss(x, y, 1.0, **where)

        def one_way(y, x=x, where=where):
            return ik.clip_loss(x, y, 1.0, symmetric=False, **where)

        def siglip(y, x=x, where=where):
            return ik.siglip_loss(x, y, 1.0, 0.0, **where)

        def biased(y, x=x, where=where):
            bias = torch.zeros(n, requires_grad=True)
            return ik.clip_loss(x, y, 1.0, symmetric=False, key_bias=bias, **where)

        def decoupled(y, x=x, where=where):
            return ik.decoupled_contrastive_loss(x, y, 1.0, **where)

        def cacr(y, x=x, where=where):
            return ik.cacr_loss(x, y, **where)

        def pairs(y, x=x, where=where):
            none = torch.zeros(0, 2, dtype=torch.long)
            return ik.clip_loss(x, y, 1.0, symmetric=False, positive_pairs=none, **where)

        def mixup(y, x=x, where=where):
            first = torch.zeros(n, dtype=torch.long)
            return ik.mixup_infonce(x, y, 1.0, partners=first, mixing=0.5, **where)

        def nt_xent(y, x=x, where=where):
            return ik.nt_xent_loss(x, y, **where)

        def counted(received):
            return {k: v for k, v in received.items() if v and k != "sum"}

        # forward: max, logsum, pos and count; backward: max, logsum, pos, v and beta
        columns = {"statistics": others * 4 * (4 + 5)}
        expected = small | columns | {"keys": 2 * gathered, "gradients": returned}
        assert counted(count(clip, 0)) == counted(expected)
        assert counted(count(clip, 1 << 20)) == counted(expected | {"keys": gathered})
        expected = small | {"keys": 2 * gathered, "gradients": returned}
        assert counted(count(one_way, 0)) == counted(expected)
        expected["keys"] = gathered
        assert counted(count(siglip, 0)) == counted(expected)
        expected |= {"keys": 2 * gathered, "biases": others * 4}
        expected["gradients"] += others * 4
        assert counted(count(biased, 0)) == counted(expected)
        expected = small | columns | {"keys": 2 * gathered, "gradients": returned}
        assert counted(count(decoupled, 0)) == counted(expected)
        # all ranks' rows at once, in fp32, and their ids
        expected = small | {"rows": others * (width * 4 + 8), "gradients": returned}
        expected["sizes"] += 2 * (size - 1) * 8
        assert counted(count(cacr, 0)) == counted(expected)
        # row numbers first; of pairs the keys are gathered whole
        for loss, nbytes in ((pairs, 2 * 24 + 8), (mixup, 2 * 24 + 8), (nt_xent, 2 * 24)):
            assert count(loss, 0)["sizes"] == (size - 1) * nbytes
        expected = small | {"keys": gathered}
        # a frozen tower gets no gradient and sends none
        assert counted(count(siglip, 0, y.detach())) == counted(expected)
    del os.environ["ITO_GATHER_CACHE_BYTES"]


def peak_bytes(run):
    """The most that PyTorch holds at a time beyond what it held before: the least of three runs,
    as a busy machine's gloo thread frees a chunk that was sent later than we let it go."""
    return min(_peak_bytes(run) for _ in range(3))


def _peak_bytes(run):
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def memory():
    """6 local matrices and 4 chunks of keys and their gradients; B numbers. A chunk of a ring is of
    one rank's keys."""
    size, n, width = dist.get_world_size(), 256, 512
    os.environ["ITO_GATHER_CACHE_BYTES"] = "0"
    x, y = (torch.randn(n, width).requires_grad_() for _ in range(2))
    local, whole = n * width * 4, size * n
    peaks, ring = {}, os.environ.get("ITO_TRANSPORT") == "ring"
    for chunk in (64, 256, whole):
        for name, loss in (
            ("clip", ik.clip_loss),
            ("siglip", partial(ik.siglip_loss, logit_bias=0.0)),
        ):

            def run(chunk=chunk, loss=loss):
                loss(x, y, logit_scale=1.0, group=dist.group.WORLD, chunk_size=chunk).backward()
                x.grad = y.grad = None

            run()
            peaks[name, chunk] = peak_bytes(run)
    del os.environ["ITO_GATHER_CACHE_BYTES"]
    # after the last call: a rank that left earlier would leave the others waiting
    for (name, chunk), peak in peaks.items():
        keys = min(chunk, n) if ring else chunk
        bound = 6 * local + 4 * keys * width * 4 + 200 * whole
        assert peak <= bound, f"{name}, {chunk}: {peak} > {bound}"
    if not ring:
        assert 2 * peaks["clip", 64] < peaks["clip", whole]
