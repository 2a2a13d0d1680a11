"""The pages on losses: do their code blocks run, and is every loss and option on them?"""

import inspect
import re
from pathlib import Path

import pytest
import torch

import ito_kernels as ik
from ito_kernels import losses

ROOT = Path(__file__).parents[2]
SOURCES, WHICH = ROOT / "docs" / "losses.md", ROOT / "docs" / "which-loss.md"
SETUP, *BLOCKS = re.findall(r"^```python\n(.*?)^```", WHICH.read_text("utf-8"), re.M | re.S)
LOSSES = [name for name in losses.__all__ if callable(getattr(ik, name))]


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {i}" for i, _ in enumerate(BLOCKS)])
def test_a_block_of_the_page_gives_a_loss_with_gradients(block):
    torch.manual_seed(0)
    names = {}
    exec(SETUP, names)
    exec(block, names)
    loss = names["loss"]
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    assert len(block.splitlines()) <= 8, "a block to copy is short"


def test_the_sources_name_every_loss_and_every_option():
    sources = SOURCES.read_text("utf-8").partition("## Sources")[2].partition("## One line")[0]
    options = inspect.signature(ik.multi_positive_infonce).parameters.values()
    elsewhere = {"query_ids", "key_ids", "symmetric", "normalize", "reduction", "return_stats"}
    elsewhere |= {"group", "chunk_size", "backend", "hardness_strength"}
    names = {option.name for option in options if option.kind is option.KEYWORD_ONLY} - elsewhere
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", sources))))
    assert not {*LOSSES, *names} - named


@pytest.mark.parametrize("name", LOSSES)
def test_a_docstring_names_the_source(name):
    assert re.search(r"Sources?: .* (19|20)\d\d|arXiv", inspect.getdoc(getattr(ik, name)), re.S)
