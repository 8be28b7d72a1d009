"""What tests of several networks use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def unpooling() -> Iterator[None]:
    """Lets networks unpool: PyTorch has no unpooling that it calls deterministic, as all tests ask for."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)
