"""How deep each parameter of a tower lies, for rates of learning that decay layer by layer."""

from torch import nn

# projections that open_clip registers before its blocks
PROJECTIONS = ("proj", "text_projection")


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
    lists = [(n, m) for n, m in tower.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"layer_decay below 1 needs towers with a list of blocks: {type(tower).__name__} "
            f"{getattr(tower, 'name', '')} has none"
        )
    prefix, blocks = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    found, above = {}, False
    for name, parameter in parameters.items():
        inside = name.startswith(f"{prefix}.")
        above |= inside
        if inside:
            found[parameter] = len(blocks) - int(name.removeprefix(f"{prefix}.").split(".")[0])
        else:
            projection = name.split(".")[-1] in PROJECTIONS
            found[parameter] = 0 if above or projection else len(blocks) + 1
    return found
