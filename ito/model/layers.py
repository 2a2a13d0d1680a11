"""The blocks of a tower: how deep each parameter lies, for rates of learning that decay layer by
layer; and what is computed again in backward, or divided among ranks."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def depths(tower: nn.Module) -> dict[nn.Parameter, int]:
    """The depth of each parameter, counted from the top.

    0 for what follows the blocks (final norm, projection), 1 for the last block, and one more than
    there are blocks for what precedes them (patches, tokens, positions). Blocks are the elements of
    the tower's largest ModuleList; a timm model numbers its layers itself.

    Raises ValueError if the tower has no such list.
    """
    parameters = dict(tower.named_parameters())
    if numbers := getattr(getattr(tower, "body", None), "layer_numbers", None):
        found = {f"body.network.{name}": number for name, number in numbers().items()}
        top = max(found.values())
        return {p: 1 + top - found[n] if n in found else 0 for n, p in parameters.items()}
    prefix, blocks = largest_list(tower, "layer_decay below 1")
    found, above = {}, False
    for name, parameter in parameters.items():
        inside = name.startswith(f"{prefix}.")
        above |= inside
        if inside:
            found[parameter] = len(blocks) - int(name.removeprefix(f"{prefix}.").split(".")[0])
        else:
            # open_clip registers its projections before the blocks
            projection = name.split(".")[-1] in ("proj", "text_projection")
            found[parameter] = 0 if above or projection else len(blocks) + 1
    return found


def largest_list(tower: nn.Module, option: str) -> tuple[str, nn.Sequential | nn.ModuleList]:
    """The blocks of a tower, and their name: its ModuleList with the most parameters, or what timm
    calls "blocks". Raises ValueError naming the option that needs it if there is none."""
    lists = [
        (name, module)
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) or name == "body.network.blocks"
    ]
    if not lists:
        raise ValueError(
            f"{option} needs towers with a list of blocks: {type(tower).__name__} "
            f"{getattr(tower, 'name', '')} has none"
        )
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def recompute(blocks: list[nn.Module]) -> None:
    """Keep of each block only its input, and compute the rest again in backward.

    Raises ValueError for batch normalisation, whose statistics would see each batch twice.
    """
    for block in blocks:
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in block.modules()):
            raise ValueError("--grad-checkpointing: a block of the towers has batch normalisation")
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
