# ruff: noqa: E501 (a call and its message read best on one line)
"""Bad input raises by name, saying what came and what was wanted, before any kernel runs."""

import pytest
import torch

import ito_kernels as ik
from ito_kernels.distributed.chunks import gather_cache_bytes

X, Y = torch.randn(5, 3), torch.randn(5, 3)
IDS = torch.arange(5)
SOFT = {"target_queries": X, "target_keys": Y, "target_scale": 1.0}
CLUSTERS = {"query_clusters": IDS, "key_clusters": IDS, "weights": torch.ones(5, 5)}

# (exception, what the message must hold, call)
CALLS = [
    (ValueError, r"queries must have shape \(N, D\), got \(5,\)", lambda: ik.multi_positive_infonce(X[:, 0], Y, 1.0)),
    (ValueError, r"keys must have shape \(N, D\), got \(1, 5, 3\)", lambda: ik.multi_positive_infonce(X, Y[None], 1.0)),
    (ValueError, "queries and keys must have the same width D, got 3 and 2", lambda: ik.multi_positive_infonce(X, Y[:, :2], 1.0)),
    (ValueError, "queries must have at least one row", lambda: ik.multi_positive_infonce(X[:0], Y[:0], 1.0)),
    (ValueError, "keys must have at least one row", lambda: ik.multi_positive_infonce(X, Y[:0], 1.0)),
    (ValueError, "queries must have at least one row and one column", lambda: ik.multi_positive_infonce(X[:, :0], Y[:, :0], 1.0)),
    (TypeError, "queries must be a tensor of shape .*, got list", lambda: ik.multi_positive_infonce([[1.0]], Y, 1.0)),
    (TypeError, "queries must be float32, .*, got torch.int64", lambda: ik.multi_positive_infonce(X.long(), Y.long(), 1.0)),
    (TypeError, "queries and keys must have the same dtype, got torch.float32, torch.bfloat16", lambda: ik.multi_positive_infonce(X, Y.bfloat16(), 1.0)),
    (ValueError, "queries and keys must be on the same device, got cpu and meta", lambda: ik.multi_positive_infonce(X, Y.to("meta"), 1.0)),
    (ValueError, "got 5 queries, 4 keys and no query_ids", lambda: ik.multi_positive_infonce(X, Y[:4], 1.0)),
    (ValueError, "got 5 queries, 4 keys and no key_ids", lambda: ik.multi_positive_infonce(X, Y[:4], 1.0, query_ids=IDS)),
    (ValueError, "exclude_self needs the same number of queries and keys, got 5 and 4", lambda: ik.multi_positive_infonce(X, Y[:4], 1.0, query_ids=IDS, key_ids=IDS[:4], exclude_self=True)),
    (TypeError, "query_ids must have an integer dtype, got torch.float32", lambda: ik.multi_positive_infonce(X, Y, 1.0, query_ids=IDS.float(), key_ids=IDS)),
    (TypeError, "key_ids must have an integer dtype, got torch.bool", lambda: ik.multi_positive_infonce(X, Y, 1.0, query_ids=IDS, key_ids=IDS > 2)),
    (TypeError, "key_ids must be a tensor of integers, got list", lambda: ik.multi_positive_infonce(X, Y, 1.0, query_ids=IDS, key_ids=[0] * 5)),
    (ValueError, r"query_ids must have shape \(5,\), one id for each row of queries, got \(4,\)", lambda: ik.multi_positive_infonce(X, Y, 1.0, query_ids=IDS[:4], key_ids=IDS)),
    (ValueError, r"key_ids must have shape \(5,\), .*, got \(5, 1\)", lambda: ik.multi_positive_infonce(X, Y, 1.0, query_ids=IDS, key_ids=IDS[:, None])),
    (ValueError, "query_ids must be on cpu like queries, got meta", lambda: ik.multi_positive_infonce(X, Y, 1.0, query_ids=IDS.to("meta"), key_ids=IDS)),
    (ValueError, "logit_scale must be finite and greater than 0, got 0", lambda: ik.multi_positive_infonce(X, Y, 0.0)),
    (ValueError, "logit_scale must be finite and greater than 0, got -1", lambda: ik.clip_loss(X, Y, -1)),
    (ValueError, "logit_scale must be finite and greater than 0, got nan", lambda: ik.clip_loss(X, Y, float("nan"))),
    (ValueError, "logit_scale must be finite and greater than 0, got inf", lambda: ik.clip_loss(X, Y, float("inf"))),
    (TypeError, "logit_scale must be a number or a tensor, got str", lambda: ik.clip_loss(X, Y, "1")),
    (TypeError, "logit_scale must have a floating-point dtype, got torch.int64", lambda: ik.clip_loss(X, Y, torch.tensor(1))),
    (ValueError, r"logit_scale must be a number, a 0-d tensor or have shape \(5,\), got \(3,\)", lambda: ik.clip_loss(X, Y, torch.ones(3))),
    (ValueError, "positives must be one of 'mean', 'sum', 'in', got 'max'", lambda: ik.clip_loss(X, Y, 1.0, positives="max")),
    (ValueError, "empty must be one of 'zero', 'drop', got 'skip'", lambda: ik.clip_loss(X, Y, 1.0, empty="skip")),
    (ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'", lambda: ik.clip_loss(X, Y, 1.0, reduction="avg")),
    (ValueError, "image_features and text_features must have the same width", lambda: ik.clip_loss(X, Y[:, :2], 1.0)),
    (ValueError, "image_features and text_features must have the same number of rows", lambda: ik.clip_loss(X, Y[:2], 1.0)),
    (ValueError, "unknown backend 'gpu': expected one of reference, chunked, cpu", lambda: ik.clip_loss(X, Y, 1.0, backend="gpu")),
    (ValueError, "got 5 images, 4 texts and no image_ids", lambda: ik.siglip_loss(X, Y[:4], 1.0, -1.0)),
    (TypeError, "image_ids must have an integer dtype", lambda: ik.siglip_loss(X, Y, 1.0, -1.0, image_ids=IDS.float())),
    (ValueError, r"text_ids must have shape \(5,\)", lambda: ik.siglip_loss(X, Y, 1.0, -1.0, text_ids=IDS[:2])),
    (ValueError, "logit_bias must be finite, got inf", lambda: ik.siglip_loss(X, Y, 1.0, float("inf"))),
    (TypeError, "logit_bias must be a number or a tensor, got str", lambda: ik.siglip_loss(X, Y, 1.0, "-1")),
    (ValueError, r"logit_bias must be a number or a 0-d tensor, got shape \(5,\)", lambda: ik.siglip_loss(X, Y, 1.0, X[:, 0])),
    (TypeError, "logit_bias must have a floating-point dtype", lambda: ik.siglip_loss(X, Y, 1.0, torch.tensor(1))),
    (ValueError, "z1 and z2 must have the same number of rows, got 5 and 4", lambda: ik.nt_xent_loss(X, Y[:4])),
    (ValueError, "temperature must be finite and greater than 0, got 0", lambda: ik.nt_xent_loss(X, Y, 0)),
    (ValueError, "features must have shape", lambda: ik.supcon_loss(X[None], IDS)),
    (ValueError, r"labels must have shape \(5,\)", lambda: ik.supcon_loss(X, IDS[:3])),
    (TypeError, "labels must have an integer dtype", lambda: ik.supcon_loss(X, IDS.double())),
    (ValueError, "base_temperature must be finite and greater than 0", lambda: ik.supcon_loss(X, IDS, 0.1, -1.0)),
    (ValueError, "base_temperature needs one temperature", lambda: ik.supcon_loss(X, IDS, torch.ones(5), 0.1)),
    (ValueError, r"image_views must have shape \(V, N, D\), got \(5, 3\)", lambda: ik.ito_loss(X, Y, None, 1.0, lambda_fusion=0)),
    (ValueError, r"text must have 5 items of width 3 like image_views, got \(1, 4, 3\)", lambda: ik.ito_loss(X[None], Y[:4], None, 1.0, lambda_fusion=0)),
    (ValueError, "fused_views is needed for lambda_fusion = 2.0", lambda: ik.ito_loss(X[None], Y, None, 1.0)),
    (ValueError, "fused_views must hold at least 2 views, got 1", lambda: ik.ito_loss(X[None], Y, X[None], 1.0)),
    (ValueError, r"fused_views must have 5 items like image_views, got \(2, 4, 3\)", lambda: ik.ito_loss(X[None], Y, torch.randn(2, 4, 3), 1.0)),
    (ValueError, "lambda_fusion must be a number of at least 0, got -1", lambda: ik.ito_loss(X[None], Y, None, 1.0, lambda_fusion=-1)),
    (ValueError, "denominator must be one of 'pair', 'pooled', got 'joint'", lambda: ik.ito_loss(X[None], Y, None, 1.0, lambda_fusion=0, denominator="joint")),
    (ValueError, r"logit_scale must be a number or a 0-d tensor, got shape \(5,\)", lambda: ik.ito_loss(X[None], Y, None, torch.ones(5), lambda_fusion=0)),
    (ValueError, "queries and keys must have the same width D, got 3 and 2", lambda: ik.explain(X, Y[:, :2])),
    (ValueError, "row_ids and col_ids go together: col_ids is missing", lambda: ik.similarity_logsumexp(X, Y, 1.0, row_ids=IDS)),
    (ValueError, 'positives must be None, "linear" or "lse", got \'mean\'', lambda: ik.similarity_logsumexp(X, Y, 1.0, positives="mean")),
    (ValueError, "rows and cols are both False", lambda: ik.similarity_logsumexp(X, Y, 1.0, rows=False, cols=False)),
    (ValueError, r"row_bias must have shape \(5,\), got \(4,\)", lambda: ik.similarity_softplus(X, Y, 1.0, row_bias=torch.ones(4))),
    (TypeError, "col_bias must have a floating-point dtype", lambda: ik.similarity_softplus(X, Y, 1.0, col_bias=IDS)),
    (ValueError, r"row_weights must have shape \(5,\), got \(4,\)", lambda: ik.similarity_softplus(X, Y, 1.0, row_weights=torch.ones(4))),
    (ValueError, "row_weights must not require a gradient", lambda: ik.similarity_softplus(X, Y, 1.0, row_weights=torch.ones(5, requires_grad=True))),
    (TypeError, "row_weights must be a pair", lambda: ik.similarity_logsumexp(X, Y, 1.0, row_weights=torch.ones(5))),
    (ValueError, r"row_weights\[1\] must be None without positives", lambda: ik.similarity_logsumexp(X, Y, 1.0, row_weights=(torch.ones(5), torch.ones(5)))),
    (ValueError, "col_weights is given, but that side's statistics are not asked for", lambda: ik.similarity_logsumexp(X, Y, 1.0, cols=False, col_weights=(torch.ones(5), None))),
    (TypeError, "col_bias must be a tensor, got float", lambda: ik.similarity_softplus(X, Y, 1.0, col_bias=1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), CALLS, ids=[m[:60] for _, m, _ in CALLS])
def test_message(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("error", "message", "value"),
    [
        (TypeError, "group must be a ProcessGroup or a DeviceMesh, got str", {"group": "all"}),
        (TypeError, "chunk_size must be a whole number, got float", {"chunk_size": 8.0}),
        (ValueError, "chunk_size must be at least 1, got 0", {"chunk_size": 0}),
    ],
)
def test_every_loss_checks_the_group(error, message, value):
    for call in (
        lambda: ik.clip_loss(X, Y, 1.0, **value),
        lambda: ik.siglip_loss(X, Y, 1.0, 0.0, **value),
        lambda: ik.supcon_loss(X, IDS, **value),
        lambda: ik.nt_xent_loss(X, Y, **value),
        lambda: ik.mnrl_loss(X, Y, **value),
        lambda: ik.ito_loss(X[None], Y, None, 1.0, lambda_fusion=0, **value),
        lambda: ik.one_to_k_loss(X, Y[:, None], 1.0, **value),
        lambda: ik.mixup_infonce(X, Y, 1.0, partners=IDS, mixing=0.5, **value),
        lambda: ik.decoupled_contrastive_loss(X, Y, 1.0, **value),
        lambda: ik.decoupled_softmax_loss(X, Y, 1.0, **value),
        lambda: ik.cwcl_loss(X, Y, 1.0, reference=X, **value),
        lambda: ik.soft_target_infonce(X, Y, 1.0, **SOFT, **value),
        lambda: ik.uniformity_loss(X, **value),
        lambda: ik.alignment_loss(X, Y, **value),
        lambda: ik.symile_loss([X, Y, X], 1.0, **value),
        lambda: ik.cluster_weighted_infonce(X, Y, 1.0, **CLUSTERS, **value),
        lambda: ik.cacr_loss(X, Y, **value),
        lambda: ik.rince_loss(X, Y, 1.0, q=0.5, lam=0.1, **value),
        lambda: ik.global_contrastive_loss(X, Y, 0.1, *torch.ones(2, 5), gamma=0.5, **value),
        lambda: ik.GlobalContrastiveLoss(5, **value)(X, Y, 0.1, IDS),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("module", [ik.ClipLoss, ik.SigLipLoss])
def test_modules_need_an_initialised_group(module):
    loss = module(rank=1, world_size=2)
    with pytest.raises(RuntimeError, match=r"world_size=2 needs .*init_process_group"):
        loss(X, Y, torch.tensor(1.0), torch.tensor(0.0))


@pytest.mark.parametrize("value", ["-1", "64MiB"])
def test_the_cache_of_gathered_keys_is_a_number_of_bytes(value, monkeypatch):
    monkeypatch.setenv("ITO_GATHER_CACHE_BYTES", value)
    with pytest.raises(ValueError, match=f"ITO_GATHER_CACHE_BYTES must .* bytes, got '{value}'"):
        gather_cache_bytes()
