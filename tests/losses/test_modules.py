"""The drop-ins that need no package but torch: `ClipLoss` and `SigLipLoss` as open_clip's training
code and its subclasses use them, and lightly's losses. test_drop_ins_*.py compare with the packages
themselves."""

import inspect
from functools import partial

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.formulas import unit
from support.losses_on_ranks import (
    LOSSES,
    Model,
    assert_equal_gradients,
    batch,
    gradients,
    local_rows,
    single,
)
from torch.nn.functional import cross_entropy, logsigmoid
from torch.nn.parallel import DistributedDataParallel

import ito_kernels as ik
from ito_kernels.integrations import lightly
from ito_kernels.integrations.listed_pairs import ListedPairs


def pair():
    return unit(6, 5).requires_grad_(), unit(6, 5, seed=1).requires_grad_()


# ---- logit_bias


@pytest.mark.parametrize("value", [-10.0, torch.inf, torch.nan])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_stays_in_the_graph_of_clip(value, shape, dtype):
    """One number added to every score changes no softmax; its parameter is waited for."""
    x, y = pair()
    bias = torch.full(shape, value, dtype=dtype, requires_grad=True)
    without, loss = ik.ClipLoss()(x, y, 9.0), ik.ClipLoss()(x, y, 9.0, bias)
    assert loss == without
    assert loss.dtype == without.dtype
    loss.backward()
    assert torch.equal(bias.grad, torch.zeros(shape, dtype=dtype))
    assert ik.ClipLoss()(x, y, 9.0, value) == without


def test_a_bias_of_many_numbers_is_refused():
    """One for each text does change the softmax."""
    with pytest.raises(ValueError, match=r"logit_bias must be one number, got shape \(6,\)"):
        ik.ClipLoss()(*pair(), 9.0, torch.zeros(6))


def trained(module, name, static_graph):
    """Three steps with a model that hands out its bias: DistributedDataParallel stops at the second
    if a parameter got no gradient."""
    rows, (x, y) = local_rows(), batch()
    model = DistributedDataParallel(Model(), static_graph=static_graph)
    loss = module(rank=dist.get_rank(), world_size=dist.get_world_size())
    truth, grads = single(LOSSES[name])
    grads.setdefault("logit_bias", torch.zeros((), dtype=torch.float64))
    for _ in range(3):
        model.zero_grad()
        value = loss(*model(x[rows], y[rows]))
        value.backward()
    assert (value - truth).abs() <= 1e-12 * truth.abs()
    assert_equal_gradients(gradients(model.module), grads, 1e-12)


# ---- subclasses


class Distilled(ik.ClipLoss):
    """As one that open_clip has: cross-entropy of the logits, and against those of a teacher."""

    def forward(self, x, y, scale, x_teacher, y_teacher, scale_teacher):
        logits = self.get_logits(x, y, scale)
        teacher = self.get_logits(x_teacher, y_teacher, scale_teacher)
        labels = self.get_ground_truth(x.device, len(logits[0]))
        clip = sum(cross_entropy(s, labels) for s in logits) / 2
        pairs = zip(logits, teacher, strict=True)
        return clip, sum(cross_entropy(s, t.softmax(1)) for s, t in pairs) / 2


def distilled(x, y, scale, x_teacher, y_teacher, scale_teacher):
    """What it is, on one process."""
    S, T = scale * x @ y.T, scale_teacher * x_teacher @ y_teacher.T
    soft = cross_entropy(S, T.softmax(1)) + cross_entropy(S.T, T.T.softmax(1))
    return ik.clip_loss(x, y, scale), soft / 2


def test_a_subclass_with_logits():
    x, y = pair()
    teachers = unit(6, 3, seed=2), unit(6, 3, seed=3)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    ours, truth = Distilled()(x, y, scale, *teachers, 5.0), distilled(x, y, scale, *teachers, 5.0)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)
        grads = (torch.autograd.grad(z, [x, y, scale], retain_graph=True) for z in (a, b))
        torch.testing.assert_close(*grads)


