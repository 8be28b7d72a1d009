"""The same call gives the same bits, a hundred times."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.epilogues import Outcome

from on_gpu.calls import assert_all_same_bits, on_device, run
from on_gpu.conftest import Change
from on_gpu.kinds import Spec, small

REPEATS, FEW_REPEATS = 100, 3
MOST_ELEMENTS = 2**22


def test_repeats(device: str, by: str, spec: Spec, wanted: set[str], thorough: bool) -> None:
    """A call of each kind of launch."""
    if spec.elements > MOST_ELEMENTS:
        pytest.skip("the call is too large to be repeated so often")
    repeat(spec, REPEATS if thorough else FEW_REPEATS, by, device)


def repeat(spec: Spec, repeats: int, backend: str, device: str) -> None:
    """All outputs of each repetition against those of the first; other memory is taken in between."""
    call = on_device(spec.call(), device)
    first = run(call, backend, spec.sums)
    held = []
    for index in range(1, repeats):
        again = run(call, backend, spec.sums)
        try:
            assert_all_same_bits(again, first, Outcome._fields)
        except AssertionError as error:
            raise AssertionError(f"repetition {index + 1}: {error}") from None
        held.append(torch.empty(64 * index, device=device))  # so that later outputs lie elsewhere
        held = held[-5:]


# ---- is what is wrong found? -----------------------------------------------------------------------------------------


def test_other_bits_are_found(change: Change) -> None:
    repeat(small(), 3, "cpu", "cpu")
    calls = itertools.count()
    change("backward", 0, lambda dx: dx.nextafter(dx + 1) if next(calls) == 2 else dx)
    with pytest.raises(AssertionError, match="repetition 3: dx differs in 1176 of 1176 values"):
        repeat(small(), 5, "cpu", "cpu")
