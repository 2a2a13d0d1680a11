"""Your own loss in the trainer: a file for `--objective FILE.py:NAME`.

`focal` is a focal loss: InfoNCE in which a row counts less the surer the model is of its positive.
No loss of the package has this form. `panelwise` computes any function of the scores for one panel
of rows at a time, here in both directions, so that no N × N matrix is formed.

    python -m ito.train --objective examples/own_objective.py:focal
    python examples/own_objective.py

The second command compares the loss and its gradients with the dense formula, both in fp64, and
trains for a few steps: two linear towers on random vectors, and if the small emoji set has been
prepared, the trainer's model on it.

The largest difference is 8e-15. The loss on random vectors falls from 6.35 to 0.02 in 100 steps,
and that on the emoji from 4.61 to 3.98 in 20.
"""

import contextlib
import json
import os
import tempfile

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ito_kernels import panelwise

GAMMA = 1.0  # 0: InfoNCE


def focal_rows(scores: Tensor, rows: Tensor, logit_scale: Tensor) -> Tensor:
    """(r,): the loss of these rows. `scores` (r, M) are inner products with all keys."""
    log_p = (logit_scale * scores).log_softmax(1).gather(1, rows[:, None])[:, 0]
    return -((1 - log_p.exp()) ** GAMMA) * log_p


def focal(image, text, logit_scale, *, item, step, generator, group):
    """The trainer calls this with image (V, N, E) and text (C, N, E); see README.md."""
    if group is not None:
        raise ValueError("this loss sees the rows of one process only: start one process")
    i2t = panelwise(focal_rows, image[0], text[0], key_args=(logit_scale,)).mean()
    t2i = panelwise(focal_rows, text[0], image[0], key_args=(logit_scale,)).mean()
    return 0.5 * (i2t + t2i), {"i2t": i2t, "t2i": t2i}


def dense(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The same loss from the N × N matrix."""
    scores = logit_scale * image @ text.T
    log_p = torch.stack([scores.log_softmax(1).diagonal(), scores.log_softmax(0).diagonal()])
    return -((1 - log_p.exp()) ** GAMMA * log_p).mean()


def largest_difference(rows: int = 3000, dim: int = 16) -> float:
    """Between `focal` and `dense`, of the loss and of all gradients, relative to their largest
    element. 3,000 rows are several panels."""
    random = torch.Generator().manual_seed(0)
    image, text = normalize(torch.randn(2, rows, dim, generator=random).double(), dim=2)
    image = normalize(image + text, dim=1)
    inputs = [x.requires_grad_() for x in (image, text, torch.tensor(10.0).double())]
    about = {"item": torch.arange(rows), "step": 1, "generator": None, "group": None}
    loss, _ = focal(image[None], text[None], inputs[2], **about)
    expected = dense(*inputs)
    found = [loss, *torch.autograd.grad(loss, inputs)]
    expected = [expected, *torch.autograd.grad(expected, inputs)]
    differences = [
        (a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)
    ]
    return torch.stack(differences).max().item()


def train_on_vectors(steps: int = 100) -> tuple[float, float]:
    """The loss before and after training on pairs of noisy views of random vectors."""
    torch.manual_seed(0)
    views = torch.randn(2, 16, 64) / 4
    towers = nn.Linear(64, 32), nn.Linear(64, 32)
    logit_scale = nn.Parameter(torch.tensor(10.0).log())
    parameters = [p for tower in towers for p in tower.parameters()]
    optimizer = torch.optim.Adam([*parameters, logit_scale], lr=3e-3)
    losses = []
    for step in range(1, steps + 1):
        seen = torch.randn(256, 16) @ views + 0.1 * torch.randn(2, 256, 64)
        image, text = (normalize(f(x), dim=1) for f, x in zip(towers, seen, strict=True))
        about = {"item": torch.arange(256), "step": step, "generator": None, "group": None}
        loss, _ = focal(image[None], text[None], logit_scale.exp(), **about)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def train_on_emoji(steps: int = 20) -> tuple[float, float]:
    """The loss of the first and the last step of `python -m ito.train`."""
    from ito.train import main

    options = f"--steps {steps} --batch-size 64 --log-every 1"
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            objective = ["--objective", f"{__file__}:focal"]
            run = main([*options.split(), *objective, "--out", f"{folder}/run"])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return losses[0], losses[-1]


def main() -> None:
    from ito.data.emoji import default_cache
    from ito.data.emoji_small import FOLDER

    difference = largest_difference()
    print(f"largest relative difference to the dense formula: {difference:.1e}")
    if not difference < 1e-10:
        raise SystemExit("the loss should be that of the dense formula")

    runs = {"random vectors, 100 steps": train_on_vectors}
    if (default_cache() / FOLDER).is_dir():
        runs["emoji, 20 steps"] = train_on_emoji
    for name, run in runs.items():
        before, after = run()
        print(f"loss on {name}: {before:.2f} → {after:.2f}")
        if not after < 0.9 * before:
            raise SystemExit("the loss should fall")


if __name__ == "__main__":
    main()
