"""Step: the same call gives the same bits, a hundred times."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from epilogues import Outcome

from benchmarks.gpu_check import families
from benchmarks.gpu_check.calls import assert_all_same_bits, on_device, run
from benchmarks.gpu_check.case import Case, Cases, Setting
from benchmarks.gpu_check.kinds import Spec

REPEATS, QUICK_REPEATS = 100, 3
MOST_ELEMENTS = 2**22


def cases(setting: Setting) -> Cases:
    """A call of each kind of launch."""
    specs = [spec for spec in families.planned(setting) if spec.elements <= MOST_ELEMENTS]
    repeats = QUICK_REPEATS if setting.quick else REPEATS
    chosen = specs[:: max(1, len(specs) // families.MOST_QUICK)] if setting.quick else specs
    return Cases(
        [Case(spec.name, partial(repeat, spec, repeats, setting)) for spec in chosen],
        about=f"forward and backward {repeats} times each, bitwise",
    )


def repeat(spec: Spec, repeats: int, setting: Setting) -> dict[str, Any]:
    """All outputs of each repetition against those of the first; other memory is taken in between.

    Raises:
        AssertionError: some differ.
    """
    call = on_device(spec.call(), setting.device)
    first = run(call, setting.backend, spec.sums)
    held = []
    for index in range(1, repeats):
        again = run(call, setting.backend, spec.sums)
        try:
            assert_all_same_bits(again, first, Outcome._fields)
        except AssertionError as error:
            raise AssertionError(f"repetition {index + 1}: {error}") from None
        held.append(torch.empty(64 * index, device=setting.device))  # so that later outputs lie elsewhere
        held = held[-5:]
    return {"repeats": repeats}