def distilled_on_ranks(local_loss):
    """The gradients are exact after averaging, and so are losses, of local rows too."""
    x, y = batch()
    size, model, replica = dist.get_world_size(), Model(), DistributedDataParallel(Model())
    n = len(x) // size * size
    rows = torch.arange(n).view(size, -1)[dist.get_rank()]
    loss = Distilled(local_loss, rank=dist.get_rank(), world_size=size)

    def total(model, loss, rows):
        *features, scale, bias = model(x[rows], y[rows])
        return sum(loss(*features, scale, x[rows][:, :3], y[rows][:, :3], 2.0)) + 0 * bias

    truth = total(model, distilled, torch.arange(n))
    truth.backward()
    value = total(replica, loss, rows)
    value.backward()
    assert_equal_gradients(gradients(replica.module), gradients(model), 1e-12)
    value = value.detach()
    dist.all_reduce(value)
    assert (value / size - truth).abs() <= 1e-12 * truth.abs()


def local_loss_needs():
    loss = partial(ik.ClipLoss, local_loss=True, world_size=dist.get_world_size())
    with pytest.raises(ValueError, match=r"the same number of rows on every rank, got \[9, 4\]"):
        loss(rank=dist.get_rank()).get_logits(*Model()(*(z[local_rows()] for z in batch()))[:3])
    with pytest.raises(ValueError, match=r"rank must be that in the default group, \d, got 7"):
        loss(rank=7).get_logits(torch.ones(2, 2), torch.ones(2, 2), 1.0)


def test_a_subclass_of_siglip_with_logits():
    x, y = pair()
    loss = ik.SigLipLoss()
    S = loss.get_logits(x, y, 9.0, -2.0)
    labels = loss.get_ground_truth(x.device, x.dtype, 6)
    truth = -logsigmoid(labels * S).sum() / 6
    torch.testing.assert_close(loss(x, y, 9.0, -2.0), truth)
    negatives = loss.get_ground_truth(x.device, x.dtype, 6, negative_only=True)
    assert torch.equal(negatives, labels - 2 * torch.eye(6))


@pytest.mark.parametrize(
    ("base", "name"),
    [
        *((ik.ClipLoss, name) for name in ("get_logits", "get_ground_truth")),
        *((ik.SigLipLoss, name) for name in ("get_logits", "get_ground_truth", "_loss")),
        (ik.SigLipLoss, "_chunked_loss"),  # of open_clip's main branch
    ],
)
def test_logits_that_forward_would_not_use_are_refused(base, name):
    loss = type("Sub", (base,), {name: lambda *_: None})()
    with pytest.raises(NotImplementedError, match=f"Sub redefines {name}, which {base.__name__}"):
        loss(*pair(), 9.0, 0.0)


def test_labels_are_cached_where_asked_for():
    loss, kept = ik.ClipLoss(), ik.ClipLoss(cache_labels=True)
    cpu = torch.device("cpu")
    assert loss.get_ground_truth(cpu, 4) is not loss.get_ground_truth(cpu, 4)
    assert kept.get_ground_truth(cpu, 4) is kept.get_ground_truth(cpu, 4)
    assert kept.prev_num_logits == 4
    assert kept.get_ground_truth(cpu, 5).tolist() == [0, 1, 2, 3, 4]
    # of the third of three ranks, whose rows begin at 2 * 4
    local = ik.ClipLoss(local_loss=True, rank=2, world_size=3)
    assert local.get_ground_truth(cpu, 4).tolist() == [8, 9, 10, 11]


# ---- arguments


