"""Runs every kind of launch of the Triton backend twice, and compares what reaches the driver with what was asked."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import torch
from on_gpu import kinds
from on_gpu.calls import placed
from triton.runtime import JITFunction

from benchmarks.hot_paths.fake_driver import STREAM, Driver
from support.epilogues import Call, backward, forward, make_call
from support.layer_problems import layer_problem
from support.layer_problems import run as layer_pass
from support.twice import make_call as make_second_call
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.triton import ops as triton_ops
from tsbn_kernels.backends.triton.launch import Launch
from tsbn_kernels.definition.options import Saved
from tsbn_kernels.operator import layer_ops, ops

TRITON = ops.flat(ops.operators("triton"))
TRITON_ROWS = layer_ops.flat(layer_ops.operators("triton"))
FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}
Place = tuple[int, ...]


def leaves(signature: Any, values: Any, path: Place = ()) -> Iterator[tuple[Place, str, Any]]:
    """Place, type and value of each argument, those in tuples by themselves."""
    assert len(signature) == len(values), f"{len(values)} arguments for {len(signature)}"
    for k, (kind, value) in enumerate(zip(signature, values, strict=True)):
        if isinstance(kind, tuple):
            yield from leaves(kind, value, (*path, k))
        else:
            yield (*path, k), kind, value


def expected(source: Any, arguments: tuple[Any, ...]) -> list[bytes]:
    """The parameters of a launch by the signature that the kernel was compiled for.

    Raises:
        AssertionError: an argument is none that the kernel was compiled for.
    """
    packed = []
    for path, kind, value in leaves(tuple(source.signature.values()), arguments):
        if kind == "constexpr":
            constant = source.constants[path]
            assert getattr(value, "value", value) == getattr(constant, "value", constant), f"{path} is not {constant}"
            continue
        number = value.data_ptr() if kind.startswith("*") else value
        packed.append(struct.pack("Q" if kind.startswith("*") else FORMATS[kind], number))
        for name, factor in source.attrs.get(path, ()):
            assert name == "tt.divisibility", name
            assert number % factor == 0, f"{path} is {number}, and was promised to be divisible by {factor}"
    return [*packed, bytes(8), bytes(8)]  # no memory for Triton's own use


class Judge:
    """Looks at every launch of the backend; the kernels by name that it has seen launched anew, and again."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.first: set[str] = set()
        self.again: set[str] = set()
        self.compiled: dict[Launch, Any] = {}

        self._install()

    def _install(self) -> None:
        call, run, latest = Launch.__call__, JITFunction.run, []

        def noting_run(function: JITFunction, *arguments: Any, **options: Any) -> Any:
            latest[:] = [run(function, *arguments, **options)]
            return latest[0]

        def judged(launch: Launch, *arguments: Any) -> None:
            known = launch._run is not None
            self.driver.launched.clear()
            call(launch, *arguments)
            if not known:
                (self.compiled[launch],) = latest
            (self.again if known else self.first).add(launch.kernel)
            self.compare(launch, arguments)

        JITFunction.run = noting_run
        Launch.__call__ = judged  # type: ignore[method-assign]

    def compare(self, launch: Launch, arguments: tuple[Any, ...]) -> None:
        """Raises AssertionError: something else was launched."""
        assert len(self.driver.launched) == 1, f"{len(self.driver.launched)} launches"
        (seen,) = self.driver.launched
        compiled = self.compiled[launch]
        assert seen.name == launch.kernel == compiled.name
        ctas = launch.options.get("num_ctas", 1)
        assert seen.grid == (launch.programs * ctas, 1, 1), seen.grid
        assert seen.block == (32 * launch.options["num_warps"], 1, 1), seen.block
        assert seen.shared == compiled.metadata.shared
        assert seen.stream == STREAM
        assert seen.attributes.get(4, (1, 1, 1)) == (ctas, 1, 1), "the size of clusters"
        assert 2 not in seen.attributes, "a cooperative launch"
        wanted = expected(compiled.src, (*arguments, *launch.constants))
        assert seen.parameters == wanted, f"{launch.kernel}: {seen.parameters} instead of {wanted}"


def twice(make: Callable[[], Any], run: Callable[[Any], object]) -> None:
    """The second time with tensors that lie elsewhere: they must not be those that the first launch was made for."""
    calls = [make(), make()]
    for call in calls:
        run(call)


