"""``make microbench``: each hot path, and PyTorch's batch normalisation beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.micro.paths import PATHS, HotPath, one_thread


@pytest.fixture(autouse=True)
def _like_the_check() -> Iterator[None]:
    torch.manual_seed(0)
    with one_thread():
        yield


@pytest.mark.parametrize("implementation", ["fused", "pytorch"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_path(benchmark: BenchmarkFixture, path: HotPath, implementation: str) -> None:
    benchmark.group = path.name
    with path.ready() as pair:
        benchmark(getattr(pair, implementation))
