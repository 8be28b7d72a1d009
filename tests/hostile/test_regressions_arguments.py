"""What the fuzz run found in arguments and half precision, and names that hide others."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from support.problems import problem
from support.processes import ROOT
from torch import Tensor, nn

from tsbn_kernels import (
    FusedTSigmaBN,
    FusedTSigmaBN1d,
    FusedTSigmaBN2d,
    FusedTSigmaBN3d,
    FusedTSigmaLN,
    LateFanOut,
    MultiTaskModel,
    convert_model,
    export_task,
    memory,
    parameter_groups,
    revert_model,
    task_index,
    use_backend,
)
from tsbn_kernels.functional import task_batch_norm

SPARSE, NESTED = torch.ones(6, 5, 2, 2).to_sparse(), torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(1, 2)])
INDEX = torch.tensor([0, 1, 2, 0, 1, 2])
HOSTILE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": SPARSE}, TypeError, "x must be a dense tensor, got a torch.sparse_coo one"),
    ({"x": NESTED}, TypeError, "x must be a dense tensor, got a nested one"),
    ({"weight": 1.0}, TypeError, "weight must be a tensor, got float"),
    ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    ({"weight": torch.ones(3, 5).to(torch.float8_e4m3fn)}, TypeError, "weight must be float32, .* got torch.float8"),
    ({"weight": torch.ones(3, 5, device="meta")}, RuntimeError, "weight is on meta and x on cpu"),
    ({"residual": "x"}, TypeError, "residual must be a tensor, got str"),
    ({"num_tasks": "3"}, TypeError, "num_tasks must be an integer, got '3'"),
    ({"num_tasks": 2**70}, ValueError, r"num_tasks must be below 2\*\*31"),
    ({"training": None}, TypeError, "training must be True or False, got None"),
    ({"fan_out": "no"}, TypeError, "fan_out must be True or False, got 'no'"),
    ({"task_of_sample": INDEX, "evaluate_single": 1}, TypeError, "evaluate_single must be True or False, got 1"),
    ({"eps": float("nan")}, ValueError, "eps must be a finite number of 0.0 or more, got nan"),
    ({"eps": -1e-5}, ValueError, "eps must be a finite number of 0.0 or more, got -1e-05"),
    ({"eps": 0}, ValueError, "eps must be positive in training"),
    ({"eps": "small"}, TypeError, "eps must be a number, got 'small'"),
    ({"momentum": 10**400}, ValueError, "momentum must be a finite number"),
    ({"momentum": None}, TypeError, "momentum must be a number, got None"),
    ({"momentum": torch.ones(2, 5)}, ValueError, r"momentum must broadcast over .* = \[3, 5\], got shape \[2, 5\]"),
    ({"momentum": torch.ones(3, 1, dtype=torch.int64)}, TypeError, "momentum must be .* floating point tensor"),
    ({"negative_slope": None}, TypeError, "negative_slope must be a number"),
    ({"running_mean": torch.zeros(1, 5).expand(3, 5)}, ValueError, "running_mean .* must not share memory"),
    ({"running_mean": torch._neg_view(torch.zeros(3, 5))}, ValueError, "running_mean .* must not be a negated view"),
    ({"running_var": torch.ones(7).as_strided((3, 5), (1, 1))}, ValueError, "running_var .* must not share memory"),
    ({"running_var": torch.ones(3, 5, requires_grad=True)}, ValueError, "running_var .* must not require a gradient"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), HOSTILE)
def test_fuzz_arguments_of_any_kind_give_an_error_that_names_them(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """They ended in an AttributeError, in an error of PyTorch's that named none of them, or in NaN."""
    mean, var = torch.zeros(3, 5), torch.ones(3, 5)
    given = {"x": torch.randn(6, 5, 2, 2), "weight": torch.zeros(3, 5), "num_tasks": 3}
    with pytest.raises(error, match=message):
        task_batch_norm(**{**given, "running_mean": mean, "running_var": var, **arguments})
    assert mean.eq(0).all() and var.eq(1).all()


NORMS = (FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d, FusedTSigmaBN, FusedTSigmaLN, LateFanOut)


