"""Every option of `multi_positive_infonce` with its values, what cannot be combined, and the
arguments of a combination."""

import torch
from torch.nn.functional import normalize

F64 = torch.float64
N, M, D = 7, 9, 5
GIVEN = "given"
# {option: its values, the default first}. GIVEN and other words stand for tensors, see `arguments`.
OPTIONS = {
    # no options by themselves: the shapes of what is always given
    "keys": ("as many", "more", "the queries"),
    "logit_scale": ("0-d", "per query"),
    # of the signature
    "query_ids": (None, GIVEN, "padded"),
    "key_ids": (None, GIVEN, "padded"),
    "positives": ("mean", "in", "sum"),
    "symmetric": (True, False),
    "exclude_self": (False, True),
    "empty": ("zero", "drop"),
    "in_batch": (True, False),
    "equal_ids": ("positive", "ignore"),
    "label_smoothing": (0.0, 0.2),
    "query_weights": (None, GIVEN),
    "key_weights": (None, GIVEN),
    "key_bias": (None, GIVEN),
    "positive_pairs": (None, GIVEN, "listed twice"),
    "positive_weights": (None, GIVEN, "some 0"),
    "queue": (None, GIVEN),
    "queue_ids": (None, GIVEN),
    "hard_negatives": (None, GIVEN),
    "hard_negative_ids": (None, GIVEN),
    "false_negative_margin": (None, 0.1, -0.1),
    "margin_type": ("absolute", "relative"),
    "margin_on": ("all", "in_batch"),
    "guide_queries": (None, GIVEN),
    "guide_keys": (None, GIVEN),
    "debias": (None, 0.1, 0.9, "per query"),
    "hardness": (None, 0.7),
    "hardness_mode": (None, "in_batch", "hard", "all_negatives"),
    "hardness_strength": (0.0, 3.0),
    "normalize": (False, True),
    "reduction": ("mean", "sum", "none"),
    "return_stats": (False, True),
    "chunk_size": (None, 3),  # nothing without a group
}
PAIRS, MODES = (GIVEN, "listed twice"), ("in_batch", "hard", "all_negatives")
MARGINS, IDS, LISTED_WEIGHTS = (0.1, -0.1), (GIVEN, "padded"), (GIVEN, "some 0")
PRIORS = (0.1, 0.9, "per query")
# what raises: a combination, and the option that its error names
REFUSED = [
    ({"keys": "more", "query_ids": None, "positive_pairs": None}, "query_ids"),
    ({"keys": "more", "key_ids": None, "positive_pairs": None}, "key_ids"),
    ({"keys": "more", "exclude_self": True}, "exclude_self"),
    ({"keys": "more", "equal_ids": "ignore"}, "equal_ids"),
    ({"keys": "more", "debias": "per query", "symmetric": True}, "debias"),
    ({"logit_scale": "per query", "debias": PRIORS, "symmetric": True}, "debias"),
    ({"query_ids": IDS, "positive_pairs": PAIRS}, "positive_pairs"),
    ({"key_ids": IDS, "positive_pairs": PAIRS}, "positive_pairs"),
    ({"positives": "sum", "positive_weights": LISTED_WEIGHTS}, "positive_weights"),
    ({"symmetric": False, "key_weights": GIVEN}, "key_weights"),
    ({"symmetric": True, "in_batch": False}, "in_batch"),
    ({"exclude_self": True, "equal_ids": "ignore"}, "exclude_self"),
    ({"in_batch": False, "queue": None, "hard_negatives": None}, "in_batch"),
    ({"in_batch": False, "margin_on": "in_batch"}, "margin_on"),
    ({"in_batch": False, "guide_queries": GIVEN, "guide_keys": GIVEN}, "guide_queries"),
    ({"in_batch": False, "hardness_mode": "in_batch"}, "hardness_mode"),
    ({"equal_ids": "ignore", "positive_pairs": PAIRS}, "positive_pairs"),
    ({"label_smoothing": 0.2, "debias": PRIORS}, "label_smoothing"),
    ({"label_smoothing": 0.2, "hardness": 0.7}, "label_smoothing"),
    ({"label_smoothing": 0.2, "hardness_mode": MODES}, "label_smoothing"),
    ({"positive_pairs": None, "positive_weights": LISTED_WEIGHTS}, "positive_weights"),
    ({"positive_pairs": PAIRS, "queue_ids": GIVEN}, "queue_ids"),
    ({"positive_pairs": PAIRS, "hard_negative_ids": GIVEN}, "hard_negative_ids"),
    ({"queue": None, "queue_ids": GIVEN}, "queue_ids"),
    ({"hard_negatives": None, "hard_negative_ids": GIVEN}, "hard_negative_ids"),
    ({"hard_negatives": None, "hardness_mode": "hard"}, "hardness_mode"),
    ({"false_negative_margin": None, "margin_type": "relative"}, "margin_type"),
    ({"false_negative_margin": None, "margin_on": "in_batch"}, "margin_on"),
    ({"false_negative_margin": None, "guide_queries": GIVEN, "guide_keys": GIVEN}, "guide_queries"),
    ({"guide_queries": GIVEN, "guide_keys": None}, "guide_keys"),
    ({"guide_queries": None, "guide_keys": GIVEN}, "guide_queries"),
    ({"debias": PRIORS, "hardness_mode": MODES}, "debias"),
    ({"hardness": 0.7, "hardness_mode": MODES}, "hardness"),
    ({"hardness_mode": None, "hardness_strength": 3.0}, "hardness_strength"),
]
RULES = [entry for entry, _ in REFUSED]


