"""The layer in torch.export, in evaluation and in training, and in AOTInductor."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from support.graphs import WAYS, C, T, Way, tensors
from support.processes import python
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tsbn_kernels import FusedTSigmaBN2d

N = 4


def export(module: nn.Module, inputs: list[Tensor], streams: int, strict: bool) -> ExportedProgram:
    """With any number of samples of each task."""
    dynamic = {0: streams * Dim("samples", min=2, max=1024)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="While compiling, we found certain side effects")
        return torch.export.export(module, tuple(inputs), dynamic_shapes=(dynamic,) * len(inputs), strict=strict)


@pytest.mark.parametrize(
    ("name", "training", "strict"),
    [(name, True, False) for name in WAYS if name != "checkpoint"]
    + [(name, training, True) for name in ("plain", "streams") for training in (True, False)]
    + [(name, False, False) for name in ("plain", "residual", "fan_out", "tasks", "model")],
)
def test_any_batch_size(name: str, training: bool, strict: bool) -> None:
    """An exported program gives the outputs, gradients and statistics of the module; in training it can be trained."""
    way: Way = WAYS[name]
    module = way.make().train(training)
    program = export(copy.deepcopy(module), [x.detach() for x in way.inputs(N)], way.streams, strict)
    operator = way.operators[0 if training else 1]
    assert any(operator in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    names, kept = dict(module.named_parameters()), dict(exported.named_buffers())  # strict evaluation drops unused ones
    for samples in (N, 7):
        inputs = way.inputs(samples)
        results = []
        for call in (module, exported):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            outputs = tensors(call(*leaves))
            generator = torch.Generator().manual_seed(samples)
            torch.autograd.backward(outputs, [torch.randn(y.shape, generator=generator) for y in outputs])
            parameters, buffers = dict(call.named_parameters()), dict(call.named_buffers())
            results.append([*outputs, *(x.grad for x in leaves), *(parameters[name].grad for name in names)])
            results[-1] += [buffers[name].clone() for name in kept]
            call.zero_grad()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_decompositions_keep_the_operators() -> None:
    program = export(FusedTSigmaBN2d(T, C), [torch.randn(T * N, C, 6, 5)], T, strict=False).run_decompositions()
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("tsbn.forward_training.default") == 1
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert all(value.dtype != torch.float64 for value in values)


def test_aot_inductor(tmp_path: Path) -> None:
    """Compiled ahead of time; where it is loaded, tsbn_kernels has to be imported."""
    layer = FusedTSigmaBN2d(T, C, activation="relu").eval()
    layer.running_mean.normal_()
    with torch.no_grad():
        program = export(layer, [torch.randn(T * N, C, 6, 5)], T, strict=False)
        options = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "layer.pt2"), inductor_configs=options
        )
        compiled = torch._inductor.aoti_load_package(path)
        for samples in (N, 9):
            x = torch.randn(T * samples, C, 6, 5)
            torch.testing.assert_close(compiled(x), layer(x))
    done = python(f"import torch._inductor.codecache; torch._inductor.aoti_load_package({path!r})")
    assert "Could not find schema for tsbn::forward_eval" in done.stderr
