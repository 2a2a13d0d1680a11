"""Tensors that are not what their memory says: lazily negated or zero, freed, nested; ids of 64
unsigned bits. Read right, or refused by name."""

import asyncio
import threading

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import ito_kernels as ik

BACKENDS = ["reference", "chunked", "cpu"]
N = 6


def negated(x: torch.Tensor) -> torch.Tensor:
    """-x, of which memory holds x: what `.conj().imag` and `.T.conj().imag` may give."""
    out = torch._neg_view(x)
    assert out.is_neg()
    return out


def pair(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    return normalize(torch.randn(n, 4), dim=1), normalize(torch.randn(n, 4), dim=1)


def clip(x: torch.Tensor, y: torch.Tensor, scale) -> torch.Tensor:
    """CLIP's loss, written out in fp64."""
    logits = torch.as_tensor(scale).double() * (x.double() @ y.double().T)
    rows = torch.arange(len(x))
    return 0.5 * (cross_entropy(logits, rows) + cross_entropy(logits.T, rows))


def close(got, truth):
    torch.testing.assert_close(got.double(), truth.double(), rtol=1e-5, atol=1e-6)


# ---- negated and zero tensors


@pytest.mark.parametrize("backend", BACKENDS)
def test_negated_features_and_scales(backend):
    x, y = pair()
    scale, bias = torch.tensor(10.0), torch.tensor(-3.0)
    close(ik.clip_loss(negated(x), y, scale, backend=backend), clip(-x, y, scale))
    close(ik.clip_loss(x, negated(y), scale, backend=backend), clip(x, -y, scale))
    close(ik.clip_loss(x, y, negated(-scale), backend=backend), clip(x, y, scale))
    close(
        ik.siglip_loss(x, y, negated(-scale), negated(-bias), backend=backend),
        ik.siglip_loss(x, y, scale, bias, backend="reference"),
    )
    z = torch.complex(x, y)  # as it comes about
    close(ik.clip_loss(z.conj().imag, x, scale, backend=backend), clip(-y, x, scale))


@pytest.mark.parametrize("backend", BACKENDS)
def test_negated_features_of_one_tower_stay_one(backend):
    x, _ = pair()
    x = torch.cat([x, x + 0.1])
    labels = torch.arange(N).repeat(2)
    leaf = x.clone().requires_grad_()
    ours = ik.supcon_loss(negated(leaf), labels, backend=backend)
    (grad,) = torch.autograd.grad(ours, leaf)
    truth = leaf.detach().neg().double().requires_grad_()
    loss = ik.supcon_loss(truth, labels, backend="reference")
    close(ours, loss)
    close(grad, -torch.autograd.grad(loss, truth)[0])


def test_negated_options():
    """Every tensor that a loss takes, negated, against the same numbers written out."""
    x, y = pair()
    ids, weights, bias = torch.arange(N), torch.rand(N), torch.randn(N)
    pairs = torch.stack([ids, ids], 1)
    options = {
        "query_ids": negated(-ids),
        "key_ids": negated(-ids),
        "query_weights": negated(-weights),
        "key_bias": negated(-bias),
        "queue": negated(-y),
        "queue_ids": negated(-ids - 3),
        "hard_negatives": negated(-x[:, None]),
    }
    plain = {name: value.clone().resolve_neg() for name, value in options.items()}
    assert not any(value.is_neg() for value in plain.values())
    close(ik.clip_loss(x, y, 9.0, **options), ik.clip_loss(x, y, 9.0, **plain))
    options = {"positive_pairs": negated(-pairs), "positive_weights": negated(-weights)}
    plain = {"positive_pairs": pairs, "positive_weights": weights}
    close(ik.clip_loss(x, y, 9.0, **options), ik.clip_loss(x, y, 9.0, **plain))


def every_loss(x, y, z, ids, backend):
    """Each loss of three feature matrices, so that none reads memory as it lies."""
    where = {"backend": backend}
    soft = {"target_queries": z, "target_keys": y, "target_scale": 5.0}
    clusters = {"query_clusters": ids, "key_clusters": ids, "weights": torch.rand(N, N) + 0.1}
    yield ik.supcon_loss(x, ids, **where)
    yield ik.nt_xent_loss(x, y, **where)
    yield ik.mnrl_loss(x, y, z, **where)
    yield ik.one_to_k_loss(x, torch.stack([y, z], 1), 9.0, **where)
    yield ik.ito_loss(x[None], y, torch.stack([y, z]), 9.0, **where)[0]
    yield ik.decoupled_contrastive_loss(x, y, 9.0, query_ids=ids, key_ids=ids, **where)
    yield ik.decoupled_softmax_loss(x, y, 9.0, query_ids=ids, key_ids=ids, **where)
    yield ik.cwcl_loss(x, y, 9.0, reference=z, **where)
    yield ik.soft_target_infonce(x, y, 9.0, **soft, **where)
    yield ik.mixup_infonce(x, y, 9.0, partners=ids, mixing=0.3, **where)
    yield ik.uniformity_loss(x, **where)
    yield ik.alignment_loss(x, y)
    yield ik.symile_loss([x, y, z], 9.0, generator=torch.Generator().manual_seed(0), **where)
    yield ik.cacr_loss(x, y)
    yield ik.cluster_weighted_infonce(x, y, 9.0, **clusters, **where)
    yield ik.matryoshka_loss(ik.clip_loss, x, y, dims=[2, 4], logit_scale=9.0, **where)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_loss_of_negated_features(backend):
    x, y = pair()
    z, _ = pair()
    ids = torch.arange(N) // 2
    torch.manual_seed(1)
    ours = list(every_loss(negated(-x), negated(-y), negated(-z), negated(-ids), backend))
    torch.manual_seed(1)
    truth = list(every_loss(x, y, z, ids, "reference"))
    for got, wanted in zip(ours, truth, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["negated", "zero"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_gradients_that_arrive(loss, kind, backend):
    x, y = (v.requires_grad_() for v in pair())
    scale = torch.tensor(10.0, requires_grad=True)
    weights = torch.rand(N)
    arrived = negated(weights) if kind == "negated" else torch._efficientzerotensor(N)

    def rows(x, y, scale, backend):
        if loss == "clip":
            return ik.clip_loss(x, y, scale, symmetric=False, reduction="none", backend=backend)
        return ik.siglip_loss(x, y, scale, -3.0, reduction="none", backend=backend)

    ours = torch.autograd.grad(rows(x, y, scale, backend), (x, y, scale), arrived)
    leaves = [v.detach().double().requires_grad_() for v in (x, y, scale)]
    factor = -weights.double() if kind == "negated" else torch.zeros(N).double()
    truth = torch.autograd.grad((rows(*leaves, "reference") * factor).sum(), leaves)
    for got, wanted in zip(ours, truth, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tensors(backend):
    x, _ = pair()
    zero = torch._efficientzerotensor(N, 4)
    close(ik.clip_loss(zero, x, 10.0, backend=backend), torch.tensor(N).log())


def test_zero_tensors_keep_their_gradient():
    """DistributedDataParallel would wait for one that never comes."""
    x, _ = pair()
    zero = torch._efficientzerotensor(N, 4).requires_grad_()
    ik.clip_loss(zero, x, 10.0).backward()
    dense = torch.zeros(N, 4, dtype=torch.float64, requires_grad=True)
    clip(dense, x, 10.0).backward()
    close(zero.grad, dense.grad)


# ---- freed memory


def freed(x: torch.Tensor, size: int = 0) -> torch.Tensor:
    x.untyped_storage().resize_(size)
    return x


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("image_features", lambda x, y: ik.clip_loss(freed(x), y, 1.0)),
        ("image_features", lambda x, y: ik.clip_loss(freed(x, 8), y, 1.0)),
        ("image_features", lambda x, y: ik.clip_loss(freed(x[1:]), y[1:], 1.0)),
        ("text_features", lambda x, y: ik.siglip_loss(x, freed(y), 1.0, 0.0)),
        ("logit_scale", lambda x, y: ik.clip_loss(x, y, freed(torch.tensor(1.0)))),
        ("labels", lambda x, y: ik.supcon_loss(x, freed(torch.arange(N)))),
        ("b", lambda x, y: ik.similarity_logsumexp(x, freed(y), 1.0)),
        ("col_bias", lambda x, y: ik.similarity_softplus(x, y, 1.0, col_bias=freed(torch.ones(N)))),
        ("queue", lambda x, y: ik.clip_loss(x, x, 1.0, queue=freed(y))),
        ("image_views", lambda x, y: ik.ito_loss(freed(x[None]), y, None, 1.0, lambda_fusion=0)),
    ],
)
def test_freed_memory_is_refused(name, call):
    with pytest.raises(ValueError, match=f"{name} must have its values in memory, got storage of"):
        call(*pair())


def test_memory_freed_before_backward_is_refused():
    x, y = pair()
    leaf = x.clone().requires_grad_()
    loss = ik.clip_loss(leaf, y, 1.0, reduction="none")[0]
    freed(y)
    with pytest.raises(ValueError, match="b, kept for backward, must have its values in memory"):
        loss.sum().backward()


def test_expanded_and_strided_tensors_are_not_taken_for_freed():
    x, y = pair()
    one = x[:1].expand(N, 4)
    close(ik.clip_loss(one, y, 10.0), clip(one, y, 10.0))
    columns = torch.randn(4, 2 * N).T[::2]
    close(ik.clip_loss(columns, y, 1.0), clip(columns, y, 1.0))


# ---- nested and sparse tensors


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout):
    x, y = pair()
    nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=layout)
    lists = torch.nested.nested_tensor([torch.arange(2), torch.arange(4)], layout=layout)
    for name, call in (
        ("image_features", lambda: ik.clip_loss(nested, y, 1.0)),
        ("text_features", lambda: ik.siglip_loss(x, nested, 1.0, 0.0)),
        ("logit_scale", lambda: ik.clip_loss(x, y, nested)),
        ("logit_scale", lambda: ik.ito_loss(x[None], y, None, nested, lambda_fusion=0)),
        ("logit_bias", lambda: ik.siglip_loss(x, y, 1.0, nested)),
        ("labels", lambda: ik.supcon_loss(x, lists)),
        ("query_weights", lambda: ik.clip_loss(x, y, 1.0, query_weights=lists.float())),
        ("positive_pairs", lambda: ik.clip_loss(x, y, 1.0, positive_pairs=lists)),
        ("queue", lambda: ik.clip_loss(x, y, 1.0, queue=nested)),
        ("hard_negatives", lambda: ik.clip_loss(x, y, 1.0, hard_negatives=nested)),
        ("debias", lambda: ik.clip_loss(x, y, 1.0, debias=lists.float())),
        ("negatives", lambda: ik.mnrl_loss(x, y, nested)),
        ("keys", lambda: ik.one_to_k_loss(x, nested, 1.0)),
        ("text", lambda: ik.ito_loss(x[None], nested, None, 1.0, lambda_fusion=0)),
        ("reference", lambda: ik.cwcl_loss(x, y, 1.0, reference=nested)),
        ("features 0", lambda: ik.matryoshka_loss(ik.clip_loss, nested, y, dims=[2])),
        ("a", lambda: ik.similarity_logsumexp(nested, y, 1.0)),
    ):
        with pytest.raises(TypeError, match=f"{name} must be .*, got a nested tensor"):
            call()


