"""Weights that are sharded over the ranks by PyTorch's FSDP2 (`fully_shard`), and their checkpoints
by torch.distributed.checkpoint: a safetensors file per rank, which any number of ranks can read.

The transformer blocks and the token embedding are sharded. The rest, about 1 % of ViT-B's weights,
is whole on each rank: FSDP2 takes no 0-d parameters, and objectives use theirs outside `forward`.
"""

import hashlib
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ito.files import FileError, require_file
from ito.ranks import Ranks

# a process that reads for itself, or is the only one, is no surprise
warnings.filterwarnings("ignore", "torch.distributed is disabled")


def shard(root: nn.Module, parts: list[nn.Module], group: dist.ProcessGroup, device) -> None:
    """Shard the parameters of `parts`; each part's are gathered while it computes. The gradients
    are averaged. Only `root.forward` and `root.convolve` may call the parts."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = DeviceMesh.from_group(group, device.type)
    for part in parts:
        fully_shard(part, mesh=mesh)
    whole = {p for p in root.parameters() if not is_sharded(p)}
    fully_shard(root, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(root, "convolve")
    # what it returns is a view, which nothing here changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")


def is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")  # a DTensor


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, which takes no mixture of sharded and whole ones."""
    kinds = [[p for p in parameters if is_sharded(p) == kind] for kind in (False, True)]
    norms = [get_total_norm([p.grad for p in own if p.grad is not None]) for own in kinds if own]
    norms = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for own in filter(None, kinds):
        clip_grads_with_norm_(own, limit, norm)
    return norm


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights without shards, on rank 0, on the CPU; {} on the others. All ranks call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def load_whole(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """`load_state_dict` of whole weights, of which each rank takes its shards."""
    if not any(map(is_sharded, module.parameters())):
        module.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))


def named_state(root: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name, this rank's shards of them. What is read into them in place is
    the module's and the optimizer's."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    moments = get_optimizer_state_dict(root, optimizer)["state"]
    return root.state_dict() | {
        f"{kind}.{name}": value for name, own in moments.items() for kind, value in own.items()
    }


def save_shards(folder: Path, state: dict[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """Write the files of all ranks into `folder`, and return their SHA-256. All ranks call it.

    Raises on every rank the error of any.
    """
    import torch.distributed.checkpoint as dcp

    if ranks.leads:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    ranks.any(False)  # the others wait
    state = {name: value.contiguous() for name, value in state.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(state, storage_writer=writer, no_dist=ranks.group is None)
    except dcp.api.CheckpointException as error:  # a BaseException
        raise next(iter(error.failures.values()))[0] from None
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    own = names[ranks.rank :: ranks.size]
    return ranks.all_gather_dicts({name: file_hash(folder / name) for name in own})


def load_shards(folder: Path, state: dict[str, Tensor], sums: dict, ranks: Ranks) -> None:
    """Read into `state`, in place, whatever ranks wrote it. Each rank verifies its share of files.
    Raises FileError for a file that is damaged, or not the checkpoint's."""
    import torch.distributed.checkpoint as dcp

    names = {path.name for path in folder.glob("*.safetensors")}
    for name in sorted(names | sums.keys())[ranks.rank :: ranks.size]:
        if name not in names or file_hash(folder / name) != sums.get(name):
            raise FileError(f"{folder / name} is damaged: it does not have its checksum")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load(state, storage_reader=reader, no_dist=True)


def read_weights(folder: Path, sums: dict[str, str], shapes_only: bool) -> dict[str, dict]:
    """The whole "model" and "objective" of a checkpoint's shards, or tensors without memory of
    their shapes. Raises FileError for shapes that the files have no room for."""
    import torch.distributed.checkpoint as dcp

    about = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(own.size, dtype=own.properties.dtype, device="meta")
        for name, own in about.items()
        if name.startswith(("model.", "objective."))
    }
    if not shapes_only:
        room = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if sum(value.nbytes for value in state.values()) > room:
            raise FileError(f"{folder} is damaged: its files are smaller than their tensors")
        state = {name: torch.empty_like(value, device="cpu") for name, value in state.items()}
        load_shards(folder, state, sums, Ranks())
    return {
        part: {n.removeprefix(f"{part}."): v for n, v in state.items() if n.startswith(f"{part}.")}
        for part in ("model", "objective")
    }


def file_hash(path: Path) -> str:
    return hashlib.sha256(np.memmap(require_file(path), mode="r")).hexdigest()
