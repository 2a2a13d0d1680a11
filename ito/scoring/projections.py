"""Projections of embeddings to the plane, for maps: (K, E) to K points, and a description."""

import importlib.util
from collections.abc import Callable

import torch


def pca(emb: torch.Tensor) -> tuple[list[tuple[float, float]], str]:
    centred = emb.double() - emb.double().mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    share = (sizes[:2].square().sum() / sizes.square().sum().clamp_min(1e-30)).item()
    plane = centred @ axes.T
    # if there is one component only
    plane = torch.nn.functional.pad(plane, (0, 2 - plane.shape[1]))
    about = f"{len(emb) // 2} pairs, the first two principal components: {share:.0%} of variance."
    return [tuple(p) for p in plane.tolist()], about


def umap(emb: torch.Tensor) -> tuple[list[tuple[float, float]], str]:
    if importlib.util.find_spec("umap") is None:
        raise ImportError("--map umap needs umap-learn: pip install 'ito_trainer[umap]'")
    from umap import UMAP

    neighbours = min(15, len(emb) - 1)
    # With a seed UMAP uses one thread; n_jobs=1 avoids its warning about that.
    mapper = UMAP(n_neighbors=neighbours, metric="cosine", random_state=0, n_jobs=1)
    plane = mapper.fit_transform(emb.numpy())
    about = f"{len(emb) // 2} pairs by UMAP, {neighbours} neighbours, cosine; distances far apart "
    return [tuple(p) for p in plane.tolist()], about + "mean nothing."


PROJECTIONS: dict[str, Callable] = {"pca": pca, "umap": umap}
