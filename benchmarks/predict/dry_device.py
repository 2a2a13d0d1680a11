"""A pretended GPU: everything that the Triton backend does on the host, without one.

Tensors are PyTorch's meta tensors, which have shapes, strides, dtypes and storages but no values.
They say that they are on "cuda:0". Triton compiles nothing: each kernel that a call asks for is
noted as a `Variant`, and each launch is checked. So dispatch, the operators, autograd, tile tables,
Triton's specialisation, tensor descriptors and grids all run, and no kernel does. It cannot see
what only a launch shows: wrong addresses, races, hangs, values and times.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.compiler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.tools.tensor_descriptor import TensorDescriptor

from ito_kernels.similarity import op
from ito_kernels.similarity.triton import host, kept, tiles

CUDA, META = torch.device("cuda", 0), torch.device("meta")
PROCESSORS = {90: 132, 80: 108, 100: 148}
PACKAGE = str(Path(op.__file__).parents[1])


# ---- kernels


class Variant(NamedTuple):
    """A kernel with what Triton compiles it for."""

    arch: int
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple, object]
    attributes: dict[tuple, list]
    warps: int
    stages: int
    fusion: bool  # of multiplications and additions

    @property
    def function(self) -> triton.JITFunction:
        return getattr(import_module(self.module), self.kernel)

    @property
    def key(self) -> str:
        """Changes whenever the machine code might, for one version of Triton."""
        return hashlib.sha256(f"{tuple(self)} {_code(self.function)}".encode()).hexdigest()[:12]

    def __str__(self) -> str:
        names = list(self.signature)
        given = {
            names[k[0]]: x for k, x in self.constants.items() if x not in (None, False, "none")
        }
        pointers = [k for k, x in self.signature.items() if x[0] == "*"]
        described = " ".join(f"{k}={x}" for k, x in given.items())
        element = self.signature.get("a", "")
        return f"{self.kernel} {element} {self.warps} warps {described} {' '.join(pointers)}"


@cache
def _code(function: triton.JITFunction) -> str:
    """The code of a kernel and of all that it calls, without comments and docstrings."""
    tree = ast.parse(function.src)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    out = {ast.unparse(tree)}
    known = function.fn.__globals__
    for node in ast.walk(tree):
        found = None
        if isinstance(node, ast.Name):
            found = known.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = getattr(known.get(node.value.id), node.attr, None)
        if isinstance(found, triton.JITFunction) and found is not function:
            out.add(_code(found))
        elif isinstance(found, triton.language.constexpr):
            out.add(f"{ast.unparse(node)} = {found.value}")
    return "\n".join(sorted(out))


def _descriptor_faults(x: TensorDescriptor) -> list[str]:
    """What cuTensorMapEncodeTiled refuses."""
    size, out = x.base.element_size(), []
    if x.base.data_ptr() % 16:
        out.append("its base is not on 16 bytes")
    (stride, last), (rows, d) = x.strides, x.shape
    if last != 1 or stride * size % 16 or not d <= stride < 2**40 // size:
        out.append(f"strides {list(x.strides)} of {list(x.shape)}")
    if not (0 < rows <= 2**32 and 0 < d <= 2**32):
        out.append(f"shape {list(x.shape)}")
    if any(not 0 < block <= 256 for block in x.block_shape) or x.block_shape[-1] * size % 16:
        out.append(f"block {list(x.block_shape)}")
    return out


class _Kernel:
    """What Triton takes for a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, variant: Variant, seen: Seen):
        self.variant, self.seen = variant, seen

    def launch_metadata(self, *_) -> None:
        pass

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments) -> None:
        name = self.variant.kernel
        if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
            raise RuntimeError(f"{name}: no grid {x, y, z}")
        for argument, value in zip(self.variant.signature, arguments, strict=True):
            if isinstance(value, TensorDescriptor) and (wrong := _descriptor_faults(value)):
                raise RuntimeError(
                    f"{name}: no tensor descriptor of {argument}: {'; '.join(wrong)}"
                )
            if isinstance(value, Tensor) and not value.is_meta:
                raise RuntimeError(f"{name}: {argument} is not on the GPU")
        self.seen.launches.append(name)


# ---- what happened


class Seen:
    """What happened on the pretended GPU.

    variants: the kernels that Triton would compile.
    launches: the kernels launched, Triton's and PyTorch's, in order. An operator of PyTorch that
        computes something counts as one kernel; a few, like a sort, are several.
    waits: where the host waited for the device: {"file.py:function"}.
    """

    def __init__(self):
        self.variants: dict[str, Variant] = {}
        self.launches: list[str] = []
        self.waits: set[str] = set()
        self.in_operator = False  # PyTorch's own code for meta tensors must know what they are

    def waited(self) -> None:
        for frame in reversed(traceback.extract_stack()):
            if frame.filename.startswith(PACKAGE) and frame.name[0] != "<":  # <genexpr>
                self.waits.add(f"{Path(frame.filename).name}:{frame.name}")
                break


