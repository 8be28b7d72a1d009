"""Random combinations of options beyond those that hold every pair: as many as the time allows."""

from __future__ import annotations

import pytest

from on_gpu.options import FACTORS, MOST, Options, combinations, compare, covering_length, name_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.option.device:
        rows = combinations(FACTORS, MOST)
        metafunc.parametrize("options", rows[covering_length(FACTORS, rows) :], ids=name_of)
    else:
        enough = pytest.mark.skip("they are for a device that is checked; test_options.py holds every pair")
        metafunc.parametrize("options", [pytest.param({}, id="random", marks=enough)])


def test_combination(device: str, by: str, options: Options) -> None:
    compare(options, by, device)
