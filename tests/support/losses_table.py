"""The table of docs/losses.md: every loss with every option. What follows it is not made here.

`python tests/support/losses_table.py` writes the table. A row is a call; for each backend its value
and gradients in fp32 are compared with the reference in fp64, and it names the test that compares
the reference with the formula. tests/losses/test_table.py does so.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import ito_kernels as ik

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
BACKENDS = ("reference", "chunked", "cpu", "triton")
N, D = 24, 8
SCALE = 12.0
IDS = torch.arange(N) // 2
BY_ID = {"query_ids": IDS, "key_ids": IDS}
WEIGHTS = torch.linspace(0.5, 2, N)
PAIRS = torch.stack([torch.arange(N), (torch.arange(N) * 5) % N], 1)
CLUSTERS = {
    "query_clusters": torch.arange(N) % 3,
    "key_clusters": torch.arange(N) % 3,
    "weights": torch.tensor([[0.5, 2.0, 1.0], [1.0, 0.7, 3.0], [0.2, 1.5, 1.0]]),
}


class Made(NamedTuple):
    """An argument that is made of the features: three of (N, D)."""

    of: Callable


X, Y, Z = (Made(lambda *features, i=i: features[i]) for i in range(3))
XY = Made(lambda x, y, z: torch.stack([x, y]))


class Row(NamedTuple):
    test: str  # in tests/losses/
    args: tuple
    options: dict
    value: Callable  # of what the loss returns

    def call(self, loss: str, x, y, z, **where):
        def made(given):
            return given.of(x, y, z) if isinstance(given, Made) else given

        options = {name: made(given) for name, given in self.options.items()}
        return self.value(getattr(ik, loss)(*map(made, self.args), **options, **where))


def row(test: str, *args, value=lambda found: found, **options) -> Row:
    return Row(test, args, options, value)


def pair(test: str, *args, **options) -> Row:
    return row(test, X, Y, *args, **options)


def infonce(test: str, scale=SCALE, **options) -> Row:
    return pair(test, scale, **options)


FORMULA, OPTION = "test_formulas.py::test_", "test_options.py::test_"
OTHER, MIXED = "test_others.py::test_", "test_mixed.py::test_"
MARGIN = "test_margin.py::test_"

# {loss: {what stands in the table: the row}}
ROWS = {
    "multi_positive_infonce": {
        "logit_scale for all": infonce(f"{FORMULA}clip_loss_in_fp32"),
        "logit_scale per query": infonce(f"{FORMULA}scale_per_row", SCALE * WEIGHTS),
        'query_ids, key_ids, positives="mean"': infonce(
            f"{FORMULA}multi_positive_infonce", **BY_ID
        ),
        'positives="in"': infonce(f"{FORMULA}multi_positive_infonce", positives="in", **BY_ID),
        'positives="sum"': infonce(f"{FORMULA}multi_positive_infonce", positives="sum", **BY_ID),
        "symmetric=False": infonce(f"{FORMULA}multi_positive_infonce", symmetric=False),
        "exclude_self": infonce(f"{FORMULA}exclude_self", exclude_self=True, **BY_ID),
        'empty="drop"': infonce(
            f"{FORMULA}multi_positive_infonce", empty="drop", query_ids=IDS - 3
        ),
        "label_smoothing": infonce(f"{OPTION}by_ids", label_smoothing=0.1),
        "query_weights, key_weights": infonce(
            f"{OPTION}by_ids", query_weights=WEIGHTS, key_weights=WEIGHTS, **BY_ID
        ),
        "key_bias": infonce(f"{OPTION}by_ids", key_bias=WEIGHTS.log()),
        "positive_pairs, positive_weights": infonce(
            f"{OPTION}positive_pairs", positive_pairs=PAIRS, positive_weights=WEIGHTS
        ),
        "queue, queue_ids": infonce(f"{OPTION}by_ids", queue=Z, queue_ids=IDS, **BY_ID),
        "hard_negatives": infonce(
            f"{OPTION}by_ids", hard_negatives=Made(lambda x, y, z: z[:, None])
        ),
        "false_negative_margin": infonce(
            f"{MARGIN}both_directions", false_negative_margin=0.1, **BY_ID
        ),
        "false_negative_margin, label_smoothing, logit_scale per query": infonce(
            f"{MARGIN}what_the_kernels_do_not_sum",
            SCALE * WEIGHTS,
            false_negative_margin=0.1,
            label_smoothing=0.1,
        ),
        "debias": infonce(f"{OPTION}by_ids", debias=0.1, **BY_ID),
        "debias per query": infonce(f"{OPTION}scale_and_prior_per_query", debias=0.1 * WEIGHTS),
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
        "": pair(f"{FORMULA}siglip_default_ids_are_the_diagonal", SCALE, -6.0),
        "image_ids, text_ids": pair(
            f"{FORMULA}siglip_loss", SCALE, -6.0, image_ids=IDS, text_ids=IDS
        ),
        "normalize, reduction": pair(
            f"{FORMULA}siglip_loss", SCALE, -6.0, normalize=True, reduction="sum"
        ),
    },
    "supcon_loss": {
        "temperature, empty": row(f"{FORMULA}supcon_loss", X, IDS, 0.1, empty="drop"),
        "base_temperature": row(f"{FORMULA}supcon_loss", X, IDS, 0.1, 0.07),
        'positives="in"': row(f"{OTHER}supcon_l_in", X, IDS, 0.1, positives="in"),
    },
    "nt_xent_loss": {"temperature": pair(f"{FORMULA}nt_xent_loss", 0.1)},
    "ito_loss": {
        'denominator="pair"': row(
            f"{FORMULA}ito_loss_pair", XY, Z, XY, SCALE, value=lambda found: found[0]
        ),
        'denominator="pooled", lambda_fusion': row(
            f"{FORMULA}ito_loss_pooled",
            *(XY, Z, XY, SCALE),
            lambda_fusion=1.0,
            denominator="pooled",
            value=lambda found: found[0],
        ),
    },
    "decoupled_contrastive_loss": {
        "query_ids, key_ids": infonce(f"{OTHER}decoupled", **BY_ID),
        "symmetric=False": infonce(f"{OTHER}decoupled", symmetric=False),
    },
    "decoupled_softmax_loss": {
        "query_ids, key_ids": infonce(f"{OTHER}decoupled", **BY_ID),
        "symmetric=False": infonce(f"{OTHER}decoupled", symmetric=False),
    },
    "mnrl_loss": {
        "scale": pair(f"{OTHER}mnrl", scale=SCALE),
        "negatives": pair(f"{OTHER}mnrl", Z),
        "normalize=False": pair(f"{OTHER}mnrl", Z, normalize=False),
    },
    "cwcl_loss": {
        "": infonce(f"{OTHER}cwcl", reference=Z),
        "symmetric": infonce(f"{OTHER}cwcl", reference=Z, symmetric=True),
    },
    "soft_target_infonce": {
        "": infonce(f"{OTHER}soft_targets", target_queries=Z, target_keys=Z, target_scale=8.0),
        "alpha, symmetric=False": infonce(
            f"{OTHER}soft_targets",
            target_queries=Z,
            target_keys=Z,
            target_scale=8.0,
            alpha=0.4,
            symmetric=False,
        ),
    },
    "uniformity_loss": {"t": row(f"{OTHER}uniformity", X, 2.0)},
    "alignment_loss": {"alpha": pair(f"{OTHER}alignment", 2.0)},
    "symile_loss": {
        "generator": pair(
            f"{OTHER}symile", Z, SCALE, Made(lambda *_: torch.Generator().manual_seed(1))
        )
    },
    "one_to_k_loss": {
        "": row(f"{MIXED}one_to_k", X, Made(lambda x, y, z: torch.stack([y, z], 1)), SCALE),
        "symmetric=False": row(
            f"{MIXED}one_to_k",
            *(X, Made(lambda x, y, z: torch.stack([y, z], 1)), SCALE),
            symmetric=False,
        ),
    },
    "mixup_infonce": {
        "partners, mixing": infonce(f"{MIXED}mixup", partners=IDS, mixing=0.3),
        "symmetric": infonce(f"{MIXED}mixup", partners=IDS, mixing=WEIGHTS / 2, symmetric=True),
    },
    "cluster_weighted_infonce": {
        "query_ids, key_ids": infonce(f"{MIXED}cluster_weights", **CLUSTERS, **BY_ID),
        "symmetric=False": infonce(f"{MIXED}cluster_weights", **CLUSTERS, symmetric=False),
    },
    "cacr_loss": {
        "query_ids, key_ids": pair(f"{MIXED}cacr", **BY_ID),
        "t_positive, t_negative": pair(f"{MIXED}cacr", t_positive=3.0, t_negative=2.0),
    },
    "matryoshka_loss": {
        "dims, weights, normalize": row(
            f"{MIXED}matryoshka", ik.clip_loss, X, Y, dims=(4, 8), logit_scale=SCALE
        )
    },
    "multi_head_loss": {
        "logit_scale": row(
            f"{MIXED}multi_head",
            *(ik.clip_loss, Made(lambda x, y, z: x[None]), Made(lambda x, y, z: y[None])),
            logit_scale=torch.tensor([SCALE]),
        )
    },
}
START = "| loss | option | " + " | ".join(BACKENDS) + " | formula tested by |"


def table() -> str:
    lines = [START, "|---|---|" + "---|" * len(BACKENDS) + "---|"]
    for loss, rows in ROWS.items():
        summary = inspect.getdoc(getattr(ik, loss)).splitlines()[0]
        lines.append(f"| **`{loss}`** | {summary} |" + " |" * (len(BACKENDS) + 1))
        for name, row in rows.items():
            option = f"`{name}`" if name else "default"
            lines.append(f"| | {option} |" + " ✓ |" * len(BACKENDS) + f" `{row.test}` |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + table() + rest[rest.index("\n\n") + 1 :]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
