import os
import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # shells start jobs in the background so
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and the processes they start, share the cores
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

pytest.register_assert_rewrite("support")


def pytest_configure(config):
    """pytest-xdist starts the files with few tests last; the slowest files are among them."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
