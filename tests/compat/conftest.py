"""What the tests of tritondeq.compat.torchdeq share: float64, and torchdeq itself where it is installed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def theirs():
    return pytest.importorskip("torchdeq")
