"""The drop-ins for open_clip against the package, values to fp32 rounding. Skipped where it is not
installed: requirements-peers.txt has versions that go together."""

import inspect

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.drop_ins import agree, both, features
from torch.nn.functional import normalize


def images_and_texts(n=33, d=24):
    return [normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("shape", [(), (1,)])  # of the model's parameters
def test_open_clip(bias, shape):
    ours, theirs = (package.ClipLoss() for package in both("open_clip"))
    leaves = [*images_and_texts(), torch.full(shape, 14.0, requires_grad=True)]
    inputs = [*leaves, None if bias is None else torch.full(shape, bias)]
    agree(ours(*inputs), theirs(*inputs), leaves)
    assert ours(*inputs, output_dict=True).keys() == theirs(*inputs, output_dict=True).keys()
    if bias:  # a gradient of 0 where theirs has one of rounding
        inputs[3].requires_grad_()
        grads = (torch.autograd.grad(loss(*inputs), inputs[3])[0] for loss in (ours, theirs))
        torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_open_clip_siglip(bias, shape):
    """chunk_size is of the main branch, not of the releases."""
    ours, theirs = both("open_clip")
    x, y = images_and_texts()
    leaves = [x, y, torch.full(shape, 10.0, requires_grad=True)]
    bias = bias and torch.full(shape, bias, requires_grad=True)
    wanted = leaves if bias is None else [*leaves, bias]
    for dist_impl in (None, "bidir", "shift", "reduce", "gather"):
        values = [x.SigLipLoss(dist_impl=dist_impl)(*leaves, bias) for x in (ours, theirs)]
        agree(*values, wanted)
    for flags in ({"chunk_size": 10}, {"cache_labels": True}):  # which change neither value
        agree(ours.SigLipLoss(**flags)(*leaves, bias), values[1], wanted)
        if flags.keys() <= inspect.signature(theirs.SigLipLoss).parameters.keys():
            agree(values[0], theirs.SigLipLoss(**flags)(*leaves, bias), wanted)


def rebuilt(name):
    """open_clip's subclass with our ClipLoss in place of theirs, from its own source."""
    ours, theirs = both("open_clip")
    names = {**vars(theirs), "ClipLoss": ours.ClipLoss}
    exec(inspect.getsource(getattr(theirs, name)), names)
    return names[name], getattr(theirs, name)


def distill_inputs():
    leaves = [*images_and_texts(), torch.tensor(14.0, requires_grad=True)]
    return leaves, [*leaves, *(x.detach() for x in images_and_texts(d=16)), torch.tensor(20.0)]


@pytest.mark.parametrize("flags", [{}, {"local_loss": True, "cache_labels": True}])
def test_open_clip_distill(flags):
    ours, theirs = (x(**flags) for x in rebuilt("DistillClipLoss"))
    leaves, inputs = distill_inputs()
    for a, b in zip(ours(*inputs), theirs(*inputs), strict=True):
        agree(a, b, leaves)


def test_open_clip_coca():
    ours, theirs = (x(2.0, 1.0, pad_id=0) for x in rebuilt("CoCaLoss"))
    leaves = [*images_and_texts(), torch.tensor(14.0, requires_grad=True), features(33, 7, 11)]
    x, y, scale, logits = leaves
    labels = torch.randint(11, (33, 7))
    values = [loss(x, y, logits, labels, scale) for loss in (ours, theirs)]
    agree(*(sum(x) for x in values), leaves)


def test_open_clip_signatures():
    """Those of the release and of the main branch, which differ in two arguments."""
    ours, theirs = both("open_clip")
    extra = {
        ("ClipLoss", "__init__"): {"use_horovod": False},
        ("SigLipLoss", "__init__"): {"chunk_size": 0},
        ("SigLipLoss", "forward"): {"logit_bias": None},  # theirs must be passed
    }
    for name in ("ClipLoss", "SigLipLoss"):
        for method in ("__init__", "forward", "get_logits", "get_ground_truth"):
            a, b = (
                {k: p.default for k, p in inspect.signature(function).parameters.items()}
                for function in (getattr(getattr(x, name), method) for x in (ours, theirs))
            )
            assert a == b | extra.get((name, method), {})
        loss, peer = getattr(ours, name)(), getattr(theirs, name)()
        public = {k for k in vars(peer) if not k.startswith("_")} - {"training"}
        assert {k: getattr(loss, k) for k in public} == {k: getattr(peer, k) for k in public}


def open_clip_on_ranks():
    """Of open_clip's four ways to gather, those with gradients give ours after averaging. Without,
    and without local_loss, those of the features are 1/W of ours and that of the scale is the same:
    what docs/losses.md says about learning rates."""
    ours, theirs = both("open_clip")
    rank, size = dist.get_rank(), dist.get_world_size()
    where = {"rank": rank, "world_size": size}
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 8, 5, generator=g)
    x, y = torch.randn(2, 12, 8, generator=g).chunk(size, dim=1)[rank]

    def step(loss):
        towers = weight.clone().requires_grad_()
        scale = torch.tensor(5.0, requires_grad=True)
        value = loss(normalize(x @ towers[0], dim=1), normalize(y @ towers[1], dim=1), scale)
        value.backward()
        found = value.detach(), towers.grad, scale.grad
        for z in found:
            dist.all_reduce(z)
        return [z / size for z in found]

    truth = step(ours.ClipLoss(**where))
    for flags in ({"gather_with_grad": True}, {"local_loss": True, "gather_with_grad": True}):
        torch.testing.assert_close(step(theirs.ClipLoss(**flags, **where)), truth)
    value, of_towers, of_scale = step(theirs.ClipLoss(**where))
    torch.testing.assert_close([value, size * of_towers, of_scale], truth)
    _, of_towers, _ = step(theirs.ClipLoss(local_loss=True, **where))
    assert (of_towers - truth[1]).abs().max() > 0.02 * truth[1].abs().max()  # another gradient

    def siglip(package, **options):
        loss = package.SigLipLoss(**options, **where)
        return step(lambda x, y, scale: loss(x, y, scale, -3.0))

    for dist_impl in ("bidir", "shift", "reduce", "gather"):
        torch.testing.assert_close(siglip(theirs, dist_impl=dist_impl), siglip(ours))


def open_clip_distill_on_ranks():
    """Values are theirs, gradients theirs with gather_with_grad."""
    rank, size = dist.get_rank(), dist.get_world_size()
    leaves, inputs = distill_inputs()
    for local_loss in (False, True):
        flags = {"local_loss": local_loss, "rank": rank, "world_size": size}
        ours, theirs = (x(gather_with_grad=True, **flags) for x in rebuilt("DistillClipLoss"))
        for a, b in zip(ours(*inputs), theirs(*inputs), strict=True):
            agree(a, b, leaves)


ON_RANKS = {
    "losses": open_clip_on_ranks,
    "distill": open_clip_distill_on_ranks,
}


def all_on_ranks():
    return processes.findings(ON_RANKS)


def test_on_two_ranks():
    both("open_clip")
    assert processes.run(all_on_ranks, 2, seconds=60) == [dict.fromkeys(ON_RANKS)] * 2