def test_signatures_are_those_of_open_clip():
    of_clip = "(local_loss=False, gather_with_grad=False, cache_labels=False, rank=0, world_size=1,"
    of_call = "(image_features, text_features, logit_scale, logit_bias"
    for function, expected in (
        (ik.ClipLoss, of_clip + " use_horovod=False)"),
        (ik.ClipLoss().forward, of_call + "=None, output_dict=False)"),
        (ik.ClipLoss().get_logits, of_call + "=None)"),
        (ik.SigLipLoss, "(cache_labels=False, rank=0, world_size=1, dist_impl=None, chunk_size=0)"),
        (ik.SigLipLoss().forward, of_call + "=None, output_dict=False)"),
        (ik.SigLipLoss().get_logits, of_call + "=None)"),
    ):
        parameters = inspect.signature(function).parameters.values()
        plain = [p.replace(annotation=p.empty) for p in parameters]
        assert str(inspect.Signature(plain)) == expected


def test_what_siglip_accepts():
    x, y = pair()
    truth = ik.siglip_loss(x, y, 9.0, -2.0)
    for dist_impl in (None, "bidir", "shift", "reduce", "gather"):
        assert ik.SigLipLoss(dist_impl=dist_impl, chunk_size=4)(x, y, 9.0, -2.0) == truth
    assert ik.SigLipLoss().dist_impl == "bidir"
    for without_bias in (ik.SigLipLoss()(x, y, 9.0), ik.SigLipLoss()(x, y, 9.0, None)):
        assert without_bias == ik.siglip_loss(x, y, 9.0, 0.0)
    with pytest.raises(ValueError, match="'bidir', 'shift', 'reduce', 'gather', got 'ring'"):
        ik.SigLipLoss(dist_impl="ring")
    for wrong in (-1, 1.5, None):
        with pytest.raises(ValueError, match="chunk_size must be a number of images, or 0, got"):
            ik.SigLipLoss(chunk_size=wrong)


@pytest.mark.parametrize("module", [ik.ClipLoss, ik.SigLipLoss])
def test_ranks_that_are_none(module):
    for wrong in (0, -1, "2"):
        with pytest.raises(ValueError, match="world_size must be the number of ranks"):
            module(world_size=wrong)


# ---- what they print


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (
            ik.ClipLoss(True, world_size=3),
            "ClipLoss(local_loss=True, gather_with_grad=False, cache_labels=False, rank=0,"
            " world_size=3, use_horovod=False)",
        ),
        (
            ik.SigLipLoss(chunk_size=7),
            "SigLipLoss(cache_labels=False, rank=0, world_size=1, dist_impl='bidir', chunk_size=7)",
        ),
        (
            ik.SupConLoss(torch.nn.Parameter(torch.tensor(0.25)), empty="drop"),
            "SupConLoss(temperature=tensor(0.2500), base_temperature=None, empty='drop',"
            " group=None, chunk_size=None, positives='mean')",
        ),
        (ik.NTXentLoss(), "NTXentLoss(temperature=0.5, group=None, chunk_size=None)"),
        (
            ik.ItoLoss(),
            "ItoLoss(lambda_fusion=2.0, denominator='pair', group=None, chunk_size=None, "
            "equal_ids='positive')",
        ),
        (
            lightly.NTXentLoss(0.5, (4, 3)),
            "NTXentLoss(temperature=0.5, memory_bank_size=(4, 3), gather_distributed=False)",
        ),
        (
            lightly.DCLLoss(0.2),
            "DCLLoss(temperature=0.2, weight_fn=None, gather_distributed=False)",
        ),
        (
            lightly.DCLWLoss(sigma=0.3),
            "DCLWLoss(temperature=0.1, sigma=0.3, gather_distributed=False)",
        ),
    ],
)
def test_modules_print_all_their_options(module, expected):
    assert repr(module) == expected


