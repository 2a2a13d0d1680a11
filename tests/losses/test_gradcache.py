"""Gradient caching gives the gradients of the large batch."""

import pytest
import torch
import torch.distributed as dist
from support import processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import ito_kernels as ik
from ito_kernels.gradcache import gradcache_backward

N = 11
CUTS = [[11], [4, 4, 3], [1] * 11]
IDS = torch.tensor([4, 1, 4, -1, 0, 2, 1, 1, 7, 0, 4])


class Towers(nn.Module):
    def __init__(self, dropout=0.0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.image = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5))
        self.text = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 5))
        self.logit_scale, self.logit_bias = (nn.Parameter(torch.tensor(x)) for x in (2.5, -2.0))
        self.to(dtype)

    def forward(self, x, y):
        x, y = (normalize(tower(z), dim=-1) for tower, z in ((self.image, x), (self.text, y)))
        return x, y, self.logit_scale.exp(), 1 * self.logit_bias


def losses(ids, **where):
    return {
        "clip": lambda x, y, s, b: ik.clip_loss(x, y, s, **where),
        "in": lambda x, y, s, b: ik.multi_positive_infonce(
            x, y, s, query_ids=ids, key_ids=ids, positives="in", **where
        ),
        "siglip": lambda x, y, s, b: ik.siglip_loss(x, y, s, b, **where),
        "ito": lambda x, y, s, b: ik.ito_loss(
            torch.stack([x, y]), y, torch.stack([x, y]), s, **where
        ),
    }


def batch(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, 6, generator=g).to(dtype), torch.randn(N, 4, generator=g).to(dtype)


def cut(tensors, sizes):
    return list(zip(*(x.split(sizes) for x in tensors), strict=True))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("name", losses(IDS))
def test_as_the_large_batch(name, sizes):
    loss, whole, model = losses(IDS)[name], Towers(), Towers()
    truth = loss(*whole(*batch()))
    (truth[0] if isinstance(truth, tuple) else truth).backward()
    ours = gradcache_backward(model, cut(batch(), sizes), loss)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    for key, grad in gradients(whole).items():
        if key == "logit_bias" and name != "siglip":
            assert not gradients(model)[key].any()
        else:
            torch.testing.assert_close(gradients(model)[key], grad, rtol=1e-12, atol=1e-12)
    before = gradients(model)["logit_scale"].clone()
    gradcache_backward(model, cut(batch(), sizes), loss)  # added, as backward does
    torch.testing.assert_close(gradients(model)["logit_scale"], 2 * before)


def test_parameters_of_the_loss_itself():
    """A scale that no encoder returns gets its gradient from the loss."""
    whole, model, features = Towers(), Towers(), torch.stack
    ik.clip_loss(*whole(*batch())[:2], whole.logit_scale.exp()).backward()
    gradcache_backward(
        lambda x, y: features(model(x, y)[:2]),
        cut(batch(), [4, 7]),
        lambda f: ik.clip_loss(f[0], f[1], model.logit_scale.exp()),
        dim=1,
    )
    for key, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(model)[key], grad, rtol=1e-12, atol=1e-12)


