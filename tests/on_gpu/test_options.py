"""Every pair of options of the operators, on every device and backend, against the definition in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from support.tolerances import assert_same_bits
from torch import Tensor

from on_gpu.calls import PLACES, placed, run
from on_gpu.conftest import Change
from on_gpu.kinds import small
from on_gpu.options import FACTORS, MOST, Options, apart, combinations, compare, covering_length, name_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All combinations that are needed where a device is checked; else some of them."""
    if "options" in metafunc.fixturenames:
        rows = combinations(FACTORS, MOST)
        some = slice(0, covering_length(FACTORS, rows), 1 if metafunc.config.option.device else 3)
        metafunc.parametrize("options", rows[some], ids=name_of)


def test_pairs(device: str, by: str, options: Options) -> None:
    compare(options, by, device)


@pytest.mark.parametrize("memory_format", FACTORS["memory_format"])
@pytest.mark.parametrize("dtype", FACTORS["dtype"])
def test_halves_of_passes(device: str, by: str, dtype: torch.dtype, memory_format: str) -> None:
    apart(dtype, memory_format, by, device)


# ---- is what is wrong found? -----------------------------------------------------------------------------------------


def test_the_first_combinations_hold_every_pair() -> None:
    rows = combinations(FACTORS, MOST)
    count = covering_length(FACTORS, rows)
    assert count < 80
    assert len({name_of(row) for row in rows}) == len(rows) == MOST
    for one, other in itertools.combinations(FACTORS, 2):
        held = {(row[one], row[other]) for row in rows[:count]}
        assert len(held) == len(FACTORS[one]) * len(FACTORS[other]), (one, other)
    assert rows == combinations(FACTORS, MOST)


@pytest.mark.parametrize(
    ("name", "index", "wrong"),
    [
        ("forward_training", 0, lambda y: y * (1 + 4e-5)),
        ("forward_training", 2, lambda var: var * (1 + 2e-5)),
        ("backward", 0, lambda dx: dx + 2e-4),
        ("backward", 0, lambda dx: dx.flatten().index_fill(0, torch.tensor([5]), float("nan")).view_as(dx)),
        ("backward", 1, lambda dweight: dweight.flip(0)),
        ("backward", 3, lambda dresidual: dresidual.double()),
    ],
)
def test_what_is_wrong_is_found(change: Change, name: str, index: int, wrong: Callable[[Tensor], Tensor]) -> None:
    options = {key: values[0] for key, values in FACTORS.items()} | {"activation": "silu", "residual": True}
    options["training"] = True
    compare(options, "cpu", "cpu")
    change(name, index, wrong)
    with pytest.raises(AssertionError):
        compare(options, "cpu", "cpu")


@pytest.mark.parametrize(("name", "index"), [("moments", 1), ("input_gradient", 0)])
def test_wrong_statistics_apart_are_found(change: Change, name: str, index: int) -> None:
    apart(torch.float32, "contiguous", "cpu", "cpu")
    change(name, index, lambda result: result * (1 + 1e-4))
    with pytest.raises(AssertionError):
        apart(torch.float32, "contiguous", "cpu", "cpu")


def test_fresh_memory_holds_nan_while_a_backend_runs(change: Change) -> None:
    seen = []
    change("backward", 0, lambda dx: seen.append(torch.empty(1000)) or dx)
    torch.use_deterministic_algorithms(False)
    try:
        run(small().call(), "cpu")
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(True)  # as for all tests
    assert seen[0].isnan().all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("columns", [False, True])
def test_places_in_memory(columns: bool, place: str) -> None:
    call = small(columns=columns, activation="silu", residual=True).call()
    elsewhere = placed(call, place)
    for one, other in ((call.p.x, elsewhere.p.x), (call.p.dy, elsewhere.p.dy), (call.residual, elsewhere.residual)):
        assert_same_bits(one, other)
        assert (other.data_ptr() % 16 != 0) == (place != "dense")
        assert (other.stride() != one.stride()) == (place == "window")