def test_multi_positive_infonce_prints_all_its_options():
    """Those given and the defaults of the function; of a tensor the shape."""
    printed = repr(ik.MultiPositiveInfoNCE(positives="in", queue=torch.ones(3, 2)))
    given = {"positives": "'in'", "queue": "tensor of shape (3, 2)"}
    for name, parameter in inspect.signature(ik.multi_positive_infonce).parameters.items():
        if name in ("queries", "keys", "logit_scale", "query_ids", "key_ids"):
            continue
        text = f"{name}={given.get(name, repr(parameter.default))}"
        assert any(f"{before}{text}{after}" in printed for before in "( " for after in ",)")


def test_every_module_prints_its_options():
    modules = [x for x in vars(ik).values() if isinstance(x, type)]
    modules = [x for x in modules if issubclass(x, torch.nn.Module)]
    assert ik.ClipLoss in modules
    for module in modules:
        assert module.extra_repr is not torch.nn.Module.extra_repr, module


def test_a_subclass_prints_its_own_options_too():
    class Handing(ik.ClipLoss):
        def __init__(self, weight, unused=1, **options):
            super().__init__(**options)
            self.weight = weight

    class Naming(ik.ClipLoss):
        def __init__(self, rank):
            super().__init__(rank=rank)

    assert repr(Handing(2.0, rank=1)).startswith("Handing(weight=2.0, local_loss=False, gather")
    assert repr(Naming(1)) == "Naming(rank=1)"


# ---- lightly


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        *((x, "temperature must be") for x in (0, -0.5, 1e-9, torch.inf, torch.nan)),
        (torch.ones(2), "temperature must be one number"),
    ],
)
def test_temperatures_that_lightly_is_not_given(temperature, message):
    with pytest.raises(ValueError, match=message):
        lightly.NTXentLoss(temperature)
    with pytest.raises(TypeError, match="temperature must be a number or a tensor"):
        lightly.NTXentLoss("0.5")


@pytest.mark.parametrize("size", [16, -1, (-1, 8), (8, 0), (8, -1), (8,), (1, 2, 3)])
def test_sizes_that_lightly_is_not_given(size):
    with pytest.raises(ValueError, match=r"memory_bank_size must be 0 or \(rows, D\)"):
        lightly.NTXentLoss(memory_bank_size=size)


def test_a_memory_bank_as_lightly_s_starts_over_where_it_ends():
    loss = lightly.NTXentLoss(0.5, (5, 4))
    first, second, third = (unit(3, 4, seed=i, dtype=torch.float32) for i in range(3))
    for keys in (first, second, third):
        loss(torch.randn(3, 4, requires_grad=True), keys)
    torch.testing.assert_close(loss.bank, torch.cat([third, second[:2]]))


@pytest.mark.parametrize("size", [0, (0,), (0, 5), (7, 5)])
def test_lightly_gathers_nothing_in_one_process(size):
    values = []
    for gather in (False, True):
        torch.manual_seed(0)
        values.append(lightly.NTXentLoss(0.5, size, gather)(*pair()))
    assert values[0] == values[1]


def dcl(x, y, temperature, weights=1.0):
    """DCL, eq. 6, item by item."""
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
    losses = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        candidates = torch.cat([x[others], y[others]])
        w = weights if isinstance(weights, float) else weights[i]
        positive = w * (x[i] @ y[i]) / temperature
        losses += [((candidates @ z[i]) / temperature).logsumexp(0) - positive for z in (x, y)]
    return sum(losses) / len(losses)


