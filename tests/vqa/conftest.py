"""Fixtures of the tests of the library."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    """Random numbers are the same for a test whatever ran before it."""
    torch.manual_seed(0)
