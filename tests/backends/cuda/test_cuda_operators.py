"""The backend from the operator to the launch, with a library that notes launches instead of making them.

What it was told to launch then runs in the PTX machine: so everything but the CUDA runtime's own call is proved.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.problems import problem
from support.processes import ROOT, python, python_output

from tools.ptxvm import find_nvcc
from tsbn_kernels import backends
from tsbn_kernels.backends import cuda
from tsbn_kernels.backends.plan.slots import PASSES
from tsbn_kernels.definition.activations import INVERSE, NONE
from tsbn_kernels.definition.options import Needs, Options, Saved

needs_nvcc = pytest.mark.skipif(find_nvcc() is None or shutil.which("g++") is None, reason="no nvcc or no g++")

STUB = r"""
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#include "launch.h"
namespace { std::vector<std::string> notes; }
namespace tsbn::cuda {
const char* launch(const Launch& l, const void* params, void*) {
  if (const char* error = std::getenv("STUB_ERROR")) return error;
  const size_t size = l.pass < kRowForward ? sizeof(Params) : sizeof(RowParams);
  notes.push_back(std::string((const char*)&l, sizeof l) + std::string((const char*)params, size));
  return nullptr;
}
int active_clusters(const Launch& l) { return l.cluster <= 8 ? (l.together ? 1 << 20 : 132) / l.cluster : 0; }
}
extern "C" __attribute__((visibility("default"))) int take_note(void* to) {
  if (notes.empty()) return 0;
  const int size = notes.front().size();
  std::memcpy(to, notes.front().data(), size);
  notes.erase(notes.begin());
  return size;
}
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package whose CUDA library only takes notes."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "tsbn_kernels", folder / "tsbn_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "stub.cpp").write_text(STUB)
    root = Path(torch.__file__).parent
    library = folder / "tsbn_kernels" / "_cuda.so"
    library.unlink(missing_ok=True)
    csrc = ROOT / "csrc/cuda"
    defined = ["-DTSBN_WITHOUT_DEVICE", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    headers = ["-isystem", root / "include", "-I", csrc]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    sources = [csrc / "launch.cpp", folder / "stub.cpp"]
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", *defined, *headers, *sources, "-o", library, *libraries],
        check=True,
    )
    return folder


