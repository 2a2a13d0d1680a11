"""Whether the towers are compiled by torch.compile, and why."""

import torch
from torch import nn

from ito.model.encoders import Block, ImageEncoder


def choose_compile(requested: bool, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and the reason in words. Towers are compiled only on request.

    A step of the default run, in bf16 on a Sapphire Rapids CPU, measured in turns on two busy
    cores: 278 ms, compiled 276 (on quiet cores, with a shorter text tower, 153 and 160). Compiling
    takes 20 to 60 s of processor time.
    """
    if requested:
        return True, "asked for"
    if device.type == "cuda":
        return False, "not measured on a GPU; --compile asks for it"
    return False, "a step takes as long, after 20 to 60 s of compiling; --compile asks for it"


def compile_towers(*modules: nn.Module) -> None:
    """Compile every transformer block and the image tower's stem, in place: weights keep their
    names. Compilation happens at the first call, for each size. Results change by rounding.
    Padding is computed then: without it the number of tokens differs from step to step.
    """
    for module in (part for root in modules for part in root.modules()):
        if isinstance(module, Block):
            module.compile()
        elif isinstance(module, ImageEncoder):
            module.stem.compile()
        elif hasattr(module, "packs"):
            module.packs = False
