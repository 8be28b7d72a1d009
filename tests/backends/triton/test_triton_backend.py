"""The Triton backend around its kernels: launches that are kept, fallbacks, and life without Triton or a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.problems import FORMATS, Problem, assert_matches_definition, definition, problem, run
from support.processes import python_output
from torch import Tensor

from tsbn_kernels import backends
from tsbn_kernels.backends import triton as backend
from tsbn_kernels.backends.plan import DEVICES, Work

pytest.importorskip("triton")
from support.interpreter import device, dispatched, passes

from tsbn_kernels.backends.plan.triton import plan
from tsbn_kernels.backends.triton.passes import Forward
from tsbn_kernels.definition.options import Options

ops = torch.ops.tsbn


@pytest.fixture
def interpreted() -> Iterator[None]:
    with dispatched(device(threads=64)):
        yield


# ---- launches --------------------------------------------------------------------------------------------------------


def forward(p: Problem) -> Tensor:
    return ops.forward_training(p.x, p.weight, p.bias, *p.options)[0]


def backward(p: Problem, *needs: bool, training: bool = True) -> None:
    ops.backward(p.dy, p.x, p.weight, p.weight, p.weight.abs(), *p.options, training, *(needs or (True, True, True)))


def misaligned(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype).as_strided(x.shape, x.stride(), 1).copy_(x)


SMALL = (2, 2, 1, (2,))


def variations() -> dict[str, Problem]:
    """Problems for each of which kernels of their own are compiled, and launched in a way of their own."""
    p = problem(*SMALL)
    return {
        "the first": p,
        "shape": problem(2, 2, 1, (4,)),
        "strides": p._replace(x=torch.cat((p.x, p.x), 1)[:, :1]),
        "alignment": p._replace(x=misaligned(p.x)),
        "dtype": problem(*SMALL, dtype=torch.float16),
        "parameters": problem(*SMALL, parameter_dtype=torch.bfloat16),
        "tasks": problem(1, 4, 1, (2,)),
        "stacking": problem(*SMALL, stacking="sample_major"),
        "gate": p._replace(gate="identity"),
        "eps": p._replace(eps=1e-3),
        "no bias": p._replace(bias=None),
        "bias of another type": p._replace(bias=None if p.bias is None else p.bias.half()),
    }


@pytest.mark.usefixtures("interpreted")
def test_a_second_call_builds_nothing() -> None:
    """What differs in anything that a kernel depends on has a pass of its own, also where it was not called before."""
    problems = variations()
    for p in problems.values():
        forward(p)
    kept = passes()
    assert len(kept) == len(problems)
    for p in problems.values():
        torch.testing.assert_close(forward(p).double(), definition(p).y, rtol=1e-2, atol=1e-2)
    again = passes()
    assert all(a is b for a, b in zip(kept, again, strict=True))


@pytest.mark.usefixtures("interpreted")
def test_a_second_backward_builds_nothing() -> None:
    first = problem(*SMALL)
    problems = {name: p for name, p in variations().items() if "bias" not in name}
    problems["alignment of dy"] = first._replace(dy=misaligned(first.dy))
    for _ in range(2):
        for p in problems.values():
            backward(p)
        backward(first, training=False)
        backward(first, True, True, False)
        backward(first, True, False, True)
        backward(first, False, True, True)
        assert len(passes()) == len(problems) + 4


@pytest.mark.usefixtures("interpreted")
def test_data_and_vectors_may_lie_elsewhere() -> None:
    """The launches that are kept belong to no tensor."""
    for seed in range(3):
        p = problem(2, 3, 2, (5,), seed=seed)
        wide = torch.zeros(2, 5)
        wide[:, 1:3] = p.weight
        p = p._replace(weight=wide[:, 1:3], bias=p.weight.t().contiguous().t())
        assert not p.weight.is_contiguous()
        assert_matches_definition(p, run(p))
    assert len(passes()) == 2


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 5), (4, 3, 0)])
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape), torch.randn(2, shape[1])
    options = (2, 1e-5, "sigmoid", "task_major")
    y, mean, var = ops.forward_training(x, weight, weight, *options)
    assert y.shape == ops.forward_eval(x, weight, None, mean, var, *options).shape == x.shape
    assert (mean == 0).all()
    assert (var == 0).all()
    dx, dweight, dbias, _ = ops.backward(x, x, weight, mean, var, *options, True, True, True, True)
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(weight))
    assert [t.numel() for t in ops.backward(x, x, weight, mean, var, *options, True, False, False, False)] == 4 * [0]
    assert not passes()


def test_too_many_programs() -> None:
    huge = plan(Work(1 << 20, 1, 1 << 12, 1, 4, "rows"), DEVICES["H100"])
    with pytest.raises(ValueError, match=r"4294967296 programs are too many for one launch; the most are 2\^31 - 1"):
        Forward(huge, torch.empty(1, 1, 1), Options(1, 1e-5, "sigmoid", "task_major"))


# ---- processes of their own ------------------------------------------------------------------------------------------

REPORT = """
import sys, tsbn_kernels
from tsbn_kernels import backends
triton = backends.backends()[0]
print(triton.name, triton.available, triton.device_types, triton.detail, sep="|")
print(sorted(name for name in sys.modules if name.partition(".")[0] == "triton"))
"""


def test_what_it_says_of_itself_and_no_import_of_triton() -> None:
    plain, loaded = python_output(REPORT, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="").splitlines()
    assert plain.startswith("triton|True|('cuda', 'xpu')|Triton ")
    assert plain.endswith("no GPU here")
    assert loaded == "[]"
    interpreted, loaded = python_output(REPORT, TRITON_INTERPRET="1").splitlines()
    assert interpreted.startswith("triton|True|('cuda', 'xpu', 'cpu')|Triton ")
    assert interpreted.endswith("interpreted on the CPU (TRITON_INTERPRET is set)")
    assert loaded == "[]"


LAYER = """
import torch
from tsbn_kernels import FusedTSigmaBN2d, backends, use_backend

