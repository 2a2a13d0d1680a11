"""Measurement of time, memory, matrix products and error.

Time. Each round runs every contender once, forward and backward, and one `torch.mm` into an
existing tensor. The order changes from round to round, so that disturbances of the machine affect
all contenders equally. Results are medians over the rounds with the 20th and 80th percentiles.

Memory. The peak of a step beyond its inputs and the gradients that it returns. On the CPU it is the
growth of the peak resident set (VmHWM, reset through /proc/self/clear_refs) in the first step of
that size in a fresh process. This includes the memory of C++ kernels, and buffers that outlive the
step. A step of a small size loads the code first. Contenders that compile are warmed up at the full
size, to leave out the memory of the compiler. The resolution is about 1 MiB. On CUDA it is the peak
of PyTorch's allocator in the second step of that size: in the first, autotuners allocate buffers.

Matrix products. The FLOPs of the matrix products that ran: those of PyTorch from its profiler,
those of the native CPU kernels from their counter. GPU kernels do not count them.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing import forkserver
from typing import NamedTuple

import numpy as np
import torch
from contenders import CONTENDERS, Contender, make_inputs
from inputs import Inputs
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no messages of the profiler on stderr

MIN_ROUNDS, MAX_ROUNDS = 3, 200
PEAK_SECONDS = 0.1  # duration of the loop of multiply-adds
COPY_BYTES, COPIES = 1 << 28, 5  # many times the last-level cache
STEP_SECONDS = 600.0  # a contender with a longer first step is left out
# without ito_kernels: the fork server would import it from the working directory, which may be
# another copy than that of this process
PRELOAD = ["torch", "torch._dynamo", "torch._inductor.compile_fx"]
MAX_SCORES = 1 << 28  # elements of the result of one torch.mm: 1 GiB in fp32
WARMUP_ROWS = 128  # rows of the step that loads the code before memory is measured
CAN_MEASURE_PEAK = os.access("/proc/self/clear_refs", os.W_OK)  # on Linux outside some sandboxes


class Step(NamedTuple):
    """The results of one training step.

    forward, backward: milliseconds. grads: None for a leaf without gradient.
    """

    forward: float
    backward: float
    loss: torch.Tensor
    grads: tuple[torch.Tensor | None, ...]


def step(run: Callable[[Inputs], torch.Tensor], loss: str, x: Inputs) -> Step:
    """Run the contender `run` forward and backward, under autocast for half precision features."""
    device, dtype = x.a.device.type, x.a.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    begin = _mark(device)
    with torch.autocast(device, dtype if half else torch.bfloat16, enabled=half):
        value = run(x)
    middle = _mark(device)
    grads = torch.autograd.grad(value, x.leaves(loss), allow_unused=True)
    end = _mark(device)
    return Step(_elapsed(begin, middle), _elapsed(middle, end), value.detach(), grads)


def _mark(device: str):
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(begin, end) -> float:
    if isinstance(begin, float):
        return (end - begin) * 1e3
    end.synchronize()
    return begin.elapsed_time(end)


# Time.

# {"forward" | "backward" | "both": {"p20" | "median" | "p80": milliseconds}}
Times = dict[str, dict[str, float]]


class Gemm:
    """The unit of time: torch.mm of rows × D by D × rows into an existing tensor.

    For results with more than MAX_SCORES elements it computes a part of the columns and
    extrapolates the time.
    """

    def __init__(self, rows: int, d: int, like: torch.Tensor):
        cols = min(rows, max(1, MAX_SCORES // rows))
        self.left = torch.randn(rows, d, device=like.device, dtype=like.dtype)
        self.right = torch.randn(d, cols, device=like.device, dtype=like.dtype)
        self.out = like.new_zeros(rows, cols)
        self.rows, self.parts, self.flops = rows, rows / cols, 2 * rows * rows * d

    def __call__(self) -> tuple[float, float]:
        begin = _mark(self.out.device.type)
        torch.mm(self.left, self.right, out=self.out)
        return _elapsed(begin, _mark(self.out.device.type)) * self.parts, 0.0


def time_in_turns(runs: dict[str, Callable[[], tuple]], seconds: float) -> dict[str, Times]:
    """Time several functions in turns.

    runs: functions by name. Each returns a tuple that starts with its forward and backward
        milliseconds.
    seconds: rounds run until this time has passed, at least MIN_ROUNDS and at most MAX_ROUNDS.
    """
    samples = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    gc.collect()
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for name in order:
            samples[name].append(runs[name]()[:2])
    return {name: _summary(np.array(times)) for name, times in samples.items()}


def _summary(times: np.ndarray) -> Times:
    parts = {"forward": times[:, 0], "backward": times[:, 1], "both": times.sum(1)}
    return {
        part: dict(zip(("p20", "median", "p80"), np.percentile(x, (20, 50, 80)), strict=True))
        for part, x in parts.items()
    }


# Matrix products.


def gemm_flops(run: Callable[[], object], native: bool) -> float | None:
    """The FLOPs of the matrix products in one call; None if native kernels do not count them."""
    if native:
        counter = getattr(_native(), "gemm_flops", None)
        if counter is None:
            return None
        before = counter()
        run()
        return float(counter() - before) or None
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    flops = 0.0
    for event in profiler.events():
        name = event.name.removeprefix("aten::").rstrip("_")
        if event.name.startswith("aten::") and name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = event.input_shapes[name.count("add") :][:2]
            flops += 2.0 * np.prod(left) * right[-1]
    return flops


def instruction_set() -> str:
    """The instruction set of the native kernels; empty without the native module."""
    native = _native()
    sets = native.cpu_instruction_sets() if hasattr(native, "cpu_instruction_sets") else [""]
    return os.environ.get("ITO_CPU_ISA") or sets[0]


def peak_flops(
    dtype: torch.dtype, threads: int | None = None, isa: str | None = None
) -> float | None:
    """The FLOP/s of a loop of independent multiply-adds, in registers, on `threads`, by default
    PyTorch's number, with the native kernels' or another instruction set; None without the native
    module. fp32 on AMX: six products of bf16 count as one."""
    native = _native()
    if not hasattr(native, "cpu_peak"):
        return None
    kind = getattr(native.CpuDType, str(dtype).removeprefix("torch."))
    isa, rounds = isa or instruction_set(), 1000
    threads = threads or torch.get_num_threads()
    best = seconds = 0.0
    while seconds < PEAK_SECONDS:
        rounds *= 2
        start = time.perf_counter()
        flops = native.cpu_peak(rounds, kind, isa, threads)
        seconds = time.perf_counter() - start
        best = max(best, flops / seconds)
    return best


def copy_bandwidth() -> float:
    """Bytes read and written per second by copying COPY_BYTES on PyTorch's number of threads: the
    best of COPIES."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    target = source.clone()
    best = 0.0
    for _ in range(COPIES):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * COPY_BYTES / (time.perf_counter() - start))
    return best