FEATURES = ("queries", "keys", "queue", "hard_negatives", "guide_queries", "guide_keys")
WITH_GRADIENT = ("queries", "keys", "logit_scale", "key_bias", "hard_negatives")
STAND_FOR_TENSORS = (GIVEN, "padded", "listed twice", "some 0", "per query")


def arguments(chosen: dict, seed: int = 0) -> dict:
    """The arguments of a combination, in fp64. What is padding holds NaN."""
    g = torch.Generator().manual_seed(seed)
    n, m = N, M if chosen["keys"] == "more" else N

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=F64)

    def features(*shape):
        x = rand(*shape) - 0.5
        return 3 * x if chosen["normalize"] else normalize(x, dim=-1)

    def ids(kind, size):
        found = torch.randint(0, 4, (size,), generator=g)
        return found.masked_fill(rand(size) < 0.3, -1) if kind == "padded" else found

    pairs = torch.stack([torch.randint(0, x, (12,), generator=g) for x in (n, m)], 1)
    pairs = pairs.unique(dim=0) if chosen["positive_pairs"] == GIVEN else pairs
    weights = 0.5 + rand(len(pairs))
    if chosen["positive_weights"] == "some 0":
        weights[::3] = 0
    tensors = {
        "query_ids": ids(chosen["query_ids"], n),
        "key_ids": ids(chosen["key_ids"], m),
        "query_weights": rand(n),
        "key_weights": rand(m),
        "key_bias": rand(m) - 0.5,
        "positive_pairs": pairs,
        "positive_weights": weights,
        "queue": features(6, D),
        "queue_ids": ids("padded", 6),
        "hard_negatives": features(n, 3, D),
        "hard_negative_ids": ids("padded", 3 * n).view(n, 3),
        "guide_queries": features(n, 4),
        "guide_keys": features(m, 4),
        "debias": 0.05 + 0.2 * rand(n),
    }
    found = {
        name: tensors[name] if name in tensors and value in STAND_FOR_TENSORS else value
        for name, value in chosen.items()
    }
    del found["keys"]
    found["queries"], found["keys"] = features(n, D), features(m, D)
    found["logit_scale"] = torch.tensor(4.0, dtype=F64)
    if chosen["logit_scale"] == "per query":
        found["logit_scale"] = 2 + 3 * rand(n)
    one_tower = chosen["keys"] == "the queries"
    padded = {
        name: None if found[name] is None else found[name] < 0
        for name in ("query_ids", "key_ids", "queue_ids", "hard_negative_ids")
    }
    of_rows, of_cols = padded["query_ids"], padded["key_ids"]
    if not one_tower:
        spoil(found, of_rows, "queries")
        spoil(found, of_cols, "keys")
    elif of_rows is not None and of_cols is not None:
        spoil(found, of_rows & of_cols, "queries")
    spoil(found, of_rows, "hard_negatives", "guide_queries", "query_weights", "logit_scale")
    spoil(found, of_cols, "guide_keys", "key_bias", "key_weights")
    spoil(found, padded["queue_ids"], "queue")
    spoil(found, padded["hard_negative_ids"], "hard_negatives")
    if one_tower:
        found["keys"] = found["queries"]
    return found


def spoil(given: dict, padded: torch.Tensor | None, *names: str) -> None:
    """Fill what is padding with NaN."""
    for name in names:
        x = given[name]
        if padded is not None and x is not None and x.ndim:
            mask = padded.view(*padded.shape, *[1] * (x.ndim - padded.ndim))
            given[name] = x.masked_fill(mask, torch.nan)