PROGRAM = """
import ctypes, itertools, sys
sys.path.insert(0, {tests!r})
import torch
from tsbn_kernels.backends import cuda
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.plan.slots import PASSES
from cuda_machine import POINTERS, dx_of_fan_out, parameters, told
from cuda_source import ptx
from tools.ptxvm import Out, launch
from support.tolerances import BACKWARD, FORWARD, assert_within
from support.problems import Results, assert_matches_definition, defined, problem
from tsbn_kernels.operator import ops

flat = ops.flat(cuda)
cuda.launches.device_of = lambda _: DEVICES[{device!r}]
notes = ctypes.CDLL(str(cuda._LIBRARY))
names = ("rows", "columns", "scalar"), PASSES, ("f32", "f64", "f16", "bf16")

def obey(inputs, outputs):
    "Runs what was noted: each address must be that of a tensor, all others null."
    known = {{t.data_ptr(): t for t in inputs if t is not None}}
    known |= {{t.data_ptr(): Out(t) for t in outputs}}
    raw, kinds = ctypes.create_string_buffer(1 << 12), []
    buffers = {{name: torch.zeros(1 << 20, dtype=torch.uint8) for name in ("partial", "staged")}}
    while size := notes.take_note(raw):
        kernel, addresses, reals, numbers = told(memoryview(raw)[:size])
        dtype, access, direction, blocks, threads, cluster, shared, together = kernel
        phases, training = numbers[:2]
        pointers = []
        for name, address in zip(POINTERS, addresses, strict=True):
            value = buffers[name] if name in buffers and address else known[address] if address else 0
            written = phases & 8 or (phases & 1 and not training) if name == "out" else phases != 3
            if name == "dresidual":
                written = phases & 1 or not phases & 4
            if name == "out" and address and names[1][direction] == "backward_fan_out" and training:
                value = dx_of_fan_out(value.array, phases, bool(addresses[POINTERS.index("staged")]))
            elif isinstance(value, Out) and not written:
                value = 0
            pointers.append(value)
        kinds.append((names[0][access], cluster, blocks, phases))
        kernel = names[1][direction] + "_together" * together
        launch(
            ptx(), f"tsbn_{{kernel}}_{{names[2][dtype]}}_{{names[0][access]}}", blocks, threads,
            [parameters(pointers, numbers, *reals)],
            cluster=cluster, shared=shared, cooperative=bool(together),
        )
    return kinds

for size, dtype, memory_format, stacking in itertools.product(
    {sizes!r}, (torch.float32, torch.bfloat16), ("contiguous", "channels_last"), ("task_major", "sample_major")
):
    if size[0] == 1 and stacking == "sample_major":
        continue  # one task has one order
    p = problem(*size, dtype=dtype, memory_format=memory_format, stacking=stacking)
    y, mean, var = flat.forward_training(p.x, p.weight, p.bias, *p.options)
    kinds = obey((p.x, p.weight, p.bias), (y, mean, var))
    gradients = flat.backward(p.dy, p.x, p.weight, mean, var, *p.options, True, True, True, True)[:3]
    kinds += obey((p.x, p.dy, p.weight, mean, var), gradients)
    assert_matches_definition(p, Results(y, mean, var, *gradients))
    assert y.stride() == p.x.stride()
    z = flat.forward_eval(p.x, p.weight, p.bias, mean, var, *p.options)
    kinds += obey((p.x, p.weight, p.bias, mean, var), (z,))
    assert (z.double() - y.double()).abs().max() < 0.05
    dx, nothing, dbias, _ = flat.backward(p.dy, p.x, p.weight, mean, var, *p.options, False, True, False, True)
    kinds += obey((p.x, p.dy, p.weight, mean, var), (dx, dbias))
    assert nothing.numel() == 0 and dx.isfinite().all()
    print(*kinds)

for shared, activation, stacking in itertools.product((False, True), ("none", "silu"), ("sample_major", "task_axis")):
    size = {sizes!r}[0]
    if size[0] == 1 and stacking == "sample_major":
        continue
    p = problem(*size, dtype=torch.bfloat16, memory_format="channels_last", stacking=stacking)
    residual = p.dy.flip(0)
    x = p.x.unflatten(0, (-1, p.num_tasks))[:, 0] if stacking == "sample_major" else p.x[0]
    x = x if shared else p.x
    epilogue = residual, activation, 0.25, shared
    wide = x.double(), p.weight.double(), p.bias.double()
    y, mean, var = flat.forward_training(x, p.weight, p.bias, *p.options, *epilogue)
    kinds = obey((x, p.weight, p.bias, residual), (y, mean, var))
    exact = defined.forward_training(*wide, *p.options, residual.double(), *epilogue[1:])
    assert_within(y, exact[0], FORWARD[y.dtype], 2.0)
    z = flat.forward_eval(x, p.weight, p.bias, mean, var, *p.options, *epilogue)
    obey((x, p.weight, p.bias, mean, var, residual), (z,))
    assert_within(z, exact[0], FORWARD[y.dtype], 2.0)
    for training in (True, False):
        need = True, True, True, True
        got = flat.backward(
            p.dy, x, p.weight, mean, var, *p.options, training, *need[:3], p.bias, *epilogue, activation != "none"
        )
        kinds += obey((x, p.dy, p.weight, p.bias, mean, var, residual), [t for t in got if t.numel()])
        wanted = defined.backward(
            p.dy.double(), *wide[:2], *exact[1:], *p.options, training, *need[:3], wide[2], residual.double(),
            *epilogue[1:], activation != "none",
        )
        for actual, expected in zip(got, wanted, strict=True):
            assert actual.shape == expected.shape
            if actual.numel():
                assert_within(actual, expected, BACKWARD[torch.bfloat16], 40.0)
    print(*kinds)

for momentum, rows in ((0.25, None), (None, torch.tensor([2, 0]))):
    p = problem(2, 3, 5, (4,))
    got = torch.zeros(3 if momentum is None else 2, 5), None, torch.arange(3 if momentum is None else 2)
    wanted = [None if v is None else v.clone() for v in got]
    y, mean, var = flat.forward_tracked(p.x, p.weight, p.bias, *got, momentum, rows, *p.options)
    obey((p.x, p.weight, p.bias, *got, rows), (y, mean, var))
    defined.forward_tracked(p.x, p.weight, p.bias, *wanted, momentum, rows, *p.options)
    torch.testing.assert_close(got[0], wanted[0])
    assert torch.equal(got[2], wanted[2]) and got[2].sum() == sum(range(len(got[2]))) + 2
"""