def all_kinds() -> list[str]:
    """Every kind of plan that a part of an H100 has, and operands in other places."""
    part = replace(DEVICES["H100"], multiprocessors=8)  # few slabs fill it
    found = kinds.smallest(lambda spec: kinds.triton_kinds(spec, part))

    def passes(call: Call, sums: bool = True) -> None:
        _, mean, var = forward(call, TRITON)
        backward(call, mean, var, (True, sums, sums, True), TRITON)

    with mock.patch.object(triton_ops, "device_of", return_value=part):
        for spec in found:
            twice(spec.call, lambda call: passes(call, spec.sums))  # noqa: B023
    for place in ("dense", "shifted", "window"):
        twice(lambda: placed(make_call(2, 6, 4, (4, 4), residual=True), place), passes)  # noqa: B023
    for dtype in (torch.float16, torch.float64):
        twice(lambda: make_call(2, 6, 4, (5, 3), dtype=dtype, activation="leaky_relu"), passes)  # noqa: B023
    return sorted(set().union(*found.values()))


def joined() -> None:
    """The halves of passes that are spread over processes."""
    for fan_out in (False, True):

        def run(call: Call) -> None:
            p = call.p
            mean, var = TRITON.moments(p.x, p.num_tasks, p.stacking, call.shared)
            mean, var = mean.float().contiguous(), var.float().contiguous()
            sums = torch.zeros_like(mean), torch.zeros_like(mean)
            TRITON.input_gradient(
                p.dy, p.x, p.weight, mean, var, *sums, *p.options, p.bias, *call.epilogue, call.residual is not None
            )

        twice(lambda: make_call(2, 6, 4, (4, 4), residual=True, shared=fan_out), run)  # noqa: B023


def tracked() -> None:
    """Running statistics: the second time at addresses of which nothing is promised, by another momentum or none."""
    for some, fan_out in product((False, True), (False, True)):
        places = iter((0, 1))

        def run(call: Call) -> None:
            p, first = call.p, next(places)  # noqa: B023
            tasks, channels = p.weight.shape
            mean, var = torch.zeros(2, 16 + tasks * channels)[:, first : first + tasks * channels].unbind()
            batches, rows = torch.zeros(2, 16 + tasks, dtype=torch.int64)[:, first : first + tasks].unbind()
            momentum = None if some else 0.25 * (1 + first)  # noqa: B023
            statistics = mean.view(tasks, channels), var.view(tasks, channels), batches, momentum
            given = rows.copy_(torch.arange(tasks)) if some else None  # noqa: B023
            TRITON.forward_tracked(p.x, p.weight, p.bias, *statistics, given, *p.options, *call.epilogue)

        twice(lambda: make_call(2, 6, 4, (4, 4), shared=fan_out), run)  # noqa: B023


def of_rows() -> None:
    """Layer normalisation: one and several programs a task, with and without what may be absent, on any address."""
    forms: tuple[dict[str, Any], ...] = (
        {},
        {"residual": True},
        {"fan_out": True},
        {"rms": True, "dtype": torch.bfloat16},
    )
    for form in forms:
        for samples in (1, 40):
            twice(lambda: layer_problem(2, samples, (9,), (100,), **form), lambda p: layer_pass(p, TRITON_ROWS))  # noqa: B023


def second_derivatives() -> None:
    twice(lambda: make_second_call(2, 6, 4, (4, 4)), lambda call: (call.sums(TRITON), call.gradients(TRITON)))


def far_apart() -> None:
    """Strides of more than 32 bits, which no tensor of this machine has."""
    for stride in (1 << 33, (1 << 33) + 1):
        call = make_call(2, 6, 4, (4, 4))
        triton_ops.forwards.clear()
        _, mean, var = forward(call, TRITON)
        (run,) = triton_ops.forwards.values()
        run.x = (stride, *run.x[1:])
        run.slab._run = None
        for _ in range(2):
            run(Saved(call.p.x, call.p.weight, call.p.bias, None, mean, var), torch.empty_like(call.p.x))


def main(driver: Driver) -> dict[str, Any]:
    """Runs all of it; what was seen."""
    judge = Judge(driver)
    names = all_kinds()
    joined()
    tracked()
    of_rows()
    second_derivatives()
    far_apart()
    assert judge.first == judge.again, f"launched but once: {judge.first - judge.again}"
    return {"kernels": sorted(judge.first), "kinds": names, "launches": driver.launches}
