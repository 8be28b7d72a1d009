"""A call by its name: the flat operators made of it, backends that lack some, and checks that are made once."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.problems import problem
from support.tolerances import assert_same_bits

from tsbn_kernels import FusedTSigmaBN2d, functional
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition.options import Gradients, Moments, Needs, Normalized, Options, Running, Saved
from tsbn_kernels.functional import task_batch_norm
from tsbn_kernels.operator import checks, ops

EPILOGUE = 'Tensor? residual=None, str activation="none", float slope=0., bool shared=False'
OPTIONS = "int num_tasks, float eps, str gate, str stacking"
# Programs that were exported, and the C++ kernels, were made for these.
SCHEMAS = {
    "forward_training": f"(Tensor x, Tensor weight, Tensor? bias, {OPTIONS}, {EPILOGUE}) -> "
    "(Tensor y, Tensor mean, Tensor var)",
    "forward_tracked": "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    f"Tensor(c!)? batches, float? momentum, Tensor? rows, {OPTIONS}, {EPILOGUE}) -> "
    "(Tensor y, Tensor mean, Tensor var)",
    "forward_eval": f"(Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor var, {OPTIONS}, {EPILOGUE}) -> "
    "Tensor",
    "backward": f"(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var, {OPTIONS}, bool training, "
    f"bool need_dx, bool need_dweight, bool need_dbias, Tensor? bias=None, {EPILOGUE}, bool need_dresidual=False) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "moments": "(Tensor x, int num_tasks, str stacking, bool shared=False) -> (Tensor mean, Tensor var)",
    "input_gradient": "(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor dz_mean, "
    f"Tensor dz_xhat_mean, {OPTIONS}, Tensor? bias=None, {EPILOGUE}, bool need_dresidual=False) -> "
    "(Tensor dx, Tensor dresidual)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_stay(name: str) -> None:
    assert str(getattr(torch.ops.tsbn, name).default._schema) == f"tsbn::{name}{SCHEMAS[name]}"


class Listening:
    """A backend that remembers what it was called with."""

    def __init__(self) -> None:
        self.heard: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name not in ops.SCHEMAS:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.heard = arguments
            return getattr(reference, name)(*arguments)

        return call


def test_flat_arguments_become_what_a_backend_takes() -> None:
    """By all operators, with all options different from their defaults, and back through the dispatcher."""
    p, listening = problem(2, 3, 4, (5,), stacking="sample_major"), Listening()
    x, residual = torch.randn(3, 4, 5), torch.randn_like(p.x)
    options = Options(2, p.eps, p.gate, p.stacking, "leaky_relu", 0.25, True)
    saved = Saved(x, p.weight, p.bias, residual, p.weight, p.weight.exp())
    by, dispatched = ops.complete(listening), ops.operators(None)
    flat = ops.flat(by)
    end = residual, "leaky_relu", 0.25, True
    vectors = p.weight, saved.mean, saved.var

    flat.forward_training(x, p.weight, p.bias, *p.options, *end)
    assert listening.heard == (x, p.weight, p.bias, residual, options)
    count, rows = torch.zeros(2, dtype=torch.long), torch.tensor([1, 0])
    running = Running(saved.mean.clone(), saved.var.clone(), count, 0.5, rows)
    flat.forward_tracked(x, p.weight, p.bias, *running, *p.options, *end)
    assert listening.heard == (x, p.weight, p.bias, residual, running, options)
    flat.forward_eval(x, p.weight, p.bias, saved.mean, saved.var, *p.options, *end)
    assert listening.heard == (saved, options)
    flat.backward(p.dy, x, *vectors, *p.options, False, True, False, True, p.bias, *end, True)
    assert listening.heard == (p.dy, saved, False, Needs(True, False, True, True), options)
    flat.moments(x, 2, p.stacking, True)
    assert listening.heard == (x, Options(2, 0.0, "identity", p.stacking, fan_out=True))
    flat.input_gradient(p.dy, x, *vectors, p.weight, p.weight, *p.options, p.bias, *end, True)
    assert listening.heard == (p.dy, saved, p.weight, p.weight, True, options)

    wanted = reference.backward(p.dy, saved, False, Needs(True, False, True, True), options)
    got = dispatched.backward(p.dy, saved, False, Needs(True, False, True, True), options)
    assert got.dweight is wanted.dweight is None
    for one, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, exact)
    torch.testing.assert_close(dispatched.forward_eval(saved, options), reference.forward_eval(saved, options))


def test_results_have_names() -> None:
    p, by = problem(2, 3, 4, (5,)), ops.operators(None)
    options = Options(*p.options)
    found = by.forward_training(p.x, p.weight, p.bias, None, options)
    assert isinstance(found, Normalized)
    assert isinstance(by.moments(p.x, options), Moments)
    saved = Saved(p.x, p.weight, p.bias, None, found.mean, found.var)
    gradients = by.backward(p.dy, saved, True, Needs(True, False, False, False), options)
    assert isinstance(gradients, Gradients)
    assert [gradient is None for gradient in gradients] == [False, True, True, True]


def test_a_backend_may_lack_an_operator() -> None:
    """The reference takes its place, as functions of flat arguments and of options."""
    p = problem(2, 3, 4, (5,))
    one = ops.complete(SimpleNamespace(moments=lambda x, options: "its own"))
    assert one.moments(p.x, Options(*p.options)) == "its own"
    assert one.backward is reference.backward
    y, *_ = ops.flat(SimpleNamespace()).forward_training(p.x, p.weight, p.bias, *p.options)
    assert_same_bits(y, reference.forward_training(p.x, p.weight, p.bias, None, Options(*p.options)).y)


# ---- checks that are made once ---------------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The calls that were checked, of which none was known before."""
    calls: list[int] = []
    whole = checks.check_call

    def counting(*arguments: Any) -> Any:
        calls.append(len(calls))
        return whole(*arguments)

    monkeypatch.setattr(checks, "_known", {})
    monkeypatch.setattr(checks, "check_call", counting)
    return calls


