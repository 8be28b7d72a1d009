"""Triton's own launcher, as it is, on a driver that notes what it is told: a GPU is all that is missing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable

import pytest
from support.processes import python_output

from benchmarks.hot_paths.fake_driver import COMPILER
from tsbn_kernels.backends.plan.triton import compiles_clusters

triton = pytest.importorskip("triton")
if importlib.util.find_spec("triton.backends.nvidia") is None:
    pytest.skip("this Triton is not for NVIDIA's GPUs", allow_module_level=True)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

Program = Callable[..., list[str]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Runs a program in a process of its own, with a folder for the driver and one for what is compiled: its lines."""
    folder = tmp_path_factory.mktemp("driver")

    def run(text: str, cache: str = "cache", **environment: str) -> list[str]:
        start = (
            "from pathlib import Path; from benchmarks.hot_paths.fake_driver import Driver; "
            f"driver = Driver(Path({str(folder)!r}))\n"
        )
        cache = str(folder / cache)
        return python_output(start + text, TRITON_CACHE_DIR=cache, OMP_NUM_THREADS="1", **environment).splitlines()

    return run


def test_every_parameter_of_every_kind_of_launch(program: Program) -> None:
    told = json.loads(
        program("import json\nfrom support import launches\nprint(json.dumps(launches.main(driver)))")[-1]
    )
    clusters = {f"rows {direction} cluster" for direction in ("forward", "backward") if compiles_clusters()}
    assert len(told["kernels"]) == 16 + len(clusters)
    variants = {"resident", "split", "elementwise"}
    kinds = {
        f"{family} {direction} {variant}{how}"
        for family in ("rows", "columns")
        for direction in ("forward", "backward")
        for how in ("", ", fan-out")
        for variant in variants | ({"streaming"} if not how else set())
    }
    assert set(told["kinds"]) == kinds | clusters
    assert told["launches"] > 100


BROKEN = """
from support import launches
from support.epilogues import forward, make_call
from tsbn_kernels.definition.options import Saved
from triton.runtime import driver as of_triton
launches.Judge(driver)
stream_of, streams = of_triton.active.get_current_stream, [None]
of_triton.active.get_current_stream = lambda device: streams[0] or stream_of(device)
call = make_call(2, 6, 4, (4, 8))
_, mean, var = forward(call, launches.TRITON)
(run,) = launches.triton_ops.forwards.values()
slab, right = run.slab, run.slab._run
for change in {changes!r}:
    x, view, programs, options = call.p.x, run.x, slab.programs, dict(slab.options)
    exec(change)
    try:
        run(Saved(x, call.p.weight, call.p.bias, None, mean, var), call.p.dy)
        print("wrong" if change else "right")
    except AssertionError as error:
        print("found" if change else "wrong")
    run.x, slab.programs, slab.options, slab._run, streams[0] = view, programs, options, right, None
"""
CHANGES = [
    "",
    "slab._run = lambda *a: right(*a[:12], a[13], a[12], *a[14:])",
    "slab._run = lambda *a: right(a[0]._replace(n=a[0].c, c=a[0].n), *a[1:])",
    "streams[0] = 5",
    "slab._run = lambda *a: (right(*a), right(*a))",
    "slab.programs += 1",
    "slab.options['num_warps'] *= 2",
    "slab.options['num_ctas'] = 2",
    "run.x = (run.x[0] + 1, *run.x[1:])",  # no multiple of 16, which was promised
    "x = x.flatten()[1:]",  # nor this
    "",
]


def test_a_launch_that_is_wrong_is_found(program: Program) -> None:
    assert program(BROKEN.format(changes=CHANGES)) == ["found" if change else "right" for change in CHANGES]


AGAIN = """
from triton import knobs
from triton.compiler.compiler import CompiledKernel
from support import launches
from support.epilogues import forward, make_call
from tsbn_kernels.backends.triton import again

heard, known, described = [], again.KNOWN, CompiledKernel.launch_metadata
def describe(*arguments):
    heard.append("runner")
    return described(*arguments)
CompiledKernel.launch_metadata = describe
judge, call = launches.Judge(driver), make_call(2, 6, 4, (4, 8))

def launch(name):
    heard.clear()
    try:
        forward(call, launches.TRITON)
    except Exception as error:  # of what Triton would need
        heard.append("failed")
    print(name, *heard, sep=", ")

launch("first")
launch("nobody")
for name in ("launch_enter_hook", "launch_exit_hook"):
    chain, hook = getattr(knobs.runtime, name), lambda told: heard.append("hook")
    chain.add(hook)
    launch("a chain")
    chain.remove(hook)
    for kind, value in {{"a function": hook, "none": None, "an empty chain": chain}}.items():
        setattr(knobs.runtime, name, value)
        launch(kind)
(run,) = launches.triton_ops.forwards.values()
compiled = judge.compiled[run.slab]
own, launcher = type(compiled.run), compiled.run.launch
other = type("Launcher", (own,), {{"__module__": "elsewhere"}})
for change, back in {changes!r}.items():
    exec(change)
    run.slab._run = again.launcher_of(compiled, run.slab.programs)
    launch(change)
    exec(back)
"""
NOT_KNOWN = {
    "again.KNOWN = ('0.',)": "again.KNOWN = known",
    "compiled.run.__class__ = other": "compiled.run.__class__ = own",
    "compiled.run.launch = lambda *a: launcher(*a)": "compiled.run.launch = launcher",
    "compiled.run.global_scratch_size = 8": "compiled.run.global_scratch_size = 0",
    "compiled.run.profile_scratch_size = 8": "compiled.run.profile_scratch_size = 0",
    "compiled.run.gsan_enabled = True": "compiled.run.gsan_enabled = False",
}


