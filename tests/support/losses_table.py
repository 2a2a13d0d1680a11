"""Every loss with every option, as calls that many tests make, and the table of docs/losses.md.

tests/losses/test_table.py compares each call on each backend with the reference in fp64, and each
names the test that compares the reference with the formula. tests/losses/test_linear_memory.py
measures the memory of each, and tests/distributed/test_global_batch.py compares the first call of
each loss on several ranks with one process. `python tests/support/losses_table.py` writes the table
of the page.
"""

import inspect
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import ito_kernels as ik

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
BACKENDS = ("reference", "chunked", "cpu", "triton")
SCALE = 12.0


class Inputs(NamedTuple):
    """Features of (N, D) with D ≥ 5, of which z may be no unit vectors. rows: their numbers among
    the `total` rows of all ranks."""

    x: Tensor
    y: Tensor
    z: Tensor
    rows: Tensor
    total: int
    scale: float | Tensor = SCALE

    @classmethod
    def of(cls, x: Tensor, y: Tensor, z: Tensor) -> "Inputs":
        return cls(x, y, z, torch.arange(len(x)), len(x))


class Made(NamedTuple):
    """An argument that is made of the inputs."""

    of: Callable[[Inputs], object]


X, Y, Z = (Made(lambda at, i=i: at[i]) for i in range(3))
XYZ = Made(lambda at: [at.x, at.y, at.z])
ONE_VIEW = Made(lambda at: at.x[None])
XY = Made(lambda at: torch.stack([at.x, at.y]))
SCALES = Made(lambda at: at.scale)
SCALE_PER_ROW = Made(lambda at: at.scale * row_weights(at))
TEMPERATURE = Made(lambda at: 1 / at.scale)
SEEDED = Made(lambda at: torch.Generator().manual_seed(1))
IDS = Made(lambda at: at.rows // 2)
BY_ID = {"query_ids": IDS, "key_ids": IDS}
WEIGHTS = Made(lambda at: row_weights(at))
PAIRS = Made(lambda at: torch.stack([at.rows, (at.rows * 5) % at.total], 1))
PRIORS = Made(lambda at: 0.1 * row_weights(at))
SHARES = Made(lambda at: row_weights(at) / 2)
PADDED = Made(lambda at: at.rows // 2 - 3)
SETS = Made(lambda at: torch.stack([at.rows // 2, at.rows // 3]))
QUEUE = {
    "queue": Made(lambda at: torch.linspace(-1, 1, 7 * at.z.shape[1]).view(7, -1).to(at.z.dtype)),
    "queue_ids": torch.arange(7),
}
CLUSTERS = {
    "query_clusters": Made(lambda at: at.rows % 3),
    "key_clusters": Made(lambda at: at.rows % 3),
    "weights": torch.tensor([[0.5, 2.0, 1.0], [1.0, 0.7, 3.0], [0.2, 1.5, 1.0]]),
}


def row_weights(at: Inputs) -> Tensor:
    """In fp32, or in fp64 with fp64 features."""
    return 0.5 + (at.rows % 8).to(torch.promote_types(at.x.dtype, torch.float32)) / 8


class Row(NamedTuple):
    test: str  # in tests/losses/
    args: tuple
    options: dict
    value: Callable  # of what the loss returns

    def arguments(self, inputs: Inputs) -> tuple[list, dict]:
        def made(given):
            return given.of(inputs) if isinstance(given, Made) else given

        options = {name: made(given) for name, given in self.options.items()}
        return list(map(made, self.args)), options

    def call(self, loss: str, inputs: Inputs, **where) -> Tensor:
        args, options = self.arguments(inputs)
        return self.value(getattr(ik, loss)(*args, **options, **where))


def row(test: str, *args, value=lambda found: found, **options) -> Row:
    return Row(test, args, options, value)


def pair(test: str, *args, **options) -> Row:
    return row(test, X, Y, *args, **options)


def infonce(test: str, scale=SCALES, **options) -> Row:
    return pair(test, scale, **options)


def global_contrastive(temperature: Made, **options) -> Row:
    test, averages = "test_global_contrastive.py::test_formula", (WEIGHTS, SHARES)
    value = itemgetter(0)
    return pair(test, temperature, *averages, gamma=0.6, value=value, **options)


def ranking(scale=SCALES, **options) -> Row:
    return pair("test_retrieval.py::test_directions", Z, scale=scale, **options)


def ito(views: Made = XY, text: Made = Z, **options) -> Row:
    test = "test_equal_captions.py::test_formula"
    return row(test, views, text, XY, SCALES, value=lambda found: found[0], **options)


ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
FORMULA, OPTION = "test_formulas.py::test_", "test_options.py::test_"
OTHER, MIXED = "test_others.py::test_", "test_mixed.py::test_"
MARGIN, SIGLIP = "test_margin.py::test_", "test_siglip.py::test_"
RINCE, SYMILE = "test_rince.py::test_", "test_symile.py::test_"

# {loss: {the options of the call, in words: the call}}. Every option of a loss must be named.
ROWS = {
    "multi_positive_infonce": {
        "logit_scale for all": infonce(f"{FORMULA}clip_loss_in_fp32"),
        "logit_scale per query": infonce(f"{FORMULA}scale_per_row", SCALE_PER_ROW),
        'query_ids, key_ids, positives="mean"': infonce(
            f"{FORMULA}multi_positive_infonce", **BY_ID
        ),
        'positives="in"': infonce(f"{FORMULA}multi_positive_infonce", positives="in", **BY_ID),
        'positives="sum"': infonce(f"{FORMULA}multi_positive_infonce", positives="sum", **BY_ID),
        "symmetric=False": infonce(f"{FORMULA}multi_positive_infonce", symmetric=False),
        "exclude_self": infonce(f"{FORMULA}exclude_self", exclude_self=True, **BY_ID),
        'empty="drop"': infonce(
            f"{FORMULA}multi_positive_infonce",
            empty="drop",
            query_ids=PADDED,
        ),
        "label_smoothing": infonce(f"{OPTION}by_ids", label_smoothing=0.1),
        "query_weights, key_weights": infonce(
            f"{OPTION}by_ids", query_weights=WEIGHTS, key_weights=WEIGHTS, **BY_ID
        ),
        "key_bias": infonce(f"{OPTION}by_ids", key_bias=Made(lambda at: row_weights(at).log())),
        "positive_pairs, positive_weights": infonce(
            f"{OPTION}positive_pairs", positive_pairs=PAIRS, positive_weights=WEIGHTS
        ),
        "queue, queue_ids": infonce(f"{OPTION}by_ids", **QUEUE, **BY_ID),
        "in_batch=False": infonce(
            f"{OPTION}in_batch", in_batch=False, symmetric=False, **QUEUE, **BY_ID
        ),
        "hard_negatives": infonce(f"{OPTION}by_ids", hard_negatives=Made(lambda at: at.z[:, None])),
        "hard_negative_ids": infonce(
            f"{OPTION}by_ids",
            hard_negatives=Made(lambda at: at.z[:, None]),
            hard_negative_ids=Made(lambda at: at.rows[:, None] % 5 - 1),
        ),
        "false_negative_margin": infonce(
            f"{MARGIN}both_directions", false_negative_margin=0.1, **BY_ID
        ),
        'margin_on="in_batch"': infonce(
            f"{MARGIN}queue_and_hard_negatives",
            false_negative_margin=0.1,
            margin_on="in_batch",
            **QUEUE,
            **BY_ID,
        ),
        'margin_type="relative"': infonce(
            f"{MARGIN}both_directions", false_negative_margin=0.3, margin_type="relative", **BY_ID
        ),
        "false_negative_margin, label_smoothing, logit_scale per query": infonce(
            f"{MARGIN}what_the_kernels_do_not_sum",
            SCALE_PER_ROW,
            false_negative_margin=0.1,
            label_smoothing=0.1,
        ),
        "guide_queries, guide_keys": infonce(
            f"{MARGIN}guide",
            false_negative_margin=0.1,
            guide_queries=Made(lambda at: at.z[:, :4]),
            guide_keys=Made(lambda at: at.z.roll(1, 0)[:, :4]),
            **BY_ID,
        ),
        'equal_ids="ignore"': infonce(
            f"{OPTION}equal_ids_are_ignored", equal_ids="ignore", **BY_ID
        ),
        'equal_ids="ignore", label_smoothing': infonce(
            f"{OPTION}equal_ids_are_ignored", equal_ids="ignore", label_smoothing=0.1, **BY_ID
        ),
        "hardness_mode, hardness_strength": infonce(
            f"{OPTION}hardness_mode",
            hardness_mode="all",
            hardness_strength=5.0,
            hard_negatives=Made(lambda at: at.z[:, None]),
            **QUEUE,
            **BY_ID,
        ),
        "hardness_mode, logit_scale per query": infonce(
            f"{OPTION}hardness_mode",
            SCALE_PER_ROW,
            hardness_mode="in_batch",
            hardness_strength=5.0,
            **BY_ID,
        ),
        "debias": infonce(f"{OPTION}by_ids", debias=0.1, **BY_ID),
        "debias per query": infonce(f"{OPTION}scale_and_prior_per_query", debias=PRIORS),
        "hardness": infonce(f"{OPTION}by_ids", hardness=0.5, **BY_ID),
        "normalize": infonce(f"{FORMULA}normalize", normalize=True),
        'reduction="sum"': infonce(f"{FORMULA}reductions", reduction="sum"),
        'reduction="none"': infonce(
            f"{FORMULA}reductions", reduction="none", value=lambda found: torch.cat(found).mean()
        ),
        "return_stats": infonce(f"{FORMULA}stats", return_stats=True, value=lambda found: found[0]),
    },
    "clip_loss": {
        "": infonce(f"{FORMULA}clip_loss_in_fp32"),
        "query_ids, key_ids": infonce(f"{FORMULA}clip_loss_by_ids", **BY_ID),
    },
    "siglip_loss": {
        "": pair(f"{FORMULA}siglip_default_ids_are_the_diagonal", SCALES, -6.0),
        "image_ids, text_ids": pair(
            f"{FORMULA}siglip_loss", SCALES, -6.0, image_ids=IDS, text_ids=IDS
        ),
        "normalize, reduction": pair(
            f"{FORMULA}siglip_loss", SCALES, -6.0, normalize=True, reduction="sum"
        ),
        "logit_bias=None": pair(f"{SIGLIP}no_bias", SCALES),
        "positive_pairs, positive_weights": pair(
            f"{SIGLIP}pairs", SCALES, -6.0, positive_pairs=PAIRS, positive_weights=WEIGHTS
        ),
        "image_weights": pair(
            f"{SIGLIP}ids", SCALES, -6.0, image_weights=WEIGHTS, image_ids=IDS, text_ids=IDS
        ),
        "image_weights, text_weights": pair(
            f"{SIGLIP}ids",
            SCALE_PER_ROW,
            -6.0,
            image_weights=WEIGHTS,
            text_weights=WEIGHTS,
            image_ids=IDS,
            text_ids=PADDED,
        ),
    },
    "supcon_loss": {
        "temperature, empty": row(f"{FORMULA}supcon_loss", X, IDS, TEMPERATURE, empty="drop"),
        "base_temperature": row(f"{FORMULA}supcon_loss", X, IDS, TEMPERATURE, 0.07),
        'positives="in"': row(f"{OTHER}supcon_l_in", X, IDS, TEMPERATURE, positives="in"),
    },
    "nt_xent_loss": {"temperature": pair(f"{FORMULA}nt_xent_loss", TEMPERATURE)},
    "ito_loss": {
        'denominator="pair"': row(
            f"{FORMULA}ito_loss_pair", XY, Z, XY, SCALES, value=lambda found: found[0]
        ),
        'denominator="pooled", lambda_fusion': row(
            f"{FORMULA}ito_loss_pooled",
            *(XY, Z, XY, SCALES),
            lambda_fusion=1.0,
            denominator="pooled",
            value=lambda found: found[0],
        ),
        "caption_ids": ito(caption_ids=IDS),
        'caption_ids, equal_ids="ignore", fusion_scale': ito(
            caption_ids=IDS, equal_ids="ignore", fusion_scale=5.0
        ),
        'caption_ids, fused_ids, denominator="pooled"': ito(
            ONE_VIEW, XY, denominator="pooled", caption_ids=SETS, fused_ids=PADDED
        ),
        'caption_ids, equal_ids="ignore", denominator="pooled"': ito(
            denominator="pooled", equal_ids="ignore", caption_ids=IDS
        ),
        'caption_ids, fused_ids, equal_ids="ignore", denominator="pooled"': ito(
            ONE_VIEW,
            XY,
            denominator="pooled",
            equal_ids="ignore",
            caption_ids=SETS,
            fused_ids=PADDED,
        ),
    },
    "decoupled_contrastive_loss": {
        "query_ids, key_ids": infonce(f"{OTHER}decoupled", **BY_ID),
        "symmetric=False": infonce(f"{OTHER}decoupled", symmetric=False),
        "exclude_self": infonce(f"{OTHER}decoupled_without_self", exclude_self=True, **BY_ID),
    },
    "decoupled_softmax_loss": {
        "query_ids, key_ids": infonce(f"{OTHER}decoupled", **BY_ID),
        "symmetric=False": infonce(f"{OTHER}decoupled", symmetric=False),
        "exclude_self": infonce(f"{OTHER}decoupled_without_self", exclude_self=True, **BY_ID),
        "positive_pairs, positive_weights": infonce(
            f"{OTHER}decoupled_pairs",
            symmetric=False,
            positive_pairs=PAIRS,
            positive_weights=WEIGHTS,
        ),
    },
    "mnrl_loss": {
        "scale": pair(f"{OTHER}mnrl", scale=SCALES),
        "negatives": pair(f"{OTHER}mnrl", Z),
        "normalize=False": pair(f"{OTHER}mnrl", Z, normalize=False),
        "directions": ranking(directions=ALL_DIRECTIONS),
        'directions, partition_mode="per_direction"': ranking(
            directions=ALL_DIRECTIONS[::2], partition_mode="per_direction"
        ),
        'hardness_mode="in_batch", hardness_strength': ranking(
            hardness_mode="in_batch", hardness_strength=5.0
        ),
        'hardness_mode="hard"': ranking(hardness_mode="hard", hardness_strength=5.0),
        'hardness_mode="all"': ranking(hardness_mode="all", hardness_strength=5.0),
        "hardness_mode, scale per query": ranking(
            scale=SCALE_PER_ROW, hardness_mode="in_batch", hardness_strength=5.0
        ),
        "margin": ranking(margin=0.1, directions=ALL_DIRECTIONS),
        'margin, margin_strategy="relative"': ranking(margin=0.3, margin_strategy="relative"),
        "guide": ranking(
            guide=Made(lambda at: (at.z, at.y, at.x)), margin=-0.1, directions=ALL_DIRECTIONS
        ),
    },
    "cwcl_loss": {
        "": infonce(f"{OTHER}cwcl", reference=Z),
        "symmetric": infonce(f"{OTHER}cwcl", reference=Z, symmetric=True),
        'symmetric="infonce"': infonce(f"{OTHER}cwcl", reference=Z, symmetric="infonce"),
    },
    "soft_target_infonce": {
        "": infonce(f"{OTHER}soft_targets", target_queries=Z, target_keys=Z, target_scale=6.0),
        "alpha, symmetric=False": infonce(
            f"{OTHER}soft_targets",
            target_queries=Z,
            target_keys=Z,
            target_scale=6.0,
            alpha=0.4,
            symmetric=False,
        ),
        "alpha, more keys": row(
            f"{OTHER}soft_targets",
            *(X, Made(lambda at: torch.cat([at.y, at.z])), SCALES),
            target_queries=Z,
            target_keys=Made(lambda at: torch.cat([at.z, at.y.detach()])),
            target_scale=6.0,
            alpha=0.4,
        ),
    },
    "uniformity_loss": {
        "t": row(f"{OTHER}uniformity", X, t=2.0),
        "y": pair(f"{OTHER}uniformity", t=2.0),
    },
    "alignment_loss": {"alpha": pair(f"{OTHER}alignment", 2.0)},
    "spectral_contrastive_loss": {"": pair(f"{OTHER}spectral")},
    "orthogonality_loss": {
        "y": pair(f"{OTHER}orthogonality"),
        "one tower": row(f"{OTHER}orthogonality", X),
    },
    "global_contrastive_loss": {
        "temperature, eps": global_contrastive(TEMPERATURE, eps=1e-3),
        "temperature for each row, rho": global_contrastive(
            Made(lambda at: (1 / at.scale * row_weights(at), 2 / at.scale * row_weights(at))),
            rho=6.5,
        ),
    },
    "rince_loss": {
        "": infonce(f"{RINCE}formula", q=0.3, lam=0.1),
        "symmetric=False": infonce(f"{RINCE}formula", q=1.0, lam=0.5, symmetric=False),
    },
    "symile_loss": {
        "generator": row(f"{SYMILE}shuffled", XYZ, SCALES, generator=SEEDED),
        "negatives": row(f"{SYMILE}all", XYZ, SCALES, negatives="all"),
    },
    "one_to_k_loss": {
        "": row(f"{MIXED}one_to_k", X, Made(lambda at: torch.stack([at.y, at.z], 1)), SCALES),
        "symmetric=False": row(
            f"{MIXED}one_to_k",
            *(X, Made(lambda at: torch.stack([at.y, at.z], 1)), SCALES),
            symmetric=False,
        ),
    },
    "mixup_infonce": {
        "partners, mixing": infonce(f"{MIXED}mixup", partners=IDS, mixing=0.3),
        "symmetric": infonce(
            f"{MIXED}mixup",
            partners=IDS,
            mixing=SHARES,
            symmetric=True,
        ),
        'key_targets="sum"': infonce(
            f"{MIXED}mixup", partners=IDS, mixing=SHARES, symmetric=True, key_targets="sum"
        ),
    },
    "cluster_weighted_infonce": {
        "query_ids, key_ids": infonce(f"{MIXED}cluster_weights", **CLUSTERS, **BY_ID),
        "symmetric=False": infonce(f"{MIXED}cluster_weights", **CLUSTERS, symmetric=False),
        "include_positives=False": infonce(
            f"{MIXED}cluster_weights", **CLUSTERS, **BY_ID, include_positives=False
        ),
    },
    "cacr_loss": {
        "query_ids, key_ids": pair(f"{MIXED}cacr", **BY_ID),
        "t_positive, t_negative": pair(f"{MIXED}cacr", t_positive=3.0, t_negative=2.0),
        "exclude_self": pair(f"{MIXED}cacr_without_self", exclude_self=True, **BY_ID),
    },
    "matryoshka_loss": {
        "dims, weights, normalize": row(
            f"{MIXED}matryoshka", ik.clip_loss, X, Y, dims=(2, 4), logit_scale=SCALES
        )
    },
    "multi_head_loss": {
        "logit_scale": row(
            f"{MIXED}multi_head",
            *(ik.clip_loss, Made(lambda at: at.x[None]), Made(lambda at: at.y[None])),
            logit_scale=Made(lambda at: torch.as_tensor(at.scale).reshape(1)),
        )
    },
}
WITHOUT_KERNELS = {"alignment_loss", "spectral_contrastive_loss", "orthogonality_loss"}
START = "| loss | what it is | " + " | ".join(BACKENDS) + " |"


def table() -> str:
    lines = [START, "|---|---|" + "---|" * len(BACKENDS)]
    for loss in ROWS:
        summary = inspect.getdoc(getattr(ik, loss)).splitlines()[0]
        lines.append(f"| `{loss}` | {summary} |" + " ✓ |" * len(BACKENDS))
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + table() + rest[rest.index("\n\n") + 1 :]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
