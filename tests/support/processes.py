"""Runs functions in several processes joined by gloo, and brings home what each rank found."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# Imports once, not in each rank: torch, and dynamo, 2.7 s, which DistributedDataParallel needs.
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["torch", "torch._dynamo", "ito_kernels", "support.processes"])


def run(target, size: int, *args, seconds: float = 60, timeout: float = 240) -> list[dict]:
    """`target(*args)` on every rank, which returns a dict of its findings. `seconds`: the group's
    time-out. A rank that ends without a result gives {}."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            SPAWN.Process(target=_work, args=(target, rank, size, folder, seconds, args))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        for process in processes:
            if process.is_alive():
                process.kill()
        files = [Path(folder) / str(rank) for rank in range(size)]
        return [torch.load(file) if file.exists() else {} for file in files]


def _work(target, rank: int, size: int, folder: str, seconds: float, args: tuple) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # whatever the machine's name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    torch.save(target(*args), f"{folder}/part{rank}")
    os.rename(f"{folder}/part{rank}", f"{folder}/{rank}")
    os._exit(0)  # a group that another rank has left would wait


def selected(request, test: str) -> list[dict]:
    """The parameters of the module's tests of this name that are to run: a fixture that starts
    processes for all of them asks for no more."""
    return [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and item.originalname == test
    ]


def findings(checks: dict) -> dict:
    """{name: None, or how the check failed} of functions without arguments."""
    found = {}
    for name, check in checks.items():
        try:
            check()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    return found
