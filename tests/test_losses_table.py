"""The table of docs/losses.md: every loss with every option on every backend, as tested here.

`python tests/test_losses_table.py` writes the table. A row is a call; for each backend its value
and gradients in fp32 are compared with the reference in fp64, and it names the test that compares
the reference with the formula.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from problems import AVAILABLE
from torch.nn.functional import normalize

import ito_kernels as ik

FILE = Path(__file__).parent.parent / "docs" / "losses.md"
BACKENDS = ("reference", "chunked", "cpu", "triton")
N, D = 24, 8
IDS = torch.arange(N) // 2
SCALE = 12.0

OPTIONS, OTHERS = "test_losses_options.py", "test_losses_others.py"
MIXED = "test_losses_mixed.py"


def infonce(test: str, **options):
    def call(x, y, z, **where):
        given = {k: v(z) if callable(v) else v for k, v in options.items()}
        return ik.multi_positive_infonce(x, y, SCALE, **given, **where)

    return call, test


BY_ID = {"query_ids": IDS, "key_ids": IDS}
WEIGHTS = torch.linspace(0.5, 2, N)
PAIRS = torch.stack([torch.arange(N), (torch.arange(N) * 5) % N], 1)
MARGIN = "false_negative_margin, label_smoothing, logit_scale per query"
SOFT = "test_soft_targets"
CLUSTERS = {
    "query_clusters": torch.arange(N) % 3,
    "key_clusters": torch.arange(N) % 3,
    "weights": torch.tensor([[0.5, 2.0, 1.0], [1.0, 0.7, 3.0], [0.2, 1.5, 1.0]]),
}

# (loss, options): (call, the test of its formula). What stands in the table.
ROWS = {
    "multi_positive_infonce": {
        "logit_scale for all": infonce("test_losses.py::test_clip_loss_in_fp32"),
        "logit_scale per query": (
            lambda x, y, z, **where: ik.multi_positive_infonce(x, y, SCALE * WEIGHTS, **where),
            "test_losses.py::test_scale_per_row",
        ),
        'query_ids, key_ids, positives="mean"': infonce(
            "test_losses.py::test_multi_positive_infonce", **BY_ID
        ),
        'positives="in"': infonce(
            "test_losses.py::test_multi_positive_infonce", positives="in", **BY_ID
        ),
        'positives="sum"': infonce(
            "test_losses.py::test_multi_positive_infonce", positives="sum", **BY_ID
        ),
        "symmetric=False": infonce("test_losses.py::test_multi_positive_infonce", symmetric=False),
        "exclude_self": infonce("test_losses.py::test_exclude_self", exclude_self=True, **BY_ID),
        'empty="drop"': infonce(
            "test_losses.py::test_multi_positive_infonce", empty="drop", query_ids=IDS - 3
        ),
        "label_smoothing": infonce(f"{OPTIONS}::test_by_ids", label_smoothing=0.1),
        "query_weights, key_weights": infonce(
            f"{OPTIONS}::test_by_ids", query_weights=WEIGHTS, key_weights=WEIGHTS, **BY_ID
        ),
        "key_bias": infonce(f"{OPTIONS}::test_by_ids", key_bias=WEIGHTS.log()),
        "positive_pairs, positive_weights": infonce(
            f"{OPTIONS}::test_positive_pairs", positive_pairs=PAIRS, positive_weights=WEIGHTS
        ),
        "queue, queue_ids": infonce(
            f"{OPTIONS}::test_by_ids", queue=lambda z: z, queue_ids=IDS, **BY_ID
        ),
        "hard_negatives": infonce(f"{OPTIONS}::test_by_ids", hard_negatives=lambda z: z[:, None]),
        "false_negative_margin": infonce(
            "test_losses_margin.py::test_both_directions", false_negative_margin=0.1, **BY_ID
        ),
        MARGIN: (
            lambda x, y, z, **where: ik.multi_positive_infonce(
                x, y, SCALE * WEIGHTS, false_negative_margin=0.1, label_smoothing=0.1, **where
            ),
            "test_losses_margin.py::test_what_the_kernels_do_not_sum",
        ),
        "debias": infonce(f"{OPTIONS}::test_by_ids", debias=0.1, **BY_ID),
        "debias per query": infonce(
            f"{OPTIONS}::test_scale_and_prior_per_query", debias=0.1 * WEIGHTS
        ),
        "hardness": infonce(f"{OPTIONS}::test_by_ids", hardness=0.5, **BY_ID),
        "normalize": infonce("test_losses.py::test_normalize", normalize=True),
        'reduction="sum"': infonce("test_losses.py::test_reductions", reduction="sum"),
        'reduction="none"': (
            lambda x, y, z, **where: torch.cat(
                ik.multi_positive_infonce(x, y, SCALE, reduction="none", **where)
            ).mean(),
            "test_losses.py::test_reductions",
        ),
        "return_stats": (
            lambda x, y, z, **where: ik.multi_positive_infonce(
                x, y, SCALE, return_stats=True, **where
            )[0],
            "test_losses.py::test_stats",
        ),
    },
    "clip_loss": {
        "": (
            lambda x, y, z, **where: ik.clip_loss(x, y, SCALE, **where),
            "test_losses.py::test_clip_loss_in_fp32",
        ),
        "query_ids, key_ids": (
            lambda x, y, z, **where: ik.clip_loss(x, y, SCALE, **BY_ID, **where),
            "test_losses.py::test_clip_loss_by_ids",
        ),
    },
    "siglip_loss": {
        "": (
            lambda x, y, z, **where: ik.siglip_loss(x, y, SCALE, -6.0, **where),
            "test_losses.py::test_siglip_default_ids_are_the_diagonal",
        ),
        "image_ids, text_ids": (
            lambda x, y, z, **where: ik.siglip_loss(
                x, y, SCALE, -6.0, image_ids=IDS, text_ids=IDS, **where
            ),
            "test_losses.py::test_siglip_loss",
        ),
        "normalize, reduction": (
            lambda x, y, z, **where: ik.siglip_loss(
                x, y, SCALE, -6.0, normalize=True, reduction="sum", **where
            ),
            "test_losses.py::test_siglip_loss",
        ),
    },
    "supcon_loss": {
        "temperature, empty": (
            lambda x, y, z, **where: ik.supcon_loss(x, IDS, 0.1, empty="drop", **where),
            "test_losses.py::test_supcon_loss",
        ),
        "base_temperature": (
            lambda x, y, z, **where: ik.supcon_loss(x, IDS, 0.1, 0.07, **where),
            "test_losses.py::test_supcon_loss",
        ),
        'positives="in"': (
            lambda x, y, z, **where: ik.supcon_loss(x, IDS, 0.1, positives="in", **where),
            f"{OTHERS}::test_supcon_l_in",
        ),
    },
    "nt_xent_loss": {
        "temperature": (
            lambda x, y, z, **where: ik.nt_xent_loss(x, y, 0.1, **where),
            "test_losses.py::test_nt_xent_loss",
        ),
    },
    "ito_loss": {
        'denominator="pair"': (
            lambda x, y, z, **where: ik.ito_loss(
                torch.stack([x, y]), z, torch.stack([x, y]), SCALE, **where
            )[0],
            "test_losses.py::test_ito_loss_pair",
        ),
        'denominator="pooled", lambda_fusion': (
            lambda x, y, z, **where: ik.ito_loss(
                torch.stack([x, y]),
                z,
                torch.stack([x, y]),
                SCALE,
                lambda_fusion=1.0,
                denominator="pooled",
                **where,
            )[0],
            "test_losses.py::test_ito_loss_pooled",
        ),
    },
    "decoupled_contrastive_loss": {
        "query_ids, key_ids": (
            lambda x, y, z, **where: ik.decoupled_contrastive_loss(x, y, SCALE, **BY_ID, **where),
            f"{OTHERS}::test_decoupled",
        ),
        "symmetric=False": (
            lambda x, y, z, **where: ik.decoupled_contrastive_loss(
                x, y, SCALE, symmetric=False, **where
            ),
            f"{OTHERS}::test_decoupled",
        ),
    },
    "decoupled_softmax_loss": {
        "query_ids, key_ids": (
            lambda x, y, z, **where: ik.decoupled_softmax_loss(x, y, SCALE, **BY_ID, **where),
            f"{OTHERS}::test_decoupled",
        ),
        "symmetric=False": (
            lambda x, y, z, **where: ik.decoupled_softmax_loss(
                x, y, SCALE, symmetric=False, **where
            ),
            f"{OTHERS}::test_decoupled",
        ),
    },
    "mnrl_loss": {
        "scale": (
            lambda x, y, z, **where: ik.mnrl_loss(x, y, scale=SCALE, **where),
            f"{OTHERS}::test_mnrl",
        ),
        "negatives": (
            lambda x, y, z, **where: ik.mnrl_loss(x, y, z, **where),
            f"{OTHERS}::test_mnrl",
        ),
        "normalize=False": (
            lambda x, y, z, **where: ik.mnrl_loss(x, y, z, normalize=False, **where),
            f"{OTHERS}::test_mnrl",
        ),
    },
    "cwcl_loss": {
        "": (
            lambda x, y, z, **where: ik.cwcl_loss(x, y, SCALE, reference=z, **where),
            f"{OTHERS}::test_cwcl",
        ),
        "symmetric": (
            lambda x, y, z, **where: ik.cwcl_loss(
                x, y, SCALE, reference=z, symmetric=True, **where
            ),
            f"{OTHERS}::test_cwcl",
        ),
    },
    "soft_target_infonce": {
        "": (
            lambda x, y, z, **where: ik.soft_target_infonce(
                x, y, SCALE, target_queries=z, target_keys=z, target_scale=8.0, **where
            ),
            f"{OTHERS}::{SOFT}",
        ),
        "alpha, symmetric=False": (
            lambda x, y, z, **where: ik.soft_target_infonce(
                x,
                y,
                SCALE,
                target_queries=z,
                target_keys=z,
                target_scale=8.0,
                alpha=0.4,
                symmetric=False,
                **where,
            ),
            f"{OTHERS}::{SOFT}",
        ),
    },
    "uniformity_loss": {
        "t": (
            lambda x, y, z, **where: ik.uniformity_loss(x, 2.0, **where),
            f"{OTHERS}::test_uniformity",
        ),
    },
    "alignment_loss": {
        "alpha": (
            lambda x, y, z, **where: ik.alignment_loss(x, y, 2.0, **where),
            f"{OTHERS}::test_alignment",
        ),
    },
    "symile_loss": {
        "generator": (
            lambda x, y, z, **where: ik.symile_loss(
                x, y, z, SCALE, torch.Generator().manual_seed(1), **where
            ),
            f"{OTHERS}::test_symile",
        ),
    },
    "one_to_k_loss": {
        "": (
            lambda x, y, z, **where: ik.one_to_k_loss(x, torch.stack([y, z], 1), SCALE, **where),
            f"{MIXED}::test_one_to_k",
        ),
        "symmetric=False": (
            lambda x, y, z, **where: ik.one_to_k_loss(
                x, torch.stack([y, z], 1), SCALE, symmetric=False, **where
            ),
            f"{MIXED}::test_one_to_k",
        ),
    },
    "mixup_infonce": {
        "partners, mixing": (
            lambda x, y, z, **where: ik.mixup_infonce(
                x, y, SCALE, partners=IDS, mixing=0.3, **where
            ),
            f"{MIXED}::test_mixup",
        ),
        "symmetric": (
            lambda x, y, z, **where: ik.mixup_infonce(
                x, y, SCALE, partners=IDS, mixing=WEIGHTS / 2, symmetric=True, **where
            ),
            f"{MIXED}::test_mixup",
        ),
    },
    "cluster_weighted_infonce": {
        "query_ids, key_ids": (
            lambda x, y, z, **where: ik.cluster_weighted_infonce(
                x, y, SCALE, **CLUSTERS, **BY_ID, **where
            ),
            f"{MIXED}::test_cluster_weights",
        ),
        "symmetric=False": (
            lambda x, y, z, **where: ik.cluster_weighted_infonce(
                x, y, SCALE, **CLUSTERS, symmetric=False, **where
            ),
            f"{MIXED}::test_cluster_weights",
        ),
    },
    "cacr_loss": {
        "query_ids, key_ids": (
            lambda x, y, z, **where: ik.cacr_loss(x, y, **BY_ID, **where),
            f"{MIXED}::test_cacr",
        ),
        "t_positive, t_negative": (
            lambda x, y, z, **where: ik.cacr_loss(x, y, t_positive=3.0, t_negative=2.0, **where),
            f"{MIXED}::test_cacr",
        ),
    },
    "matryoshka_loss": {
        "dims, weights, normalize": (
            lambda x, y, z, **where: ik.matryoshka_loss(
                ik.clip_loss, x, y, dims=(4, 8), logit_scale=SCALE, **where
            ),
            f"{MIXED}::test_matryoshka",
        ),
    },
    "multi_head_loss": {
        "logit_scale": (
            lambda x, y, z, **where: ik.multi_head_loss(
                ik.clip_loss, x[None], y[None], logit_scale=torch.tensor([SCALE]), **where
            ),
            f"{MIXED}::test_multi_head",
        ),
    },
}
# tested in test_distributed.py
ELSEWHERE = ("group", "chunk_size")
CASES = [(loss, option) for loss, rows in ROWS.items() for option in rows]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in AVAILABLE])
@pytest.mark.parametrize(("loss", "option"), CASES, ids=[f"{a} {b}" for a, b in CASES])
def test_cell(loss, option, backend):
    call, _ = ROWS[loss][option]
    x, y, z = (normalize(torch.randn(N, D), dim=1) for _ in range(3))

    def value_and_grads(dtype, backend):
        leaves = [v.to(dtype).requires_grad_() for v in (x, y)]
        value = call(*leaves, z.to(dtype), backend=backend)
        return [value, *torch.autograd.grad(value, leaves, materialize_grads=True)]

    ours, truth = (
        value_and_grads(torch.float32, backend),
        value_and_grads(torch.float64, "reference"),
    )
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-6


@pytest.mark.parametrize(("loss", "option"), CASES, ids=[f"{a} {b}" for a, b in CASES])
def test_what_is_not_first_order_reverse_mode_raises(loss, option):
    """Never a silent wrong number; alignment is PyTorch's own arithmetic, which can do it all."""
    if loss == "alignment_loss":
        return
    call, _ = ROWS[loss][option]
    x, y, z = (normalize(torch.randn(N, D), dim=1) for _ in range(3))
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad(call(leaf, y, z), leaf, create_graph=True)
    for transform in (
        lambda f: torch.func.grad(f)(x),
        lambda f: torch.func.jvp(f, (x,), (x,)),
        lambda f: torch.func.vmap(f)(x[None]),
    ):
        with pytest.raises(RuntimeError, match=r"ito_kernels|vmap: called random"):
            transform(lambda x: call(x, y, z))