@needs_nvcc
@pytest.mark.parametrize(
    ("device", "sizes", "kinds"),
    [
        ("H100", [(2, 3, 5, (7, 7)), (2, 4, 24, (4, 8))], ("'rows'", "'columns'", "'scalar'")),
        ("H100", [(1, 2, 8, (64, 65))], (", 8, ",)),
        ("A100", [(1, 2, 8, (64, 65))], (", 1, ", ", 3)", ", 12)")),
    ],
)
def test_launches_of_the_operators(package: Path, device: str, sizes: list[object], kinds: tuple[str, ...]) -> None:
    program = PROGRAM.format(tests=str(Path(__file__).parent), device=device, sizes=sizes)
    printed = python_output(program, path=package)
    for kind in kinds:
        assert kind in printed


ROWS = """
import ctypes, sys
sys.path.insert(0, {tests!r})
import torch
from tsbn_kernels.backends import cuda
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.plan.slots import PASSES
from cuda_machine import POINTERS, parameters, told
from cuda_source import ptx
from tools.ptxvm import Out, launch
from support.layer_problems import assert_matches_definition, layer_problem, run
from tsbn_kernels.operator import layer_ops

flat = layer_ops.flat(cuda)
cuda.launches.device_of = lambda _: DEVICES["H100"]
notes = ctypes.CDLL(str(cuda._LIBRARY))
names = "layer_norm_forward", "layer_norm_backward", "layer_norm_parameters"

def obey(inputs, outputs):
    "Runs what was noted: each address must be that of a tensor, or null. Returns the kernels that were launched."
    known = {{t.data_ptr(): t for t in inputs if isinstance(t, torch.Tensor)}}
    known |= {{t.data_ptr(): Out(t) for t in outputs if t.numel()}}
    raw, seen, partial = ctypes.create_string_buffer(1 << 12), [], torch.zeros(1 << 20, dtype=torch.uint8)
    while size := notes.take_note(raw):
        kernel, addresses, reals, numbers = told(memoryview(raw)[:size])
        dtype, access, which, blocks, threads, cluster, shared, together = kernel
        name, merged = names[which - len(PASSES)], bool(addresses[POINTERS.index("partial")])
        pointers = []
        for operand, address in zip(POINTERS, addresses, strict=True):
            value = partial if operand == "partial" and address else known[address] if address else 0
            last = name == names[2]
            if isinstance(value, Out) and last != (operand in ("first", "second")) and (merged or last):
                value = 0
            pointers.append(value)
        kind = ("f32", "f64", "f16", "bf16")[dtype]
        seen.append(name)
        end = f"{{kind}}_{{('rows', 0, 'scalar')[access]}}" if name != names[2] else "f64" if kind == "f64" else "f32"
        struct = parameters(pointers, numbers, *reals)
        text = ptx(90, "layer_norm.cu")
        launch(text, f"tsbn_{{name}}_{{end}}", blocks, threads, [struct], cluster=cluster, shared=shared)
    return seen

class Obeyed:
    def layer_norm(*arguments):
        found = flat.layer_norm(*arguments[1:])
        seen.extend(obey(arguments, found))
        return found
    def layer_norm_backward(*arguments):
        found = flat.layer_norm_backward(*arguments[1:])
        seen.extend(obey(arguments, found))
        return found

for form in ({{}}, {{"residual": True}}, {{"rms": True}}, {{"fan_out": True}}, {{"gate": "identity", "bias": False}}):
    for dtype in (torch.float32, torch.bfloat16):
        for stacking in ("task_major", "sample_major", "task_axis"):
            for tokens, shape in (((1,), (5,)), ((40,), (4, 6))):
                seen = []
                p = layer_problem(2, 3, tokens, shape, dtype=dtype, stacking=stacking, **form)
                assert_matches_definition(p, run(p, Obeyed()))
                print(*seen)
"""


@needs_nvcc
def test_launches_of_layer_normalisation(package: Path) -> None:
    """One launch a pass, and a small one where several blocks of a task leave sums for the parameters' gradients."""
    forward, backward, parameters = "layer_norm_forward", "layer_norm_backward", "layer_norm_parameters"
    printed = python_output(ROWS.format(tests=str(Path(__file__).parent)), path=package).splitlines()
    assert len(printed) == 60
    assert set(printed) == {f"{forward} {backward}", f"{forward} {backward} {parameters}"}


