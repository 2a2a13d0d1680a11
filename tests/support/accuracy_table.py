"""How far each backend is from fp64, beside dense PyTorch, and the table of docs/accuracy.md.

`TRITON_INTERPRET=1 python tests/support/accuracy_table.py` measures, in 10 s, and writes the table.
tests/properties/test_accuracy.py measures a part of it again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

import ito_kernels as ik

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
BACKENDS = ("reference", "chunked", "cpu", "simt", "triton")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
N, D = 128, 64
IDS = torch.arange(N) // 4
SCALES = (20.0, 100.0)


def dense_clip(x: Tensor, y: Tensor, scale: float) -> Tensor:
    S, rows = scale * x @ y.T, torch.arange(N)
    return 0.5 * (cross_entropy(S, rows) + cross_entropy(S.T, rows))


def dense_by_ids(x: Tensor, y: Tensor, scale: float) -> Tensor:
    S = scale * x @ y.T
    targets = (IDS[:, None] == IDS).to(S.dtype) / 4
    return 0.5 * (cross_entropy(S, targets) + cross_entropy(S.T, targets))


def dense_siglip(x: Tensor, y: Tensor, scale: float) -> Tensor:
    sign = 1 - 2 * torch.eye(N, dtype=x.dtype)
    return softplus(sign * (scale * x @ y.T - scale / 2)).sum() / N


def dense_one_tower(z: Tensor, ids: Tensor, scale: float) -> Tensor:
    own = torch.eye(len(z), dtype=torch.bool)
    S = (scale * z @ z.T).masked_fill(own, -torch.inf)
    positive = (ids[:, None] == ids) & ~own
    log_p = S.log_softmax(1).masked_fill(~positive, 0)
    return -(log_p.sum(1) / positive.sum(1)).mean()


def dense_supcon(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return dense_one_tower(torch.cat([x, y]), IDS.repeat(2), scale)


def dense_nt_xent(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return dense_one_tower(torch.cat([x, y]), torch.arange(N).repeat(2), scale)


class Loss(NamedTuple):
    dense: Callable
    ours: Callable


LOSSES = {
    "CLIP": Loss(dense_clip, ik.clip_loss),
    "4 per id": Loss(
        dense_by_ids, lambda x, y, s, **o: ik.clip_loss(x, y, s, query_ids=IDS, key_ids=IDS, **o)
    ),
    "SigLIP": Loss(dense_siglip, lambda x, y, s, **o: ik.siglip_loss(x, y, s, -s / 2, **o)),
    "SupCon": Loss(
        dense_supcon,
        lambda x, y, s, **o: ik.supcon_loss(torch.cat([x, y]), IDS.repeat(2), 1 / s, **o),
    ),
    "NT-Xent": Loss(dense_nt_xent, lambda x, y, s, **o: ik.nt_xent_loss(x, y, 1 / s, **o)),
}


class Errors(NamedTuple):
    """value: of the loss, absolute. gradient: the largest of any element, relative to the largest
    gradient."""

    value: float
    gradient: float


def errors(loss: Callable, dense: Callable, dtype: torch.dtype, scale: float, seed: int) -> Errors:
    """Of noisy pairs, whose features are rounded to `dtype`: that is no error."""
    g = torch.Generator().manual_seed(seed)
    x = normalize(torch.randn(N, D, generator=g, dtype=torch.float64), dim=1)
    noise = normalize(torch.randn(N, D, generator=g, dtype=torch.float64), dim=1)
    y = normalize(x + 3 * noise, dim=1)

    def value_and_gradients(loss, dtype):
        leaves = [v.to(rounded).to(dtype).requires_grad_() for v in (x, y)]
        value = loss(*leaves, scale)
        return value.detach().double(), *(v.double() for v in torch.autograd.grad(value, leaves))

    rounded = dtype
    truth, ours = value_and_gradients(dense, torch.float64), value_and_gradients(loss, dtype)
    of_gradients = [
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip(ours[1:], truth[1:], strict=True)
    ]
    return Errors((ours[0] - truth[0]).abs().item(), max(of_gradients))


def worst(loss: str, dtype: str, backend: str | None, seeds: int, scales=SCALES) -> Errors:
    """The largest errors; backend None: of dense PyTorch."""
    ours = LOSSES[loss].dense

    def on_backend(*args):
        return LOSSES[loss].ours(*args, backend=backend)

    found = [
        errors(ours if backend is None else on_backend, ours, DTYPES[dtype], scale, seed)
        for scale in scales
        for seed in range(seeds)
    ]
    return Errors(*map(max, zip(*found, strict=True)))


def table() -> str:
    columns = ["PyTorch", *(f"`{x}`" for x in BACKENDS)]
    lines = ["| loss | dtype | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for loss in LOSSES:
        for dtype in DTYPES:
            cells = [
                worst(loss, dtype, backend, 1 if backend in ("simt", "triton") else 4)
                for backend in (None, *BACKENDS)
            ]
            text = [", ".join(f"{x:.0e}".replace("e-0", "e-") for x in cell) for cell in cells]
            lines.append(f"| {loss} | {dtype} | " + " | ".join(text) + " |")
    return "\n".join(lines) + "\n"


def read() -> dict[tuple[str, str, str], Errors]:
    """{(loss, dtype, backend or "PyTorch"): errors} of the page."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [x.strip() for x in line.strip("|").split("|")]
        if len(cells) == len(BACKENDS) + 3 and cells[0] in LOSSES:
            for name, cell in zip(("PyTorch", *BACKENDS), cells[2:], strict=True):
                found[cells[0], cells[1], name] = Errors(*map(float, cell.split(",")))
    return found


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        re.sub(r"\| loss \| dtype .*?\n\n", lambda _: table() + "\n", text, flags=re.DOTALL),
        encoding="utf-8",
    )
