"""Every block of Python on a page runs. Those of docs/which-loss.md are in test_losses_pages.py."""

import ast
import re
import shutil

import pytest
import torch
from support.pages import PAGES, blocks
from support.tars import tar
from support.untrained_run import write_data, write_run
from torch.nn.functional import normalize

import ito_kernels as ik
from ito_kernels.gradcache import gradcache_backward

BLOCKS = [(page, code) for page in PAGES for code in blocks(page, "python")]
BLOCKS = [(page, code) for page, code in BLOCKS if page != "docs/which-loss.md"]
PACKAGES = ("open_clip.", "transformers.")  # not installed here: their blocks are only parsed
N, D = 128, 8


def features(*shape: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, D), dim=-1).requires_grad_()


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = torch.nn.Linear(4, D)
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images, texts):
        x, y = (normalize(self.tower(x), dim=1) for x in (images, texts))
        return x, y, self.logit_scale.exp()


@pytest.fixture
def one_rank(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def given(code: str, group) -> dict:
    """What the block takes for granted."""
    model = Towers()
    names = {
        **{name: getattr(ik, name) for name in ("clip_loss", "ClipLoss")},
        **{"torch": torch, "gradcache_backward": gradcache_backward, "group": group},
        **{"rank": 0, "world_size": 1, "model": model, "scale": 20.0},
        **{"optimizer": torch.optim.SGD(model.parameters()), "logit_scale": torch.tensor(3.0)},
        **{"images": torch.randn(N, 4), "texts": torch.randn(N, 4)},
        **{"item_ids": torch.arange(N) % 50, "class_ids": torch.arange(N) % 10},
        **{"hard_negative_features": features(N, 3), "guide_negatives": features(N, 3).detach()},
    }
    for name in re.findall(r"\b(?:\w+_features|features|\w+_view|queries|keys|guide_\w+)\b", code):
        names.setdefault(name, features(N).detach() if name[:5] == "guide" else features(N))
    return names


@pytest.mark.parametrize(("page", "code"), BLOCKS, ids=[page for page, _ in BLOCKS])
def test_a_block_runs(page, code, one_rank, tmp_path, monkeypatch):
    if code.startswith(PACKAGES):
        ast.parse(code)
        return
    monkeypatch.chdir(tmp_path)
    if "ito.load" in code:
        write_run(tmp_path / "runs" / "DATE-TIME", write_data(tmp_path / "data"))
        shutil.copy(next((tmp_path / "data").glob("*.png")), "cat.png")
    if "open_shards" in code:
        picture = next(write_data(tmp_path / "data").glob("*.png")).read_bytes()
        members = [x for i in "abcd" for x in ((f"{i}.png", picture), (f"{i}.txt", f"a {i}"))]
        for number in (0, 1):
            tar(tmp_path / f"cc12m/{number:05}.tar", members)
        code = code.replace("01242", "00001").replace("224, 256", "16, 4")
        code = code.replace("    ...\n", "    break\n").replace("workers=8", "workers=1")
    names = given(code, one_rank)
    exec(compile(code, page, "exec"), names)
    loss = names.get("loss")
    if "def loss(" in code:  # for --objective
        about = {"item": torch.arange(N), "step": 1, "generator": None, "group": None}
        loss = loss(features(2, N), features(1, N), names["logit_scale"], **about)
    if loss is not None:
        assert loss.isfinite()
