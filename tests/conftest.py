import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and the processes they start, share the cores
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

pytest.register_assert_rewrite("support")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
