"""The drop-ins for lightly against the package, values to fp32 rounding. Skipped where it is not
installed: requirements-peers.txt has versions that go together."""

import inspect

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.drop_ins import agree, both, features
from torch.nn.functional import normalize

import ito_kernels as ik


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.1},
        {"memory_bank_size": (0, 24)},
        {"gather_distributed": True},  # of one process: theirs
        {"temperature": torch.nn.Parameter(torch.tensor(0.4))},
    ],
)
def test_lightly(options):
    ours, theirs = (package.NTXentLoss(**options) for package in both("lightly"))
    x, y = features(33, 24), features(33, 24)
    agree(ours(x, y), theirs(x, y), [x, y, *ours.parameters()])


@pytest.mark.parametrize("gather", [False, True])
def test_lightly_with_a_memory_bank(gather):
    """Over several batches, past the end of the bank, and without a gradient."""
    ours, theirs = both("lightly")
    options = {"memory_bank_size": (20, 8), "gather_distributed": gather}
    torch.manual_seed(5)
    ours = ours.NTXentLoss(0.2, **options)
    torch.manual_seed(5)
    theirs = theirs.NTXentLoss(0.2, **options)
    for size in (7, 7, 7, 7, 20):
        x, y = features(size, 8), features(size, 8)
        agree(ours(x, y), theirs(x, y), [x, y])
    with torch.no_grad():
        for _ in range(2):
            x, y = torch.randn(7, 8), torch.randn(7, 8)
            torch.testing.assert_close(ours(x, y), theirs(x, y))
    assert not ours.state_dict()


DCL_OPTIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": torch.nn.Parameter(torch.tensor(0.4))},
    {"gather_distributed": True},  # of one process: theirs
]
OF_DCL = [
    *(("DCLLoss", options) for options in DCL_OPTIONS),
    ("DCLLoss", {"weight_fn": lambda x, y: (x - y).square().sum(1)}),  # it has a gradient
    ("DCLLoss", {"weight_fn": lambda x, y: x[:, 0].detach(), "temperature": 0.2}),  # not symmetric
    *(("DCLWLoss", options) for options in DCL_OPTIONS),
    ("DCLWLoss", {"sigma": 0.2, "temperature": 0.2}),
]
# lightly makes a tensor of a tensor
quiet = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")


@quiet
@pytest.mark.parametrize(("name", "options"), OF_DCL)
def test_lightly_decoupled(name, options):
    ours, theirs = (getattr(package, name)(**options) for package in both("lightly"))
    for size in (33, 2):
        x, y = features(size, 24), features(size, 24)
        agree(ours(x, y), theirs(x, y), [x, y, *ours.parameters()])


def test_decoupled_contrastive_loss_of_two_views_is_lightly_s():
    _, theirs = both("lightly")
    x, y = features(33, 24), features(33, 24)
    z, ids = torch.cat([normalize(x, dim=1), normalize(y, dim=1)]), torch.arange(33).repeat(2)
    options = {"query_ids": ids, "key_ids": ids, "exclude_self": True, "symmetric": False}
    loss = ik.decoupled_contrastive_loss(z, z, 1 / 0.3, **options)
    agree(loss, theirs.DCLLoss(0.3)(x, y), [x, y])


def test_lightly_signatures():
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        a, b = (
            {k: p.default for k, p in inspect.signature(getattr(x, name)).parameters.items()}
            for x in both("lightly")
        )
        assert a == b


def lightly_on_ranks():
    ours, theirs = both("lightly")
    rank, size = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(6, 8, generator=g).requires_grad_() for _ in range(2))
    for name, options in (
        ("NTXentLoss", {}),
        ("DCLLoss", {}),
        ("DCLLoss", {"weight_fn": lambda x, y: (x - y).square().sum(1)}),
        ("DCLWLoss", {"sigma": 0.3}),
    ):
        for gather in (True, False):
            loss, peer = (
                getattr(p, name)(0.2, gather_distributed=gather, **options)(x, y)
                for p in (ours, theirs)
            )
            parts = peer.detach().clone()
            if gather:
                dist.all_reduce(parts)  # theirs are each of this rank's rows
                parts /= size
            torch.testing.assert_close(loss, parts)
            grads = [torch.autograd.grad(z, (x, y)) for z in (loss, peer)]
            torch.testing.assert_close(*grads)

    options = {"memory_bank_size": (20, 8), "gather_distributed": True}
    torch.manual_seed(5)
    ours = ours.NTXentLoss(0.2, **options)
    torch.manual_seed(5)
    theirs = theirs.NTXentLoss(0.2, **options)
    for _ in range(4):
        x, y = (torch.randn(6, 8, generator=g).requires_grad_() for _ in range(2))
        agree(ours(x, y), theirs(x, y), [x, y])


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-9, torch.tensor(0.0)])
def test_lightly_refuses_at_construction(temperature):
    for package in both("lightly"):
        with pytest.raises(ValueError, match="temperature"):
            package.NTXentLoss(temperature)


ON_RANKS = {"both": lightly_on_ranks}


def all_on_ranks():
    return processes.findings(ON_RANKS)


def test_on_two_ranks():
    both("lightly")
    assert processes.run(all_on_ranks, 2, seconds=60) == [dict.fromkeys(ON_RANKS)] * 2