def test_every_loss_and_every_option_has_a_row():
    public = {name for name in ik.__all__ if name.endswith("_loss") or "infonce" in name}
    assert public == ROWS.keys()
    for loss, rows in ROWS.items():
        named = set(re.findall(r"\w+", " ".join(rows)))
        for name, parameter in inspect.signature(getattr(ik, loss)).parameters.items():
            if parameter.default is inspect.Parameter.empty or name in (*ELSEWHERE, "backend"):
                continue
            assert name in named, f"{loss}: no row for {name}"


def test_every_row_names_a_test():
    for rows in ROWS.values():
        for _, test in rows.values():
            file, name = test.split("::")
            assert f"def {name}(" in (Path(__file__).parent / file).read_text()


def test_the_table_is_current():
    assert table() in FILE.read_text(), "run python tests/test_losses_table.py"


def table() -> str:
    lines = [
        "| loss | option | " + " | ".join(BACKENDS) + " | formula tested by |",
        "|---|---|" + "---|" * len(BACKENDS) + "---|",
    ]
    for loss, rows in ROWS.items():
        summary = inspect.getdoc(getattr(ik, loss)).splitlines()[0]
        lines.append(f"| **`{loss}`** | {summary} |" + " |" * (len(BACKENDS) + 1))
        for name, (_, test) in rows.items():
            option = f"`{name}`" if name else "default"
            lines.append(f"| | {option} |" + " ✓ |" * len(BACKENDS) + f" `{test}` |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", [n for n in ik.__all__ if inspect.isfunction(getattr(ik, n))])
def test_every_argument_is_documented(name):
    """In the docstring, or in that of the function to which it sends for its arguments."""
    about = inspect.getdoc(getattr(ik, name))
    for other in re.findall(r"Arguments\b[^.]*?\bas in\s+`(\w+)`", about):
        about += inspect.getdoc(getattr(ik, other))
    missing = [
        parameter
        for parameter in inspect.signature(getattr(ik, name)).parameters
        if not re.search(rf"\b{parameter}\b", about)
    ]
    assert not missing


if __name__ == "__main__":
    start, end = "| loss | option |", "\n\n## One line to switch"
    page = FILE.read_text()
    FILE.write_text(page[: page.index(start)] + table() + page[page.index(end) + 1 :])
