"""Gives tests each backend that has kernels for the device, as ``by``, and with ``spec`` each kind of its launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from on_gpu import kinds
from tsbn_kernels import backends
from tsbn_kernels.operator import ops

Change = Callable[[str, int, Callable[[Tensor], Tensor]], None]

REFERENCE = "reference"  # is checked where a CPU is checked thoroughly


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "by" not in names or "device" not in names:
        return
    device, thorough = metafunc.config.option.device or "cpu", bool(metafunc.config.option.device)
    found = [param for param in _backends(device, thorough) if "spec" not in names or not param.marks]
    if "spec" not in names:
        metafunc.parametrize("by", found)
        return
    rows = [
        pytest.param(by, spec, wanted, id=f"{by}, {spec.name}")
        for (by,) in (param.values for param in found)
        for spec, wanted in kinds.planned(by, device).items()
    ]
    metafunc.parametrize(("by", "spec", "wanted"), rows)


def _backends(device: str, thorough: bool) -> list[Any]:
    """The backends that run there; one that is missing is skipped, with the reason."""
    kind = device.partition(":")[0]
    found = []
    for backend in backends.backends():
        if backend.runs_on(kind) and (backend.name != REFERENCE or (thorough and kind == "cpu")):
            missing = [] if backend.available else [pytest.mark.skip(f"{backend.name}: {backend.detail}")]
            found.append(pytest.param(backend.name, id=backend.name, marks=missing))
    return found


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether a device is checked; else the tests look whether the check itself works."""
    return bool(request.config.option.device)


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Change:
    """Makes the backend "cpu" give another tensor for an output of one of its operators."""
    real = ops.operators("cpu")

    def apply(name: str, index: int, wrong: Callable[[Tensor], Tensor]) -> None:
        def call(*arguments: Any) -> Any:
            found = getattr(real, name)(*arguments)
            results = list(found)
            results[index] = wrong(results[index])
            return found._make(results)

        monkeypatch.setattr(ops.batch_norm, "dispatched", real._replace(**{name: call}))

    return apply