def test_random_state_is_replayed():
    """Dropout of both passes agrees, and what is drawn afterwards is not disturbed."""
    model, seen = Towers(dropout=0.5), []

    def encode(x, y):
        out = model(x, y)
        seen.append(out[0].detach())
        return out

    torch.manual_seed(7)
    gradcache_backward(encode, cut(batch(), [4, 7]), losses(IDS)["clip"])
    after = torch.rand(1)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])

    whole = Towers(dropout=0.5)
    torch.manual_seed(7)
    parts = [whole(*micro) for micro in cut(batch(), [4, 7])]
    x, y = (torch.cat(z) for z in list(zip(*parts, strict=True))[:2])
    ik.clip_loss(x, y, parts[0][2]).backward()
    for key, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(model)[key], grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(dtype):
    """Weights that autocast keeps from the first pass carry no gradient: none may be missing."""
    whole, model = (Towers(dtype=torch.float32) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss, data = losses(IDS)["clip"], batch(torch.float32)
    with torch.autocast("cpu", dtype):
        truth = loss(*whole(*data))
    scaler.scale(truth).backward()
    with torch.autocast("cpu", dtype):
        gradcache_backward(model, cut(data, [4, 7]), loss, scaler=scaler)
    assert gradients(model)["logit_scale"].abs() > 1  # scaled
    for key, grad in gradients(whole).items():
        # a matrix product of micro-batches is rounded once for each
        error = (gradients(model)[key] - grad).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * grad.abs().max() + 1e-3


def test_autocast_in_regions_and_shared_weights():
    """Backward stays in fp32 where forward was, with the bits of an ordinary step; a weight that
    encoder and loss share gets both its gradients."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.tower, self.head, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                x = self.tower(x)
            return self.head(x)

        def loss(self, x):
            x = self.head(x)
            with torch.autocast("cpu", enabled=False):
                return ik.supcon_loss(normalize(self.last(x.float()), dim=-1), IDS)

    whole, model, x = Model(), Model(), batch(torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        truth = whole.loss(whole(x))
    truth.backward()
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradcache_backward(model, [(x,)], model.loss)
    assert torch.equal(ours, truth)
    for key, grad in gradients(whole).items():
        # an ordinary step adds the two gradients of the head in bf16
        eps = torch.finfo(torch.bfloat16).eps if key.startswith("head") else 0
        assert (gradients(model)[key] - grad).abs().max() <= eps * grad.abs().max(), key


def test_labels_among_the_features():
    """What cannot have a gradient travels as it is."""
    whole, model, (x, y) = Towers(), Towers(), batch()
    ik.supcon_loss(whole(x, y)[0], IDS).backward()
    gradcache_backward(
        lambda x, y, ids: (model(x, y)[0], ids), cut((x, y, IDS), [4, 7]), ik.supcon_loss
    )
    torch.testing.assert_close(model.image[0].weight.grad, whole.image[0].weight.grad)


def test_frozen_tower():
    model, whole = Towers(), Towers()
    for net in (model, whole):
        net.image.requires_grad_(False)
    losses(IDS)["clip"](*whole(*batch())).backward()
    gradcache_backward(model, cut(batch(), [4, 7]), losses(IDS)["clip"])
    assert all(p.grad is None for p in model.image.parameters())
    torch.testing.assert_close(model.text[0].weight.grad, whole.text[0].weight.grad)


def test_nothing_to_do():
    with pytest.raises(ValueError, match="micro_batches must hold at least one"):
        gradcache_backward(Towers(), [], losses(IDS)["clip"])
    with pytest.raises(TypeError, match="encode must return a tensor or several, got dict"):
        gradcache_backward(lambda x: {"image": x}, [(torch.ones(2, 2),)], losses(IDS)["clip"])


def steps():
    """Every loss on two ranks of unequal batches, in micro-batches, against one process."""
    rank, share = dist.get_rank(), [7, 4]
    rows = torch.arange(N).split(share)[rank]
    model, found = Towers(), {}
    replica = DistributedDataParallel(model)
    reductions = []

    def counted(state, bucket):
        reductions.append(bucket.index())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())

    replica.register_comm_hook(None, counted)
    # the first step builds the buckets anew: the second is counted
    micro = cut([x[rows] for x in batch()], [3, 1, 3] if rank == 0 else [1, 3])
    for name, loss in losses(IDS[rows], group=dist.group.WORLD, chunk_size=3).items():
        whole = Towers()
        truth = losses(IDS)[name](*whole(*batch()))
        (truth[0] if isinstance(truth, tuple) else truth).backward()
        for _ in range(2):
            replica.zero_grad()
            reductions.clear()
            gradcache_backward(replica, micro, loss, models=replica)
        found[name] = {
            "buckets": list(reductions),
            "errors": {
                key: (gradients(model)[key] - (0 if grad is None else grad)).abs().max().item()
                for key, grad in ((k, p.grad) for k, p in whole.named_parameters())
            },
        }
    return found | {"fully_shard": sharded_step(rows)}


class Reductions(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.number += "reduce_scatter" in operator.name()
        return operator(*args, **(kwargs or {}))


def sharded_step(rows):
    """The same with parameters in pieces; the towers are inside of what `models` is given."""
    model, whole = Towers(), Towers()
    losses(IDS)["clip"](*whole(*batch())).backward()
    for tower in (model.image, model.text):
        fully_shard(tower, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    micro = cut([x[rows] for x in batch()], [2, 3, 2] if dist.get_rank() == 0 else [1, 2, 1])
    loss = losses(IDS[rows], group=dist.group.WORLD)["clip"]
    with Reductions() as counted:
        gradcache_backward(model, micro, loss, models=model)
    errors = {}
    for tower in ("image", "text"):
        truth = getattr(whole, tower).named_parameters()
        for (key, p), (_, t) in zip(getattr(model, tower).named_parameters(), truth, strict=True):
            errors[f"{tower}.{key}"] = (p.grad.full_tensor() - t.grad).abs().max().item()
    return {"buckets": counted.number, "errors": errors}


def test_one_reduction_of_each_bucket():
    for found in processes.run(steps, 2):
        assert set(found) == {*losses(IDS), "fully_shard"}
        for name, result in found.items():
            # of the towers' gradients one each; one more is that of the loss's keys
            assert result["buckets"] == (3 if name == "fully_shard" else [0]), name
            for key, error in result["errors"].items():
                assert error <= 1e-12, f"{name}, {key}: off by {error}"