MIXED = """
import ctypes, torch
from math import nan
from tsbn_kernels.backends import cuda
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.definition.options import Needs, Options, Running, Saved

cuda.launches.device_of = lambda _: DEVICES["H100"]
notes, raw = ctypes.CDLL(str(cuda._LIBRARY)), ctypes.create_string_buffer(1 << 12)
launch, told = cuda.launches.launch, []

def observed(name, kernel, numbers, eps, slope, operands):
    *tensors, momentum = operands
    reals = torch.tensor([eps, slope, nan if momentum is None else momentum], dtype=torch.float64)
    addresses = (0 if t is None else t.data_ptr() for t in tensors)
    told.append([*kernel, *addresses, *reals.view(torch.int64).tolist(), *numbers])
    launch(name, kernel, numbers, eps, slope, operands)

cuda.launches.launch = observed
x, weight = torch.randn(9, 24), torch.randn(4, 24)
options = Options(4, 1e-5, "sigmoid", "task_major", "leaky_relu", 0.25)
index = torch.tensor([0, 2, 0, 3, 3, 2, 2, 0, 3])
running = Running(torch.zeros(4, 24), torch.ones(4, 24), torch.zeros(4, dtype=torch.int64))
found = cuda.mixed_forward_tracked(x, index, weight, weight, x, running, options)
saved = Saved(x, weight, weight, x, found.mean, found.var)
cuda.mixed_forward_eval(saved, index, options)
cuda.mixed_backward(x, saved, index, True, Needs(True, True, True, True), options)
cuda.moments(x, options._replace(num_tasks=3))
heard = []
while size := notes.take_note(raw):
    heard.append(memoryview(raw)[:size].cast("B").cast("q").tolist())
print(len(told), told == heard, *(one[2] for one in told))
"""


@needs_nvcc
def test_launches_of_mixed_batches(package: Path) -> None:
    """The driver hears what the plans say: keys, sums and results, beside the addresses of all operands."""
    count, same, *passes = python_output(MIXED, path=package).split()
    assert (count, same) == ("10", "True")
    assert [PASSES[int(number)] for number in passes] == [
        "mixed_keys",
        *["forward_mixed"] * 3,
        *["mixed_keys"] * 3,
        *["backward_mixed"] * 2,
        "forward",
    ]


@needs_nvcc
def test_empty_input_launches_nothing(package: Path) -> None:
    program = """
import ctypes, torch
from tsbn_kernels.operator import ops
from tsbn_kernels.backends import cuda
flat = ops.flat(cuda)
x, w = torch.empty(0, 3, 2), torch.ones(2, 3)
y, mean, var = flat.forward_training(x, w, None, 2, 1e-5, "sigmoid", "task_major")
dx, dw, db, _ = flat.backward(x, x, w, mean, var, 2, 1e-5, "sigmoid", "task_major", True, True, True, True)
print(y.shape == dx.shape == x.shape, mean.abs().sum() + dw.abs().sum() + db.abs().sum() == 0)
print(ctypes.CDLL(str(cuda._LIBRARY)).take_note(None))
"""
    assert python_output(program, path=package).split() == ["True", "tensor(True)", "0"]


@needs_nvcc
def test_a_library_with_other_activations_is_not_used(package: Path) -> None:
    """Kernels know an activation by its number alone."""
    program = """
from tsbn_kernels.backends import cuda
print(cuda.available)
cuda.ACTIVATION_CODES.pop("gelu")
cuda.load()
print(cuda.available, cuda.detail())
"""
    told = python_output(program, path=package).splitlines()
    assert told == ["True", "False the CUDA library was built from other sources: build it again"]


def test_report_names_it() -> None:
    known = {backend.name: backend for backend in backends.backends()}
    assert [b for b in known if b in ("triton", "cuda")] == ["triton", "cuda"]
    assert known["cuda"].available == cuda.available
    if cuda.available and not torch.cuda.is_available():
        assert known["cuda"].detail == "CUDA C++, no GPU here"


@pytest.mark.skipif(not cuda.available, reason="the CUDA library was not built")
def test_forced() -> None:
    program = "import tsbn_kernels.backends as b; print(b.select('cuda'))"
    assert python_output(program, TSBN_BACKEND="cuda").split() == ["cuda"]
    with backends.use_backend("cuda"):
        assert backends.select("cuda") == "cuda"
        with pytest.raises(RuntimeError, match="runs on cuda and the input is on cpu"):
            backends.override("cpu")


