"""The Triton launches for a batch that is spread over processes, as compiled; their numbers are in test_joined.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from support import compiled
from support.epilogues import make_call
from support.synchronized_calls import assert_correct, gradient, moments, vectors
from test_triton_compiled import toy

from benchmarks.profile.compile_offline import compile_call, recorded, resources
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.triton import ops
from tsbn_kernels.operator.ops import flat


@pytest.mark.parametrize(
    ("memory_format", "dtype", "target", "activation", "shared"),
    [
        ("contiguous", torch.float32, "sm_80", "none", False),
        ("channels_last", torch.bfloat16, "sm_90", "silu", False),
        ("contiguous", torch.bfloat16, "sm_100", "relu", True),
        ("channels_last", torch.float32, "sm_90", "none", True),
    ],
)
def test_compiled(memory_format: str, dtype: torch.dtype, target: str, activation: str, shared: bool) -> None:
    """Results, bounds, races and every value written once, on the PTX machine."""
    options = {"memory_format": memory_format, "dtype": dtype, "training": False, "shared": shared}
    call = make_call(2, 5, 8, (3, 19), activation=activation, residual=activation != "none", **options)
    with compiled.machine(toy("split", target)) as machine:
        assert_correct(call, flat(ops))
    expected = ["fan_out_gather", "fan_out_gradient"] if shared else ["backward_apply"]
    assert machine.kernels == ["forward_partial", *expected]


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_machine_code(memory_format: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the plan's registers on an H100, and without a spill."""
    for name in ("forwards", "backwards"):
        monkeypatch.setattr(ops, name, {})
    monkeypatch.setattr(ops, "device_of", lambda _: DEVICES["H100"])
    call = make_call(
        3,
        4,
        64,
        (32, 32),
        activation=activation,
        residual=activation != "none",
        training=False,
        memory_format=memory_format,
        dtype=torch.bfloat16,
    )
    with recorded() as calls:
        moments(call, flat(ops))
        gradient(call, vectors(call), flat(ops))
    plans = [run.plan for run in (*ops.forwards.values(), *ops.backwards.values())]
    for launch, plan in zip(calls, plans, strict=True):
        used = resources(compile_call(launch, "sm_90")[0])
        assert used.spills == 0
        assert used.registers <= plan.registers