def test_who_launches_again(program: Program) -> None:
    """Triton's runner does so where a hook listens, and where the launcher is not the one that is known."""
    from tsbn_kernels.backends.triton import again

    if not triton.__version__.startswith(again.KNOWN):
        pytest.skip("all is left to Triton's runner, which may describe a launch or not")
    watched = ["a chain, runner, hook", "a function, runner, hook", "none", "an empty chain"]
    first, nobody, *of_hooks = program(AGAIN.format(changes=NOT_KNOWN | {"pass": "pass"}))
    *changed, last = of_hooks[len(watched) * 2 :]
    assert (first, nobody) == ("first, runner", "nobody")
    assert of_hooks[: len(watched) * 2] == watched * 2
    assert [line.removesuffix(", failed") for line in changed] == [f"{change}, runner" for change in NOT_KNOWN]
    assert last == "pass"


FAILING = """
import warnings, torch
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.backends import triton
from tsbn_kernels.backends.fallback import guarded
from tsbn_kernels.definition.options import Options

chain = guarded(triton.health, "forward_training", triton.operator, reference.forward_training)

def train(*size):
    x, w = torch.randn(size), torch.zeros(2, size[1])
    arguments = x, w, None, None, Options(2, 1e-5, "sigmoid", "task_major")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        y = chain(*arguments)[0]
    print("reference" if torch.equal(y, reference.forward_training(*arguments)[0]) else "triton")
    print(*[str(w.message).partition(", more slowly: ")[2] for w in heard] or ["no warning"], sep="|")

try:
    {first}
    train(4, 3, 5)
    {second}
    train(64, 2, 150, 150)  # split
except RuntimeError as error:
    print("raised", error)
print("broken" if triton.health.broken else "alive", driver.launches)
"""


def test_two_calls(program: Program) -> None:
    assert program(FAILING.format(first="", second="")) == ["triton", "no warning"] * 2 + ["alive 3"]


def test_a_kernel_that_the_driver_does_not_launch(program: Program) -> None:
    """It alone is left to the reference, though it was the first of all."""
    first, second = "driver.set('launch_error', 1)", "driver.set('launch_error', 0)"
    assert program(FAILING.format(first=first, second=second)) == [
        "reference",
        "RuntimeError: Triton Error [CUDA]: invalid argument",
        "triton",
        "no warning",
        "alive 3",
    ]


@pytest.mark.skipif(not compiles_clusters(), reason="this Triton compiles no clusters")
def test_a_cluster_that_the_gpu_refuses(program: Program) -> None:
    """Such slabs are split from then on, and the other kernels go on. With 16 blocks it takes an attribute."""
    calls = FAILING.replace("train(4, 3, 5)", "[train(64, 4, 70, 70) for _ in (1, 2)]")
    for most, asked in ((16, [1, 1]), (8, [3, 2])):
        told = program(calls.format(first=f"driver.set('cluster', {most})", second=""))
        warning = "no warning" if most == 16 else "RuntimeError: Triton Error [CUDA]: invalid argument"
        assert told == ["triton", warning, "triton", "no warning", "triton", "no warning", f"alive {sum(asked) + 2}"]


def test_a_context_that_is_lost(program: Program) -> None:
    error = "Triton Error [CUDA]: an illegal memory access was encountered"
    failing = "driver.set('launch_error', 700)"
    assert program(FAILING.format(first=failing, second="")) == [f"raised {error}", "alive 1"]
    assert program(FAILING.format(first="", second=failing))[2:] == [f"raised {error}", "alive 2"]


def test_a_kernel_that_needs_too_much(program: Program) -> None:
    *first, who, why, end = program(FAILING.format(first="driver.set('shared', 16)", second=""))
    assert first == ["triton", "no warning"]
    assert who == "reference"
    assert why.startswith("OutOfResources: out of resource: shared memory, Required: ")
    assert end == "alive 1"


@pytest.mark.parametrize("missing", ["compiler", "driver", "assembler"])
def test_what_every_kernel_needs(program: Program, missing: str) -> None:
    """Triton is given up at once, and not asked again."""
    first = "torch.cuda.is_available = lambda: False" if missing == "driver" else ""
    if missing == "assembler":
        first = "from triton import knobs; knobs.NvidiaTool.from_path = lambda path: None"
    environment = {"PATH": "/nowhere", "CC": ""} if missing == "compiler" else {}
    who, why, *rest = program(FAILING.format(first=first, second=""), cache=missing, **environment)
    assert (who, rest) == ("reference", ["reference", "no warning", "broken 0"])
    assert "Error: " in why
