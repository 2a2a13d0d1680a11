"""The dtype that the encoders compute in, and why."""

import torch


def choose_precision(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The autocast dtype for ``precision`` (auto, bf16 or fp32), and the reason in words.

    Weights, losses and the optimizer stay in fp32. On a CPU, auto chooses bf16 only if the
    processor multiplies it natively: emulated, it is slower than fp32.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision must be auto, bf16 or fp32, got {precision!r}")
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision], "asked for"
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
