"""`python -m ito_kernels`: versions, the backends that can run here, and a check of their values.

The check compares with dense formulas in fp64 and exits with status 1 if a backend is wrong. The
output is meant to be pasted into a bug report.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor

import ito_kernels as ik
from ito_kernels.similarity.cpu import instruction_sets

# Largest relative error of the loss and of each gradient, ‖got − exact‖ / ‖exact‖. Features are
# rounded to the dtype first; 16-bit gradients are rounded at the end, to 2⁻⁹ (bf16).
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
N, M, D, SCALE, BIAS = 96, 80, 48, 20.0, -10.0  # N ≠ M: with ids, rows and columns differ


def dense_infonce(queries: Tensor, keys: Tensor, scale: Tensor, positive: Tensor) -> Tensor:
    """Khosla et al.'s L_out in both directions, with the dense matrix."""
    scores = scale * queries @ keys.T
    sides = (scores, positive), (scores.T, positive.T)
    losses = [
        ((s.logsumexp(1) - (s * p).sum(1) / p.sum(1).clamp(min=1)) * p.any(1)).mean()
        for s, p in sides
    ]
    return sum(losses) / 2


def dense_siglip(queries: Tensor, keys: Tensor, scale: Tensor, positive: Tensor) -> Tensor:
    scores = scale * queries @ keys.T + BIAS
    return F.softplus(torch.where(positive, -scores, scores)).sum() / len(queries)


def cases() -> dict[str, tuple[Callable, Callable, int, Tensor, Tensor]]:
    """By name: the loss, its dense formula, the number of keys, and the ids."""
    rows, query_ids, key_ids = torch.arange(N), torch.arange(N) % 7, torch.arange(M) % 9

    def clip(a, b, scale, ids, other_ids):
        return ik.clip_loss(a, b, scale)

    def infonce(a, b, scale, ids, other_ids):
        return ik.multi_positive_infonce(a, b, scale, query_ids=ids, key_ids=other_ids)

    def siglip(a, b, scale, ids, other_ids):
        return ik.siglip_loss(a, b, scale, BIAS, image_ids=ids, text_ids=other_ids)

    return {
        "clip_loss": (clip, dense_infonce, N, rows, rows),
        "multi_positive_infonce": (infonce, dense_infonce, M, query_ids, key_ids),
        "siglip_loss": (siglip, dense_siglip, M, query_ids, key_ids),
    }


def largest_error(case: tuple, dtype: torch.dtype, device: str) -> float:
    """The largest relative error of the loss and of its gradients; NaN if one is NaN."""
    loss, dense, keys, *ids = case
    random = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(n, D, generator=random), dim=1) for n in (N, keys)]
    inputs = [*(x.to(device, dtype) for x in features), torch.tensor(SCALE, device=device)]
    exact_inputs = [x.cpu().double() for x in inputs]
    for x in (*inputs, *exact_inputs):
        x.requires_grad_()
    value = loss(*inputs, *(x.to(device) for x in ids))
    exact = dense(*exact_inputs, ids[0][:, None] == ids[1])
    pairs = zip(
        (value, *torch.autograd.grad(value, inputs)),
        (exact, *torch.autograd.grad(exact, exact_inputs)),
        strict=True,
    )
    errors = [
        float((x.detach().cpu().double() - y.detach()).norm() / y.detach().norm()) for x, y in pairs
    ]
    return max(errors, key=lambda error: (error != error, error))


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """Set ITO_CPU_ISA inside the `with` block, unless the name is None."""
    before = os.environ.get("ITO_CPU_ISA")
    try:
        if name:
            os.environ["ITO_CPU_ISA"] = name
        yield
    finally:
        if name and before is None:
            del os.environ["ITO_CPU_ISA"]
        elif name:
            os.environ["ITO_CPU_ISA"] = before


def check() -> bool:
    """Check every backend that can run, on every instruction set; print a line for each dtype."""
    good = True
    for backend, status in ik.backends().items():
        if not status.available:
            continue
        on_gpu = backend in ("triton", "cuda") and torch.cuda.is_available()
        for isa in instruction_sets() if backend == "cpu" else [None]:
            for dtype, limit in LIMITS.items():
                with ik.use_backend(backend), instruction_set(isa):
                    errors = {
                        name: largest_error(case, dtype, "cuda" if on_gpu else "cpu")
                        for name, case in cases().items()
                    }
                wrong = [name for name, error in errors.items() if not error <= limit]
                worst = max(errors.values(), key=lambda error: (error != error, error))
                told = f"WRONG: {', '.join(wrong)}" if wrong else "right"
                name = f"{backend} {isa or ''}".strip()
                print(f"  {name:16} {str(dtype)[6:]:9} largest relative error {worst:.1e}  {told}")
                good &= not wrong
    return good


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    print(
        f"ito_kernels {ik.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    others = ", ".join(f"{name} {package_version(name)}" for name in ("triton", "numpy"))
    print(f"torch {torch.__version__}{cuda}, {others}")
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    print(f"{torch.get_num_threads()} threads; GPUs: {', '.join(gpus) or 'none'}")
    set_here = {name: value for name, value in os.environ.items() if name.startswith("ITO_")}
    print(
        f"environment: {', '.join(f'{n}={v}' for n, v in set_here.items()) or 'no ITO_ variable'}"
    )
    print("backends")
    for name, status in ik.backends().items():
        print(f"  {name:10} {'yes' if status.available else 'no '}  {status.detail}")
    print("a call with features on the CPU")
    features = torch.zeros(256, D)
    try:
        explained = ik.explain(features, features.clone())
        ik.clip_loss(features, features.clone(), SCALE)
    except ValueError as error:  # an ITO_ variable
        sys.exit(str(error))
    print("".join(f"  {line}\n" for line in explained.splitlines()), end="")
    print("values and gradients beside the dense formulas in fp64")
    good = check()
    print("all right" if good else "WRONG values: please report them, with this output")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