@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("x", [NESTED, SPARSE, torch.tensor(1.0)], ids=["nested", "sparse", "0-d"])
def test_fuzz_layers_name_an_input_that_has_no_streams(kind: Any, routed: bool, x: Tensor) -> None:
    """A nested input, and one without dimensions where an index is routed, ended in an error of PyTorch's."""
    context = task_index(torch.tensor([0, 1])) if routed else nullcontext()
    with context, pytest.raises((TypeError, ValueError), match=r"must be a dense tensor|(shape|size) \[\]"):
        kind(2, 3)(x)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("mixed", [False, True])
def test_fuzz_running_statistics_have_no_gradient(name: str, mixed: bool) -> None:
    """Evaluation took them with a graph, and the graph gave them None; batch_norm of PyTorch refuses them."""
    running = {"running_mean": torch.zeros(2, 3), "running_var": torch.ones(2, 3)}
    running[name].requires_grad_()
    index = torch.tensor([0, 1, 1, 0]) if mixed else None
    x, options = torch.randn(4, 3), {"num_tasks": 2, "training": False, "task_of_sample": index}
    with pytest.raises(ValueError, match=f"does not differentiate {name}, .* pass it detached"):
        task_batch_norm(x, torch.zeros(2, 3), **running, **options)
    with torch.no_grad():
        task_batch_norm(x, torch.zeros(2, 3), **running, **options)


@pytest.mark.parametrize(
    ("tasks", "error"),
    [
        ("01", TypeError),
        (1, TypeError),
        ([0.5], TypeError),
        ({0}, TypeError),
        ([0, 0], ValueError),
        ([3], ValueError),
        (torch.tensor([0, 0]), ValueError),
        (torch.tensor([3]), ValueError),
        (torch.tensor([-1]), ValueError),
        (torch.tensor([0.0]), TypeError),
        (torch.tensor(0), ValueError),
        (torch.tensor([0], device="meta"), RuntimeError),
    ],
)
def test_fuzz_tasks_given_as_a_tensor_are_checked_too(tasks: Any, error: type[Exception]) -> None:
    """A tensor that names a task twice was taken: one of its two updates of the statistics was lost."""
    layer = FusedTSigmaBN2d(3, 5)
    count = len(tasks) if isinstance(tasks, Tensor) and tasks.dim() else 1
    with pytest.raises(error, match="tasks"):
        layer(torch.randn(2 * count, 5, 2, 2), tasks=tasks)
    assert layer.num_batches_tracked is not None
    assert not layer.num_batches_tracked.any()


def test_fuzz_numbers_of_numpy_are_numbers() -> None:
    p = problem()
    expected = task_batch_norm(p.x, p.weight, num_tasks=3, eps=0.5)
    assert torch.equal(task_batch_norm(p.x, p.weight, num_tasks=np.int64(3), eps=np.float32(0.5)), expected)  # type: ignore[arg-type]
    assert FusedTSigmaBN2d(np.int64(3), 5, momentum=np.float32(0.5)).momentum == 0.5  # type: ignore[arg-type]


def test_fuzz_half_precision_statistics_are_rounded_once() -> None:
    """The batch's mean was first rounded to float16, to infinity, and running_mean became NaN for a momentum of 0."""
    mean, var = torch.full((2, 3), 0.875, dtype=torch.float16), torch.ones(2, 3, dtype=torch.float16)
    x = torch.randn(8, 3) * 1e6
    task_batch_norm(x, torch.zeros(2, 3), None, mean, var, num_tasks=2, momentum=0.0)
    assert mean.eq(0.875).all()
    assert var.eq(1).all()
    x = torch.full((8, 3), 1.0) + torch.tensor([1.0, -1.0]).repeat(4)[:, None] * 2**-4
    task_batch_norm(x, torch.zeros(2, 3), None, mean, var, num_tasks=2, momentum=0.5)
    assert mean.eq(0.9375).all()