class _Operators(TorchDispatchMode):
    """PyTorch's operators: makes meta tensors of those on "cuda", counts the kernels that CUDA
    would run, and notices copies between host and device."""

    WITHOUT_KERNEL = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "lift_fresh",
                                "new_empty_strided", "_unsafe_view"))  # fmt: skip

    def __init__(self, seen: Seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        kwargs = {k: _meta(x) for k, x in (kwargs or {}).items()}
        self.seen.in_operator = True
        try:
            # only CUDA multiplies halves into fp32
            out = kwargs["out"] if "out_dtype" in kwargs else operator(*args, **kwargs)
        finally:
            self.seen.in_operator = False
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if not any(x.is_meta for x in tensors):
            return out
        if name in ("_to_copy", "copy_") and not all(x.is_meta for x in tensors):
            self.seen.waited()
        if not operator.is_view and name not in self.WITHOUT_KERNEL:
            self.seen.launches.append(name)
        return out


def _meta(x: object) -> object:
    """ "meta" for "cuda", anything else as it is."""
    return META if isinstance(x, (str, torch.device)) and str(x).startswith("cuda") else x


class _Driver(DriverBase):
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self) -> None:
        return None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def pretended(arch: int) -> Iterator[Seen]:
    """Inside, there is one GPU of compute capability `arch`; tensors made on "cuda" are on it."""
    seen = Seen()
    major, minor = divmod(arch, 10)
    properties = SimpleNamespace(
        name=f"pretended sm_{arch}",
        major=major,
        minor=minor,
        multi_processor_count=PROCESSORS[arch],
    )

    def compiled(source, target, options, **_) -> _Kernel:
        variant = Variant(
            arch, source.fn.module, source.fn.__name__,
            source.signature, source.constants, source.attrs,
            options["num_warps"], options["num_stages"], options["enable_fp_fusion"],
        )  # fmt: skip
        seen.variants[variant.key] = variant
        return _Kernel(variant, seen)

    def value(kind: type):
        """Reads a value, which waits for the device; it has none, so 0 stands for it."""
        read = getattr(Tensor, f"__{kind.__name__}__")

        def stand_in(x: Tensor):
            if not x.is_meta:
                return read(x)
            seen.waited()
            return kind(0)

        return stand_in

    def on_device(x: Tensor) -> bool:
        return x.is_meta and not seen.in_operator

    device, pointer = Tensor.device, Tensor.data_ptr

    def address(x: Tensor) -> int:
        """A storage starts on 512 bytes, as PyTorch's allocator has it."""
        if not x.is_meta:
            return pointer(x)
        return (x.untyped_storage()._cdata << 9) + x.storage_offset() * x.element_size()

    read_item, move = Tensor.item, Tensor.to

    def item(x: Tensor):
        return value(float)(x) if x.is_meta else read_item(x)

    on_gpu = {
        "device": property(lambda x: CUDA if on_device(x) else device.__get__(x)),
        "is_cuda": property(on_device),
        "data_ptr": address,
        "to": lambda x, *args, **kw: move(
            x, *map(_meta, args), **{k: _meta(v) for k, v in kw.items()}
        ),
        "item": item,
        **{f"__{kind.__name__}__": value(kind) for kind in (bool, int, float)},
        "__index__": value(int),
    }
    cuda = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "device": lambda device: nullcontext(),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (72 << 30, 80 << 30),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "is_current_stream_capturing": lambda: False,
    }
    modules = [x for name, x in sys.modules.items() if name.startswith(host.__package__)]
    kernels = [x for module in modules for x in vars(module).values()
               if isinstance(x, triton.JITFunction)]  # fmt: skip
    driver = triton.runtime.driver
    with ExitStack() as stack:
        for name, stand_in in on_gpu.items():
            stack.enter_context(patch.object(Tensor, name, stand_in))
        for name, stand_in in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        # a call in eager mode, although `_Operators` looks on
        stack.enter_context(patch.object(op, "can_skip_dispatcher", lambda inputs: True))
        stack.enter_context(patch.object(triton.compiler, "compile", compiled))
        stack.enter_context(patch.object(driver, "_active", None))
        driver.set_active(_Driver(arch))
        for kernel in kernels:
            kernel.device_caches.clear()
            stack.callback(kernel.device_caches.clear)
        tiles.device.cache_clear()
        stack.callback(tiles.device.cache_clear)
        stack.enter_context(patch.dict(kept._decided, clear=True))
        stack.enter_context(_Operators(seen))
        yield seen
