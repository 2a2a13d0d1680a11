import pytest
import torch

pytest.register_assert_rewrite("support")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
