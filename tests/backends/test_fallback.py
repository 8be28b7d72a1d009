"""What becomes of kernels that do not run: who takes over, for how much, and which errors stay."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.problems import assert_matches_definition, problem, run

from tsbn_kernels import backends, use_backend
from tsbn_kernels.backends.fallback import Health, KernelError, guarded
from tsbn_kernels.definition.options import Options
from tsbn_kernels.operator.ops import flat

Operator = Callable[..., Any]

TOO_LARGE = KernelError("slab", "OutOfResources: out of resource: shared memory", own=True)
NO_COMPILER = RuntimeError("Failed to find C compiler.\nPlease specify one")


class Backend:
    """Answers with its name, or with an error; counts how often it is asked."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.health, self.error, self.asked = Health(name), error, 0

    def find(self, operator: str) -> Operator:
        def call(*arguments: Any) -> Any:
            self.asked += 1
            if self.error is not None:
                raise self.error
            self.health.proved = True
            return (self.health.name, operator, *arguments)

        return call

    def before(self, otherwise: Operator, operator: str = "forward") -> Operator:
        return guarded(self.health, operator, self.find, otherwise)


def reference(*arguments: Any) -> Any:
    return ("reference", *arguments)


def messages(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


# ---- how much is given up ----------------------------------------------------------------------------------------


def test_a_backend_that_runs_nothing_is_given_up() -> None:
    triton = Backend("Triton", NO_COMPILER)
    call = triton.before(reference)
    with pytest.warns(UserWarning, match="runs without Triton, more slowly: RuntimeError: Failed to find C compiler.$"):
        assert call(1, 2) == ("reference", 1, 2)
    assert messages(lambda: [call(3), triton.before(reference, "backward")(4)]) == []
    assert triton.asked == 1
    assert triton.health.broken == "RuntimeError: Failed to find C compiler."


@pytest.mark.parametrize("proved", [False, True])
def test_a_kernel_is_given_up_by_itself(proved: bool) -> None:
    """Also where it is the first of all; and what succeeded once goes on after any kernel's failure."""
    triton = Backend("Triton")
    triton.health.proved = proved
    forward, backward = triton.before(reference), triton.before(reference, "backward")
    for error in (TOO_LARGE, ValueError("too many programs for one launch"), *([NO_COMPILER] if proved else [])):
        triton.error = error
        assert len(messages(lambda: [forward(1), forward(2)])) == 1
        triton.error = None
        assert forward() == ("Triton", "forward")
        assert backward() == ("Triton", "backward")
    triton.error = TOO_LARGE
    assert len(messages(backward)) == 1  # of another operator
    assert not triton.health.broken
    assert triton.asked > 8


def test_the_warning_names_the_kernel_and_the_reason() -> None:
    (text,) = messages(Backend("Triton", TOO_LARGE).before(reference))
    assert text == (
        "tsbn-kernels runs without the kernel slab of Triton, more slowly: "
        "OutOfResources: out of resource: shared memory"
    )


def test_each_class_of_error_is_told() -> None:
    triton = Backend("Triton", TOO_LARGE)
    call = triton.before(reference)
    assert len(messages(call)) == 1
    triton.error = KernelError("slab", "CompilationError: at 3:7", own=True)
    assert len(messages(lambda: [call(), call()])) == 1


def test_a_chain_ends_at_the_reference() -> None:
    triton, cuda = Backend("Triton", TOO_LARGE), Backend("CUDA C++", ValueError("no room for 900 tasks"))
    call = triton.before(cuda.before(reference))
    assert [text.split(",")[0] for text in messages(lambda: call(5) == ("reference", 5))] == [
        "tsbn-kernels runs without the kernel forward of CUDA C++",
        "tsbn-kernels runs without the kernel slab of Triton",
    ]
    cuda.error = None
    assert call(6) == ("CUDA C++", "forward", 6)
    triton.error = None
    assert call(7) == ("Triton", "forward", 7)


# ---- when an error stays -----------------------------------------------------------------------------------------

FATAL = [
    torch.OutOfMemoryError("80 GiB"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    *(
        RuntimeError(f"{who}{what}")
        for who in ("Triton Error [CUDA]: ", "tsbn: the CUDA kernel was not launched: ")
        for what in (
            "out of memory",
            "an illegal memory access was encountered",
            "an illegal instruction was encountered",
            "misaligned address",
            "operation not supported on global/shared address space",
            "invalid program counter",
            "hardware stack error",
            "unspecified launch failure",
            "the launch timed out and was terminated",
            "device-side assert triggered",
            "uncorrectable ECC error encountered",
            "context is destroyed",
            "operation not permitted when stream is capturing",
            "operation failed due to a previous error during capture",
        )
    ),
]


@pytest.mark.parametrize("error", FATAL, ids=str)
@pytest.mark.parametrize("proved", [False, True])
def test_what_no_other_kernel_mends_is_raised(error: Exception, proved: bool) -> None:
    triton = Backend("Triton", error)
    triton.health.proved = proved
    call = triton.before(reference)
    with pytest.raises(type(error)) as raised:
        call()
    assert raised.value is error
    assert not triton.health.broken
    assert not triton.health.failures
    triton.error = None
    assert call() == ("Triton", "forward")


def test_the_callers_error_is_the_references() -> None:
    """Nothing is given up, and no warning is heard."""

    def picky(*arguments: Any) -> Any:
        raise TypeError("weight must be a tensor")

    triton = Backend("Triton", TypeError("an integer has no shape"))

    def call() -> None:
        with pytest.raises(TypeError, match="weight must be a tensor") as raised:
            triton.before(picky)(1)
        assert raised.value.__cause__ is triton.error

    assert messages(call) == []
    assert not triton.health.broken
    assert not triton.health.failures


@pytest.mark.parametrize("error", [TOO_LARGE, NO_COMPILER])
def test_a_backend_that_was_chosen_raises(error: Exception) -> None:
    triton = Backend("Triton", error)
    with use_backend("reference"), pytest.raises(RuntimeError) as raised:
        triton.before(reference)()
    assert raised.value is error
    assert not triton.health.broken
    assert not triton.health.failures


def test_the_memory_of_the_attempt_is_free_before_the_next() -> None:
    """What a failed attempt allocated is of the size of x."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def attempt() -> None:
        y = torch.empty(5)
        alive.append(weakref.ref(y))
        try:
            raise ValueError("deep inside")
        except ValueError as error:
            raise TOO_LARGE from error

    call = guarded(Health("Triton"), "forward", lambda name: attempt, lambda: alive[0]() is None)
    assert len(messages(lambda: alive.append(call()))) == 1
    assert alive[1] is True


# ---- who is asked ------------------------------------------------------------------------------------------------


def test_a_broken_backend_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.triton, "available", True)
    monkeypatch.setattr(backends.triton.health, "broken", "RuntimeError: Cannot find ptxas")
    monkeypatch.setattr(backends.cuda, "available", False)
    assert backends.select("cuda") == "reference"
    message = "'triton' is not available: Triton failed: RuntimeError: Cannot find ptxas"
    with pytest.raises(RuntimeError, match=message), use_backend("triton"):
        pass


# ---- Triton's launches -------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton")
    from tsbn_kernels.backends import triton
    from tsbn_kernels.backends.triton import launch

    monkeypatch.setattr(triton, "health", Health("Triton"))
    return launch


class Kernel:
    """Of a launch: it counts how often it is compiled."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.compiled = error, 0

    def __getitem__(self, grid: object) -> Operator:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.compiled += 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("own", [True, False])
def test_what_failed_is_not_compiled_again(launches: Any, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    kernel = Kernel(OutOfResources(300_000, 232_448, "shared memory") if own else OSError("no space\nleft"))
    monkeypatch.setattr(launches.Launch, "function", kernel)
    launch = launches.Launch("forward_slab", 1, {})
    for _ in range(3):
        with pytest.raises(KernelError, match="the kernel forward_slab does not run: O") as raised:
            launch()
        assert raised.value.own is own
    assert kernel.compiled == 1
    assert raised.value.__cause__ is None  # nor are the tensors of the first call kept


def test_what_failed_with_the_process_is_no_ones_fault(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(RuntimeError("Triton Error [CUDA]: out of memory"))
    monkeypatch.setattr(launches.Launch, "function", kernel)
    launch = launches.Launch("forward_slab", 1, {})
    with pytest.raises(RuntimeError, match=r"^Triton Error \[CUDA\]: out of memory"):
        launch()
    kernel.error = None
    launch()
    assert kernel.compiled == 2


def test_only_a_kernel_proves_a_backend(launches: Any) -> None:
    """An empty input launches nothing."""
    from support.interpreter import device, interpreted

    from tsbn_kernels.backends import triton

    p = problem(2, 2, 1, (2,))
    with interpreted(device(threads=64)):
        triton.operator("forward_training")(p.x[:0], p.weight, p.bias, None, Options(*p.options))
        assert not triton.health.proved
        triton.operator("forward_training")(p.x, p.weight, p.bias, None, Options(*p.options))
        assert triton.health.proved


@pytest.mark.parametrize("broken", ["forward_slab", "backward_slab"])
def test_an_operator_of_which_one_kernel_fails(launches: Any, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the dispatcher: the other pass stays with Triton, and the results are right."""
    from support.interpreter import device, interpreted, passes
    from triton.runtime.errors import OutOfResources

    from tsbn_kernels.backends import triton
    from tsbn_kernels.definition import batch_norm as last

    p, whole = problem(2, 2, 1, (2,)), launches.Launch.function
    too_large = Kernel(OutOfResources(300_000, 232_448, "shared memory"))
    library = torch.library.Library("tsbn", "IMPL")
    with interpreted(device(threads=64)), monkeypatch.context() as patch:
        function = property(lambda self: too_large if self.kernel == broken else whole.fget(self))
        patch.setattr(launches.Launch, "function", function)
        try:
            names = ("forward_training", "forward_eval", "backward")
            chains = {name: guarded(triton.health, name, triton.operator, getattr(last, name)) for name in names}
            for name, operator in flat(SimpleNamespace(**chains))._asdict().items():
                library.impl(name, operator, "CPU", allow_override=True)
            assert len(messages(lambda: [assert_matches_definition(p, run(p)) for _ in range(3)])) == 1
        finally:
            library._destroy()
        assert len(passes()) == 2
    assert too_large.compiled == 1
    assert [kernel for _, kernel, _ in triton.health.failures] == [broken]
    assert triton.health.proved