def step(backend):
    torch.manual_seed(0)
    layer = FusedTSigmaBN2d(2, 3, bias=True)
    x = torch.randn(4, 3, 5, 5).requires_grad_()
    with use_backend(backend):
        y = layer(x)
        (y * torch.randn_like(y)).sum().backward()
        return y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_var, layer.eval()(x)

for got, wanted in zip(step("triton"), step("reference")):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
print(backends.override("cpu"), backends.select("cpu"))
"""


def test_a_layer_in_the_interpreter_of_triton_itself() -> None:
    """What a user without a GPU can do."""
    assert python_output(LAYER, TRITON_INTERPRET="1", TSBN_BACKEND="triton").split() == ["triton", "triton"]


HIDDEN = """
import sys
from importlib import util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch, tsbn_kernels
from tsbn_kernels import backends
layer = tsbn_kernels.FusedTSigmaBN2d(2, 3)
layer(torch.randn(4, 3, 5, 5)).square().sum().backward()
assert layer.weight.grad.isfinite().all()
print(backends.backends()[0].detail)
try:
    with tsbn_kernels.use_backend("triton"):
        pass
except RuntimeError as error:
    print(error)
"""


def test_without_triton() -> None:
    lines = python_output(HIDDEN, fresh=True).splitlines()
    assert lines == [
        "Triton is not installed (pip install triton)",
        "backend 'triton' is not available: Triton is not installed (pip install triton)",
    ]


def test_not_on_cpu_tensors_unless_interpreted() -> None:
    assert not backend.interpreted
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match="it runs on cuda, xpu and the input is on"):
        backends.override("cpu")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_dispatcher_reaches_the_kernels(memory_format: str) -> None:
    """The other tests of this kind would pass on the CPU backend, too."""
    p = problem(memory_format=memory_format)
    run(p)
    assert len(passes()) == 2
