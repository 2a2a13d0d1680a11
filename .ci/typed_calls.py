"""A user's code with types: every public function and module. `.ci/deep` runs it, and has mypy and
pyright read it where the package is installed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import assert_type

import ito_kernels as ik


def features(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1).requires_grad_()


def panel_sum(scores: Tensor, rows: Tensor) -> Tensor:
    return scores.logsumexp(1)


N, D = 16, 8
x, y, ids, rows = features(N, D), features(N, D), torch.arange(N) % 4, torch.arange(N)
scale = torch.tensor(20.0)
losses: dict[str, Tensor] = {}

losses["clip"] = ik.clip_loss(x, y, scale, backend="reference")
ik.clip_loss(x, y, 20.0, label_smoothing=0.1).backward()
losses["infonce"] = ik.multi_positive_infonce(x, y, scale, query_ids=ids, key_ids=ids)
loss, stats = ik.multi_positive_infonce(x, y, 20.0, return_stats=True)
losses["siglip"] = assert_type(ik.siglip_loss(x, y, scale, -10.0), Tensor)
losses["supcon"] = assert_type(ik.supcon_loss(x, ids, 0.1), Tensor)
losses["nt_xent"] = assert_type(ik.nt_xent_loss(x, y, 0.1), Tensor)
losses["dcl"] = assert_type(ik.decoupled_contrastive_loss(x, y, scale), Tensor)
losses["softmax"] = assert_type(ik.decoupled_softmax_loss(x, y, scale), Tensor)
losses["cacr"] = assert_type(ik.cacr_loss(x, y), Tensor)
ito, terms = ik.ito_loss(features(2, N, D), y[None], features(2, N, D), scale)
losses["ito"] = assert_type(ito, Tensor)
losses |= assert_type(terms, dict[str, Tensor])
losses["mnrl"] = assert_type(ik.mnrl_loss(x, y, features(N, D), 20.0), Tensor)
losses["one_to_k"] = assert_type(ik.one_to_k_loss(x, features(N, 3, D), scale), Tensor)
losses["cwcl"] = assert_type(ik.cwcl_loss(x, y, scale, reference=x.detach()), Tensor)
losses["soft"] = assert_type(
    ik.soft_target_infonce(
        x, y, scale, target_queries=x.detach(), target_keys=y.detach(), target_scale=10.0
    ),
    Tensor,
)
losses["mixup"] = assert_type(
    ik.mixup_infonce(x, y, scale, partners=rows.flip(0), mixing=0.3), Tensor
)
losses["clusters"] = assert_type(
    ik.cluster_weighted_infonce(
        x, y, scale, query_clusters=ids, key_clusters=ids, weights=torch.ones(4, 4)
    ),
    Tensor,
)
mixed = assert_type(ik.mix_hard_negatives(x, features(64, D), hardest=8, mixed=4), Tensor)
losses["rince"] = assert_type(ik.rince_loss(x, y, 2.0, q=0.5, lam=0.1), Tensor)
losses["global"], u, v = ik.global_contrastive_loss(
    x, y, 0.1, torch.zeros(N), torch.zeros(N), gamma=0.9
)
losses["symile"] = assert_type(ik.symile_loss([x, y, features(N, D)], scale), Tensor)
losses["uniformity"] = assert_type(ik.uniformity_loss(x), Tensor)
losses["alignment"] = assert_type(ik.alignment_loss(x, y), Tensor)
losses["orthogonality"] = assert_type(ik.orthogonality_loss(x), Tensor)
losses["spectral"] = assert_type(ik.spectral_contrastive_loss(x, y), Tensor)
losses["matryoshka"] = assert_type(
    ik.matryoshka_loss(ik.clip_loss, x, y, dims=[4, 8], logit_scale=20.0), Tensor
)
losses["heads"] = assert_type(
    ik.multi_head_loss(
        ik.clip_loss, features(2, N, D), features(2, N, D), logit_scale=torch.ones(2)
    ),
    Tensor,
)
losses["softplus"] = assert_type(ik.similarity_softplus(x, y, scale), Tensor)
losses["panelwise"] = assert_type(ik.panelwise(panel_sum, x, y), Tensor)
statistics = ik.similarity_logsumexp(x, y, scale)
if statistics.row is not None and statistics.row.logsum is not None:
    losses["logsumexp"] = statistics.row.logsum.sum()

losses["ClipLoss"] = ik.ClipLoss()(x, y, scale)
losses["SigLipLoss"] = ik.SigLipLoss()(x, y, scale, torch.tensor(-10.0))
losses["MultiPositiveInfoNCE"] = ik.MultiPositiveInfoNCE()(x, y, scale, ids, ids)
losses["SupConLoss"] = ik.SupConLoss()(x, ids)
losses["NTXentLoss"] = ik.NTXentLoss()(x, y)
losses["ItoLoss"] = ik.ItoLoss()(features(2, N, D), y[None], features(2, N, D), scale)[0]
losses["GlobalContrastiveLoss"] = ik.GlobalContrastiveLoss(N)(x, y, 0.1, rows)

print(assert_type(ik.explain(x, y), str), assert_type(ik.backends()["cpu"].detail, str))
with ik.use_backend("reference"):
    losses["reference"] = ik.clip_loss(x, y, 20.0)
for name, value in losses.items():
    assert value.isfinite().all(), name
