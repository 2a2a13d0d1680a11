"""The projection of embeddings to the plane, for maps: (K, E) to K points, and a description."""

import torch


def pca(emb: torch.Tensor) -> tuple[list[tuple[float, float]], str]:
    centred = emb.double() - emb.double().mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    share = (sizes[:2].square().sum() / sizes.square().sum().clamp_min(1e-30)).item()
    plane = centred @ axes.T
    plane = torch.nn.functional.pad(
        plane, (0, 2 - plane.shape[1])
    )  # if there is one component only
    about = f"{len(emb) // 2} pairs, the first two principal components: {share:.0%} of variance."
    return [tuple(p) for p in plane.tolist()], about