def _native():
    try:
        from ito_kernels import _native
    except ImportError:
        return None
    return _native


# Error.


def relative_error(got: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    """‖got - exact‖ / ‖exact‖ over the elements of all tensors."""
    difference = sum((g.double() - e).square().sum() for g, e in zip(got, exact, strict=True))
    return float((difference / sum(e.square().sum() for e in exact)).sqrt())


# Memory.


class Probe(NamedTuple):
    """The result of a contender's first step of a size: its extra memory, or why it cannot run.

    Both are None if it runs, but the peak memory cannot be measured (CAN_MEASURE_PEAK).
    """

    extra_bytes: int | None = None
    failure: str | None = None


class MemoryProbe:
    """Runs the first steps of contenders. On the CPU each runs in a new process, forked from a
    server that has imported torch.

    compile_seconds: contenders that compile are left out if they have not finished within this time
        from now.
    """

    def __init__(self, device: str, dim: int, compile_seconds: float):
        self.device, self.dim = device, dim
        self.compile_until = time.perf_counter() + compile_seconds
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(PRELOAD)
        if device == "cpu":
            forkserver.ensure_running()  # it imports torch while this process continues

    def __call__(self, contender: Contender, loss: str, n: int, dtype: torch.dtype) -> Probe:
        args = (loss, n, self.dim, dtype, self.device)
        seconds = STEP_SECONDS
        if contender.compiles:
            seconds = min(seconds, self.compile_until - time.perf_counter())
            if seconds <= 0:
                return Probe(failure="no time left for compiling")
        if self.device != "cpu":
            return _first_step(contender, *args)
        return self._in_process(contender.name, seconds, args)

    def _in_process(self, name: str, seconds: float, args: tuple) -> Probe:
        receiver, sender = self.processes.Pipe(duplex=False)
        process = self.processes.Process(
            target=_report, args=(sender, seconds, torch.get_num_threads(), name, args)
        )
        process.start()
        sender.close()
        try:
            return receiver.recv()
        except EOFError:
            process.join()
            return Probe(failure=f"its process ended with code {process.exitcode}")
        finally:
            process.join()


class _TimeUp(BaseException):
    """Raised by the alarm. It is no Exception, so that `except Exception` does not catch it."""


def _report(sender, seconds: float, threads: int, name: str, args: tuple) -> None:
    def stop(*_):
        raise _TimeUp

    torch.set_num_threads(threads)
    if CAN_MEASURE_PEAK:
        _limit_memory()
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    contender = next(c for c in CONTENDERS if c.name == name)
    try:
        probe = _first_step(contender, *args)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeUp:
        probe = Probe(
            failure=f"its first step took more than {seconds:.0f} s, compilation included"
        )
    sender.send(probe)


def _first_step(
    contender: Contender, loss: str, n: int, dim: int, dtype: torch.dtype, device: str
) -> Probe:
    try:
        run = contender.prepare(loss, device)
        warmup_rows = n if contender.compiles or device != "cpu" else min(n, WARMUP_ROWS)
        step(run, loss, make_inputs(loss, warmup_rows, dim, dtype, device))
        x = make_inputs(loss, n, dim, dtype, device)
        before = reset_peak(device)
        grads = step(run, loss, x).grads
        returned = sum(g.numel() * g.element_size() for g in grads if g is not None)
        return Probe(None if before is None else max(0, peak_memory(device) - before - returned))
    except Exception as error:
        return Probe(failure=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def _limit_memory() -> None:
    """Make allocations beyond 80 % of the available memory fail. Otherwise the system might kill
    other processes."""
    import resource

    free = _kib("/proc/meminfo", "MemAvailable")
    limit = int((_kib("/proc/self/status", "VmData") + 0.8 * free) * 1024)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def reset_peak(device: str) -> int | None:
    """Reset the peak memory. Returns the bytes in use, or None if they cannot be measured."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not CAN_MEASURE_PEAK:
        return None
    # return freed memory to the system: its reuse would not raise the resident set
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _kib("/proc/self/status", "VmRSS") * 1024


def peak_memory(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return _kib("/proc/self/status", "VmHWM") * 1024


def _kib(file: str, field: str) -> int:
    with open(file) as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