def test_dcl_of_lightly():
    x, y = pair()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    cosines = torch.nn.functional.cosine_similarity(x, y).detach()
    exp = (cosines / 0.2).exp()
    for loss, truth in (
        (lightly.DCLLoss(tau), dcl(x, y, tau)),
        (lightly.DCLLoss(tau, lambda x, y: x.new_full((6,), 0.5)), dcl(x, y, tau, 0.5)),
        (lightly.DCLWLoss(tau, 0.2), dcl(x, y, tau, 2 - exp / exp.mean())),
    ):
        value = loss(x, y)
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
        grads = (torch.autograd.grad(z, [x, y, tau], retain_graph=True) for z in (value, truth))
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_what_lightly_s_losses_are_not_given():
    x, y = pair()
    for module in (lightly.NTXentLoss, lightly.DCLLoss, lightly.DCLWLoss):
        with pytest.raises(ValueError, match="out0 and out1 must have the same number of rows"):
            module()(x, y[:1])
    with pytest.raises(ValueError, match="same number of rows, got 6 and 1"):
        lightly.NTXentLoss(memory_bank_size=(4, 5))(x, y[:1])
    for module in (lightly.DCLLoss, lightly.DCLWLoss):
        with pytest.raises(ValueError, match="out0 must have at least 2 rows"):
            module()(x[:1], y[:1])
        with pytest.raises(ValueError, match="temperature must be"):
            module(0.0)
    with pytest.raises(TypeError, match=r"weight_fn must be a function or None, got 0\.5"):
        lightly.DCLLoss(weight_fn=0.5)
    with pytest.raises(TypeError, match="weight_fn must return a tensor, got float"):
        lightly.DCLLoss(weight_fn=lambda x, y: 1.0)(x, y)
    with pytest.raises(ValueError, match=r"one weight for each of 6 rows, got shape \(6, 1\)"):
        lightly.DCLLoss(weight_fn=lambda x, y: x[:, :1])(x, y)
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma must be finite and greater than 0"):
            lightly.DCLWLoss(sigma=sigma)


def lightly_gathered():
    x, y = unit(13, 5), unit(13, 5, seed=1)
    rows = local_rows()
    loss = lightly.NTXentLoss(0.5, gather_distributed=True)(x[rows], y[rows])
    torch.testing.assert_close(loss, ik.nt_xent_loss(x, y, 0.5))
    loss = lightly.DCLLoss(0.5, gather_distributed=True)(x[rows], y[rows])
    torch.testing.assert_close(loss, dcl(x, y, 0.5))
    bank = lightly.NTXentLoss(0.5, (20, 5), gather_distributed=True)
    bank(x[rows].requires_grad_(), y[rows])
    torch.testing.assert_close(bank.bank[:13], y.float())  # of all ranks, in their order


# ---- pairs in a list, as pytorch-metric-learning's losses get them


@pytest.mark.parametrize("ordered", [False, True])
def test_listed_pairs_are_counted_in_any_panel(ordered):
    g = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(0, n, (60,), generator=g) for n in (9, 7))
    rows = rows.sort()[0] if ordered else rows
    pairs = ListedPairs("pairs", rows, columns, (9, 7))
    dense = torch.zeros(9, 7)
    for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
        dense[i, j] += 1
    assert dense.max() > 1
    assert (dense == 0).any()
    for start, stop in ((0, 9), (0, 4), (4, 5), (5, 9)):
        panel = torch.full((stop - start, 7), torch.nan)
        assert torch.equal(pairs.counts(torch.arange(start, stop), panel), dense[start:stop])


# ---- on two ranks

ON_RANKS = {
    **{
        f"{name}{', static graph' * static}": partial(trained, module, name, static)
        for module, name in ((ik.ClipLoss, "clip"), (ik.SigLipLoss, "siglip"))
        for static in (False, True)
    },
    "distilled": partial(distilled_on_ranks, False),
    "distilled, local_loss": partial(distilled_on_ranks, True),
    "local_loss_needs": local_loss_needs,
    "lightly": lightly_gathered,
}


def run_on_ranks(names):
    return processes.findings({name: ON_RANKS[name] for name in names})


@pytest.fixture(scope="module")
def found(request):
    names = [params["check"] for params in processes.selected(request, "test_on_two_ranks")]
    return processes.run(run_on_ranks, 2, names, seconds=30)


@pytest.mark.parametrize("check", ON_RANKS)
def test_on_two_ranks(found, check):
    for rank, results in enumerate(found):
        assert check in results, f"rank {rank} ended before it came to this"
        assert results[check] is None, f"rank {rank}: {results[check]}"
