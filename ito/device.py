"""The device that a run computes on, and the dtype of its encoders."""

import torch

from ito.ranks import Ranks

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_precision(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The autocast dtype for ``precision``, auto or one of PRECISIONS, and the reason in words.

    Weights, losses and the optimizer stay in fp32. On a CPU, auto chooses bf16 only if the
    processor multiplies it natively: emulated, it is slower than fp32.
    """
    if precision in PRECISIONS:
        return PRECISIONS[precision], "asked for"
    if precision != "auto":
        raise ValueError(f"precision must be auto, bf16, fp16 or fp32, got {precision!r}")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU multiplies bf16"
        return torch.float32, "the GPU has no native bf16"
    cpu = torch.cpu.get_capabilities()
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
        if cpu.get(flag):
            return torch.bfloat16, f"the CPU has {name}"
    return torch.float32, "the CPU has neither AMX nor AVX512-BF16"


def find_device(asked: str | torch.device | None, option: str = "device") -> torch.device:
    """The device of that name. Raises ValueError naming the option if there is none."""
    try:
        return torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError, TypeError) as error:  # unknown, or not in this build
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{option} {asked}: {why}") from None


def choose_device(name: str | None, saved: str | None, ranks: Ranks) -> torch.device:
    """The device of that name, else the one the run began on, else a GPU if there is one.

    On GPUs each rank takes the one of its local rank.
    """
    asked = name or saved or ("cuda" if torch.cuda.is_available() else "cpu")
    device = find_device(asked, "--device")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {asked}: training runs on cpu or cuda")
    if ranks.size > 1 and device.type == "cuda":
        if name not in (None, "cuda"):
            raise ValueError(f"--device {name}: each rank takes its own GPU; say cuda")
        if ranks.local >= (count := torch.cuda.device_count()):
            raise ValueError(f"--device cuda: {count} GPUs for local rank {ranks.local}")
        device = torch.device("cuda", ranks.local)
    return device