def test_a_call_is_checked_once(checked: list[int]) -> None:
    layer, x = FusedTSigmaBN2d(2, 3), torch.randn(4, 3, 5, 5)
    for _ in range(3):
        layer(x)
    assert len(checked) == 1
    layer(x[:, :, :4])  # another shape
    layer(x.double())  # another dtype
    layer.eps = 1e-3  # another option
    layer(x)
    layer.eval()(x)
    for _ in range(2):
        layer(x, torch.randn_like(x))
    assert len(checked) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fan_out": 0}, "fan_out must be True or False"),
        ({"training": 1}, "training must be True or False"),
        ({"recover_input": 0}, "recover_input must be True or False"),
        ({"num_tasks": 2.0}, "num_tasks must be an integer"),
    ],
)
def test_what_equals_a_known_call_is_no_known_call(settings: dict[str, Any], message: str, checked: list[int]) -> None:
    """0 equals False, and 2.0 equals 2: both have the same hash."""
    p = problem(2, 3, 4, (5,))
    task_batch_norm(p.x, p.weight, num_tasks=2)
    with pytest.raises(TypeError, match=message):
        task_batch_norm(p.x, p.weight, **{"num_tasks": 2, **settings})


def test_other_tensors_of_a_known_call(checked: list[int]) -> None:
    """Where sizes and dtypes are the same, layouts, devices and running statistics are looked at, still."""
    p = problem(2, 3, 4, (5,))
    mean, var = torch.zeros(2, 4), torch.ones(2, 4)
    for _ in range(2):
        task_batch_norm(p.x, p.weight, None, mean, var, num_tasks=2)
    assert len(checked) == 1
    with pytest.raises(TypeError, match="weight must be a dense tensor"):
        task_batch_norm(p.x, p.weight.to_sparse(), None, mean, var, num_tasks=2)
    with pytest.raises(RuntimeError, match="weight is on meta"):
        task_batch_norm(p.x, p.weight.to("meta"), None, mean, var, num_tasks=2)
    with pytest.raises(ValueError, match="running_mean is updated in training and must not require a gradient"):
        task_batch_norm(p.x, p.weight, None, mean.requires_grad_(), var, num_tasks=2)


def test_what_is_known_is_bounded_and_keeps_no_tensor(checked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST", 4)
    for size in range(2, 12):
        p = problem(2, size, 3, (2,))
        tasks, alive = torch.tensor(2), weakref.ref(p.x)
        task_batch_norm(p.x, p.weight, num_tasks=2)
        task_batch_norm(p.x, p.weight, num_tasks=tasks)  # type: ignore[arg-type]
        assert len(checks._known) <= 4
        held = weakref.ref(tasks)
        del p, tasks
        gc.collect()
        assert alive() is held() is None


def test_threads_share_what_is_known(checked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST", 3)
    problems = [problem(2, size, 3, (4,), seed=size) for size in range(2, 10)]
    wanted = [task_batch_norm(p.x, p.weight, num_tasks=2) for p in problems]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            got = pool.map(lambda p: functional.task_batch_norm(p.x, p.weight, num_tasks=2), problems)
            for one, exact in zip(got, wanted, strict=True):
                assert_same_bits(one, exact)