@pytest.mark.skipif(not cuda.available, reason="the CUDA library was not built")
def test_chosen_where_triton_is_missing() -> None:
    program = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch, tsbn_kernels.backends as b
from tsbn_kernels.backends import cuda
names = "tsbn::forward_training", "tsbn::layer_norm", "tsbn::layer_norm_backward", "tsbn::mixed_backward"
print(b.select("cuda"), *(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in names))
"""
    assert python_output(program, fresh=True).split() == ["cuda", *["True"] * 4]


CHAIN = """
import ctypes, warnings, torch
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.backends import cuda
from tsbn_kernels.backends.fallback import Health, guarded
from tsbn_kernels.definition.options import Options
from tsbn_kernels.backends.plan import DEVICES
cuda.launches.device_of = lambda _: DEVICES["H100"]
def broken(name):
    raise OSError("no compiler")
call = guarded(cuda.health, "forward_training", lambda name: getattr(cuda, name), reference.forward_training)
call = guarded(Health("Triton"), "forward_training", broken, call)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        call(torch.ones(4, 3, 8), torch.ones(2, 3), None, None, Options(2, 1e-5, "sigmoid", "task_major"))
notes, raw, count = ctypes.CDLL(str(cuda._LIBRARY)), ctypes.create_string_buffer(1 << 12), 0
while notes.take_note(raw):
    count += 1
print(count, *(str(warning.message) for warning in caught), cuda.health.broken, cuda.health.failures, sep="\\n")
"""


@needs_nvcc
def test_takes_over_where_triton_breaks(package: Path) -> None:
    """Triton's first call fails: CUDA C++ makes the launch, and one warning says so."""
    count, *heard, broken, failures = python_output(CHAIN, path=package).split("\n")[:-1]
    assert (count, broken, failures) == ("2", "", "{}")
    assert heard == ["tsbn-kernels runs without Triton, more slowly: OSError: no compiler"]


@needs_nvcc
@pytest.mark.parametrize("error", ["too many resources requested for launch", "no kernel image is available"])
def test_the_reference_takes_over_where_both_break(package: Path, error: str) -> None:
    """A kernel that is not launched is given up alone; a library that was not built for this GPU as a whole."""
    count, first, second, broken, failures = python_output(CHAIN, path=package, STUB_ERROR=error).split("\n")[:-1]
    assert count == "0"
    missing = "CUDA C++" if "image" in error else "the kernel forward of CUDA C++"
    assert first.startswith(f"tsbn-kernels runs without {missing}, more slowly: RuntimeError: ")
    assert first.endswith(f"tsbn: the CUDA kernel was not launched: {error}")
    assert second.startswith("tsbn-kernels runs without Triton")
    assert (bool(broken), failures == "{}") == (("image" in error),) * 2


def test_without_the_library(tmp_path: Path) -> None:
    """The package works as before, and says what is missing."""
    shutil.copytree(ROOT / "tsbn_kernels", tmp_path / "tsbn_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tsbn_kernels" / "_cuda.so").unlink(missing_ok=True)
    assert "missing    the CUDA library was not built" in python_output(
        "from tsbn_kernels.__main__ import main; main([])", path=tmp_path
    )
    done = python("import tsbn_kernels", path=tmp_path, TSBN_BACKEND="cuda")
    assert done.returncode != 0
    assert "backend 'cuda' is not available: the CUDA library was not built" in done.stderr


def test_every_backend_can_be_forced_from_the_environment() -> None:
    for backend in backends.backends():
        if backend.available:
            program = "import tsbn_kernels.backends as b; print(b._override.name)"
            assert python_output(program, TSBN_BACKEND=backend.name).split() == [backend.name]


@pytest.mark.parametrize("activation", [NONE, INVERSE])
def test_what_no_kernel_writes_is_refused(activation: str) -> None:
    """As by the CPU's kernels: without an activation dy itself is the gradient of the residual."""
    p = problem(bias=False)
    saved = Saved(p.x, p.weight, None, p.x, p.weight, p.weight.square())
    options = Options(*p.options, activation, 0.5)
    with pytest.raises(ValueError, match="dy is the gradient of residual"):
        cuda.backward(p.dy, saved, True, Needs(True, True, False, True), options)