def test_fuzz_half_precision_statistics_do_not_set_the_precision_of_recovery() -> None:
    """With bfloat16 running statistics, recover_input in evaluation computed gates and factors in bfloat16."""
    p = problem(parameter_dtype=torch.bfloat16)
    mean, var = torch.full((3, 5), 0.25, dtype=torch.bfloat16), torch.full((3, 5), 0.7, dtype=torch.bfloat16)
    gradients = []
    for recover in (True, False):
        x = p.x.clone().requires_grad_()
        y = task_batch_norm(x, p.weight, None, mean, var, num_tasks=3, training=False, recover_input=recover)
        gradients += torch.autograd.grad(y, x, p.dy)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: FusedTSigmaBN2d(3, 5, dtype=torch.int64),
        lambda: FusedTSigmaBN2d(3, 5.5),  # type: ignore[arg-type]
        lambda: FusedTSigmaBN2d(3, 5, fan_out=1),  # type: ignore[arg-type]
        lambda: FusedTSigmaBN2d(3, 5).task("a"),  # type: ignore[arg-type]
        lambda: LateFanOut(2.0, 5),  # type: ignore[arg-type]
        lambda: convert_model("resnet", 2),  # type: ignore[arg-type]
        lambda: convert_model(nn.BatchNorm2d(2), 2, exclude=3),  # type: ignore[arg-type]
        lambda: revert_model(None, 0),  # type: ignore[arg-type]
        lambda: export_task(nn.Conv2d, 0),  # type: ignore[arg-type]
        lambda: parameter_groups([], 0.1),  # type: ignore[arg-type]
        lambda: parameter_groups(nn.ReLU(), "fast"),  # type: ignore[arg-type]
        lambda: MultiTaskModel(nn.ReLU, {}),  # type: ignore[arg-type]
        lambda: MultiTaskModel(FusedTSigmaBN2d(1, 2), {"a": 3}),  # type: ignore[dict-item]
        lambda: MultiTaskModel(FusedTSigmaBN2d(1, 2), {"a": nn.ReLU()})(None),  # type: ignore[arg-type]
        lambda: memory.set_cache_limit("much"),  # type: ignore[arg-type]
    ],
)
def test_fuzz_arguments_of_another_type_are_a_type_error(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"must be .*got"):
        call()


def test_fuzz_stacking_and_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="stacking must be 'task_major' or 'sample_major', got 'task_axis'"):
        LateFanOut(2, 5, stacking="task_axis")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"below 2\*\*63"):
        memory.set_cache_limit(2**70)
    with pytest.raises(ValueError, match=r"unknown backend \{\}"):
        use_backend({}).__enter__()  # type: ignore[arg-type]


def test_no_comprehension_hides_a_global_of_another() -> None:
    """Up to Python 3.12.3 a name that one comprehension of a function binds is unbound in another one of it.

    CPython 118513: of `[tick for tick in a]` and `[tick(b) for b in c]` the second raises UnboundLocalError.
    """
    found = [
        f"{path.relative_to(ROOT)}: {hidden}"
        for folder in ("tsbn_kernels", "benchmarks", "examples", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if (hidden := hidden_globals(path.read_text()))
    ]
    assert not found
    source = "def tick(b): ...\ndef f(a, c):\n return [tick for tick in a], [{} for b in c]"
    assert hidden_globals(source.format("tick(b)")) == ["f: tick"]
    assert not hidden_globals(source.format("[tick for tick in b]"))


def hidden_globals(source: str) -> list[str]:
    """Functions with the names that one of their comprehensions binds, where another takes the module's."""
    tree = ast.parse(source)
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    of_module = {node.name for node in tree.body if isinstance(node, kinds)}
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    of_module |= {alias.asname or alias.name for node in imports for alias in node.names}
    of_module |= {name for node in tree.body for name in stored(node) if isinstance(node, ast.Assign | ast.AnnAssign)}
    found = []
    for function in ast.walk(tree):
        if isinstance(function, kinds):
            bound: set[str] = set()
            read: set[str] = set()
            for part in function.body:
                note_names(part, None, bound, read)
            if names := sorted(bound & read & of_module):
                found.append(f"{function.name}: {', '.join(names)}")
    return found


def note_names(node: ast.AST, inside: set[str] | None, bound: set[str], read: set[str]) -> None:
    """Notes what comprehensions bind, and what they read and do not bind; ``inside``: what those around here bind."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.GeneratorExp):
        return  # a scope of its own
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp):
        targets = {name for each in node.generators for name in stored(each.target)}
        bound |= targets
        inside = (inside or set()) | targets
    elif isinstance(node, ast.Name) and inside is not None and node.id not in inside:
        read.add(node.id)
    for child in ast.iter_child_nodes(node):
        note_names(child, inside, bound, read)


def stored(node: ast.AST) -> set[str]:
    """Names that are assigned to."""
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