def test_sparse_ids_are_refused_by_name():
    x, _ = pair()
    with pytest.raises(TypeError, match=r"labels must be dense, got torch\.sparse_coo"):
        ik.supcon_loss(x, torch.arange(N).to_sparse())


# ---- ids


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_ids(dtype):
    x, _ = pair()
    ids = torch.tensor([0, 1, 0, 200, 1, 200])
    close(ik.supcon_loss(x, ids.to(dtype)), ik.supcon_loss(x, ids))


def test_ids_from_2_to_the_63_are_refused():
    """As int64 they would be negative: padding, and a loss of 0."""
    x, y = pair()
    large = torch.tensor([2**63 + i // 2 for i in range(N)], dtype=torch.uint64)
    fits = torch.tensor([2**63 - 1 - i // 2 for i in range(N)], dtype=torch.uint64)
    same = torch.arange(N) // 2
    close(ik.supcon_loss(x, fits), ik.supcon_loss(x, same))
    wanted = f"must be less than 2\\^63, got {2**63 + 2}"
    with pytest.raises(ValueError, match=f"labels {wanted}"):
        ik.supcon_loss(x, large)
    with pytest.raises(ValueError, match=f"key_ids {wanted}"):
        ik.clip_loss(x, y, 1.0, query_ids=same, key_ids=large)
    with pytest.raises(ValueError, match=f"queue_ids {wanted}"):
        ik.clip_loss(x, y, 1.0, query_ids=same, key_ids=same, queue=y, queue_ids=large)


# ---- the backend of a block


def test_use_backend_is_of_its_thread():
    """A block that opens and closes in one thread changes nothing in another."""
    x, y = pair()
    inside, done = threading.Event(), threading.Event()
    seen = {}

    def other():
        with ik.use_backend("reference"):
            seen["other"] = ik.explain(x, y)
            inside.set()
            assert done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    seen["here"] = ik.explain(x, y)
    with ik.use_backend("chunked"):
        done.set()
        thread.join()
        seen["block"] = ik.explain(x, y)
    assert "backend reference: asked for by use_backend" in seen["other"]
    assert "asked for by use_backend" not in seen["here"]
    assert "backend chunked: asked for by use_backend" in seen["block"]


def test_use_backend_left_elsewhere_ends():
    """Blocks that are left in another thread or task, or out of order: none stays chosen."""
    x, y = pair()

    def block(name):
        with ik.use_backend(name):
            yield

    def automatic():
        return "use_backend" not in ik.explain(x, y)

    generator = block("reference")
    next(generator)
    assert not automatic()
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert automatic()

    outer, inner = block("reference"), block("chunked")
    next(outer), next(inner)
    outer.close()
    assert "backend chunked: asked for by use_backend" in ik.explain(x, y)
    inner.close()
    assert automatic()

    async def tasks():
        async def fixture():
            with ik.use_backend("reference"):
                yield

        entered = fixture()
        await asyncio.create_task(anext(entered))
        await asyncio.create_task(entered.aclose())
        return automatic()

    assert asyncio.run(tasks())
