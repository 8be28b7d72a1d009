"""Which backend runs, how it is chosen, and what happens where a part is missing."""

from __future__ import annotations

import pytest
import torch
from support.backends import instruction_sets
from support.problems import assert_matches_definition, problem, run
from support.processes import python, python_output
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tsbn_kernels import backends, functional, use_backend
from tsbn_kernels.backends import cpu

X, W = torch.randn(4, 5, 3, 3), torch.zeros(2, 5)


class Calls(TorchDispatchMode):
    """Names of the operators called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def has_operators(calls: Calls) -> bool:
    return any(name.startswith(("tsbn.forward", "tsbn.backward")) for name in calls.names)


def used_operators(backward: bool = False) -> bool:
    """Whether a call reaches the operators that the dispatcher gives to a backend."""
    with Calls() as calls:
        x = X.clone().requires_grad_(backward)
        y = functional.task_batch_norm(x, W, num_tasks=2)
        if backward:
            y.backward(torch.ones_like(y))
    return has_operators(calls)


def test_names_in_order_of_preference() -> None:
    assert [backend.name for backend in backends.backends()][-1] == "reference"
    assert all(backend.detail for backend in backends.backends())
    assert all("\n" not in backend.detail for backend in backends.backends())


@pytest.mark.usefixtures("native")
def test_cpu_is_chosen_for_cpu_tensors() -> None:
    assert backends.select("cpu") == "cpu"
    assert backends.override("cpu") is None
    assert used_operators()


def test_other_devices_fall_back_to_the_reference() -> None:
    assert backends.select("meta") == "reference"


def test_use_backend_inside_and_after() -> None:
    with use_backend("reference"):
        assert backends.override("cpu") == "reference"
        assert backends.select("cpu") == "reference"
        assert not used_operators(backward=True)
    assert backends.override("cpu") is None
    assert used_operators()


@pytest.mark.usefixtures("native")
def test_use_backend_nests_and_survives_errors() -> None:
    with use_backend("reference"):
        with use_backend("cpu"):
            assert used_operators()
        assert not used_operators()
        with pytest.raises(ValueError, match="gate must be"), use_backend("cpu"):
            functional.task_batch_norm(X, W, num_tasks=2, gate="none")
        assert backends.override("cpu") == "reference"


def test_backward_runs_on_the_backend_of_its_forward() -> None:
    x = X.clone().requires_grad_()
    with use_backend("reference"):
        y = functional.task_batch_norm(x, W, num_tasks=2)
    with Calls() as calls:
        y.backward(torch.ones_like(y))
    assert not has_operators(calls)


def test_both_backends_agree() -> None:
    y = functional.task_batch_norm(X, W, num_tasks=2)
    with use_backend("reference"):
        torch.testing.assert_close(functional.task_batch_norm(X, W, num_tasks=2), y)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'cudnn'; known are .*reference"), use_backend("cudnn"):
        pass


@pytest.mark.usefixtures("native")
def test_backend_of_another_device() -> None:
    x: Tensor = X.to("meta")
    message = "backend 'cpu' was chosen by TSBN_BACKEND or use_backend, but it runs on cpu and the input is on meta"
    with use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        functional.task_batch_norm(x, W.to("meta"), num_tasks=2)


def test_unavailable_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", False)
    monkeypatch.setattr(cpu, "_problem", "the reason")
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: the reason"), use_backend("cpu"):
        pass
    assert backends.select("cpu") == "reference"


def test_environment_chooses() -> None:
    program = "from tsbn_kernels import backends; print(backends.override('cpu'), backends.select('cpu'))"
    assert python_output(program, TSBN_BACKEND="reference").split() == ["reference", "reference"]
    assert python_output(program, TSBN_BACKEND="").split()[0] == "None"


def test_environment_with_an_unknown_backend() -> None:
    done = python("import tsbn_kernels", TSBN_BACKEND="cudnn")
    assert done.returncode != 0
    assert "unknown backend 'cudnn'; known are" in done.stderr


def test_command_line_names_the_backend() -> None:
    program = "import runpy; runpy.run_module('tsbn_kernels', run_name='__main__')"
    text = python_output(program)
    assert backends.select("cpu") in text
    assert "reference" in text
    assert "reference" in python_output(program, TSBN_BACKEND="reference")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_instruction_sets(name: str) -> None:
    if name not in instruction_sets():
        with pytest.raises(ValueError, match=f"this processor does not run '{name}' kernels"):
            cpu.set_instruction_set(name)
        return
    best = cpu.instruction_set()
    cpu.set_instruction_set(name)
    try:
        assert cpu.instruction_set() == name
        assert name in cpu.detail()
        p = problem(2, 3, 19, (5, 7))
        assert_matches_definition(p, run(p))
    finally:
        cpu.set_instruction_set("")
    assert cpu.instruction_set() == best == instruction_sets()[0]


@pytest.mark.usefixtures("native")
def test_unknown_instruction_set_changes_nothing() -> None:
    best = cpu.instruction_set()
    with pytest.raises(ValueError, match="this processor does not run 'mmx' kernels; it chose"):
        cpu.set_instruction_set("mmx")
    assert cpu.instruction_set() == best
