"""Which backend a call is planned for where two are at hand: the rule, its cache, and what it leaves to the chain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.layer_problems import layer_problem
from support.problems import problem

from tsbn_kernels import use_backend
from tsbn_kernels.backends import choice, cuda, triton
from tsbn_kernels.backends.fallback import Health, KernelError
from tsbn_kernels.backends.plan import DEVICES, Work
from tsbn_kernels.backends.plan import cuda as cuda_rules
from tsbn_kernels.backends.plan.choice import HOST_SECONDS, MARGIN, Offer, best, offers, reason
from tsbn_kernels.backends.plan.layer_norm import LayerWork
from tsbn_kernels.definition.options import (
    LayerNeeds,
    LayerOptions,
    LayerSaved,
    Needs,
    Options,
    Running,
    Saved,
)
from tsbn_kernels.operator.registry import chained

A100, H100, MI300X = (DEVICES[name] for name in ("A100", "H100", "MI300X"))


def chosen(work: Work, device: Any = H100, **more: Any) -> Offer:
    return best(offers(work, device, **more))


# ---- the rule ----------------------------------------------------------------------------------------------------

BN1 = Work(40, 256, 64, 32 * 32, 2)
BN6 = Work(40, 256, 512, 8 * 8, 2)
VIT = LayerWork(5, 1, 384, 65536, 2, "columns")
LONG = LayerWork(2, 1, 12288, 4096, 2, "columns")


@pytest.mark.parametrize(
    ("work", "device", "backend"),
    [
        (replace(BN1, positions=64 * 64), H100, "cuda"),  # a cluster keeps most of what Triton reads twice
        (BN1, H100, "cuda"),  # clusters of both keep it
        (replace(BN1, direction="backward"), H100, "cuda"),
        (replace(BN1, tasks=4, samples=12), H100, "triton"),  # its clusters are launched sooner
        (BN1, A100, "cuda"),  # which has no clusters: a block keeps a third
        (replace(BN1, samples=2048), A100, "triton"),  # or too little
        (replace(BN6, samples=128), A100, "triton"),  # both keep it on chip
        (replace(BN1, family="columns"), H100, "cuda"),  # the whole device keeps it
        (replace(BN1, family="columns", samples=4096), H100, "triton"),  # or too little
        (replace(BN1, training=False), H100, "triton"),  # nothing is summed
        (replace(BN1, fan_out=True), H100, "triton"),  # x is a fortieth of what is moved
        (VIT, H100, "triton"),
        (replace(VIT, direction="backward"), H100, "triton"),
        (replace(VIT, direction="backward", fan_out=True, positions=8192), H100, "triton"),  # shorter than a call
        (replace(VIT, direction="backward", fan_out=True), H100, "cuda"),  # which Triton reads twice
        (LONG, H100, "triton"),
        (replace(LONG, direction="backward"), H100, "cuda"),  # so are these rows
        (replace(LONG, direction="backward"), MI300X, "triton"),
    ],
)
def test_known_passes(work: Work, device: Any, backend: str) -> None:
    assert chosen(work, device).backend == backend


WORKS = st.builds(
    Work,
    tasks=st.sampled_from([1, 3, 40]),
    samples=st.sampled_from([2, 32, 256]),
    channels=st.sampled_from([3, 64, 512]),
    positions=st.sampled_from([1, 49, 196, 1024, 3136]),
    item_size=st.sampled_from([2, 4, 8]),
    family=st.sampled_from(["rows", "columns"]),
    direction=st.sampled_from(["forward", "backward"]),
    training=st.booleans(),
    activation=st.sampled_from(["none", "relu"]),
    fan_out=st.booleans(),
)
ROWS = st.builds(
    LayerWork,
    tasks=st.sampled_from([1, 5, 40]),
    samples=st.just(1),
    channels=st.sampled_from([7, 384, 768, 12288, 20000]),
    positions=st.sampled_from([3, 200, 8192]),
    item_size=st.sampled_from([2, 4]),
    family=st.just("columns"),
    direction=st.sampled_from(["forward", "backward"]),
    residual=st.booleans(),
    fan_out=st.booleans(),
)


@given(WORKS | ROWS, st.sampled_from([A100, H100, MI300X]), st.booleans())
def test_bytes_first_then_launches_then_triton(work: Work, device: Any, tracks: bool) -> None:
    found = offers(work, device, tracks=tracks)
    assert sorted(one.backend for one in found) in (["cuda", "triton"], ["triton"], ["cuda"], [])
    assert device is not MI300X or len(found) <= 1
    if len(found) < 2:
        return
    chosen = best(found)
    by_cuda, by_triton = sorted(found, key=lambda one: one.backend)
    assert reason(found).startswith(chosen.backend)
    if by_triton.plans[0].variant == "cluster":  # launched sooner, or it keeps more
        assert (chosen is by_triton) == (by_triton.seconds < MARGIN * by_cuda.seconds)
        return
    assert (chosen is by_cuda) == (by_cuda.seconds < MARGIN * by_triton.seconds)
    if chosen is by_cuda:  # for nothing else
        assert by_cuda.bytes < by_triton.bytes or by_cuda.launches < by_triton.launches
    large = by_triton.seconds > 100 * HOST_SECONDS["cuda"]
    if large and by_cuda.bytes < 0.9 * by_triton.bytes:
        assert chosen is by_cuda


def test_what_is_called_beside_the_kernels_counts() -> None:
    """Triton updates running statistics of float64 by operators of PyTorch: a small layer goes to CUDA C++ for them."""
    for item_size, backend in ((8, "cuda"), (4, "triton"), (2, "triton")):
        work = Work(40, 16, 24, 8 * 8, item_size)
        assert chosen(work).backend == "triton"
        assert chosen(work, tracks=True).backend == backend
    assert chosen(replace(BN6, item_size=8), tracks=True).backend == "triton"


def test_the_only_one_that_has_a_plan() -> None:
    assert offers(replace(LONG, channels=20000), H100) == ()
    (alone,) = offers(BN1, MI300X)
    assert reason([alone]) == "triton, which alone has a plan"


# ---- the calls ---------------------------------------------------------------------------------------------------


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of the CPU are taken for those of an H100, whose driver runs as many clusters as there is room for."""
    monkeypatch.setattr(cuda.launches, "device_of", lambda _: H100)
    monkeypatch.setattr(torch.ops.tsbn, "_cuda_active_clusters", lambda kernel, _: 132 // kernel[5], raising=False)
    remembered = choice._batch_norm, choice._layer_norm, cuda.batch_norm._prepare, cuda_rules.plan
    for cache in remembered:
        cache.cache_clear()
    yield
    for cache in remembered:
        cache.cache_clear()


NEEDS, ROW_NEEDS = Needs(True, True, False, False), LayerNeeds(True, True, False)


def stacked(*shape: int) -> torch.Tensor:
    """A tensor of any size, of which nothing but its place is asked."""
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.usefixtures("h100")
def test_each_operator_is_planned_as_what_it_does() -> None:
    T, x, w = 40, stacked(40 * 256, 64, 64, 64), stacked(40, 64)
    plain = Options(T, 1e-5, "sigmoid", "task_major")
    saved = Saved(x, w, None, None, w, w)
    assert choice.forward_training(x, w, None, None, plain) == "cuda"
    assert choice.forward_tracked(x, w, None, None, Running(), plain) == "cuda"
    assert choice.forward_eval(saved, plain) == "triton"
    assert choice.backward(x, saved, True, NEEDS, plain) == "cuda"
    assert choice.backward(x, saved, False, NEEDS, plain) == "triton"
    last = stacked(40 * 256, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    assert choice.forward_training(last, w, None, None, plain) == "cuda"
    small = stacked(T * 16, 24, 8, 8).double()
    assert choice.forward_training(small, w, None, None, plain) == "triton"
    assert choice.forward_tracked(small, w, None, None, Running(), plain) == "cuda"
    rows, gates = stacked(65536, 384), stacked(5, 384)
    for fan_out, long, backend in ((True, False, "cuda"), (False, False, "triton"), (False, True, "cuda")):
        tokens, weight = (stacked(8192, 12288), stacked(2, 12288)) if long else (rows, gates)
        options = LayerOptions(weight.size(0), 1e-5, "identity", "task_major", fan_out=fan_out)
        assert choice.layer_norm(tokens, weight, weight, None, options) == "triton"
        kept = LayerSaved(tokens, weight, weight, weight)
        assert choice.layer_norm_backward(tokens, None, kept, ROW_NEEDS, options) == backend
    hits = choice._batch_norm.cache_info().hits
    choice.backward(x, saved, True, NEEDS, plain)
    assert choice._batch_norm.cache_info().hits == hits + 1


@pytest.mark.usefixtures("h100")
def test_a_driver_that_strands_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that do not run are no reason to choose."""
    x, w, options = stacked(40 * 2048, 64, 32, 32), stacked(40, 64), Options(40, 1e-5, "sigmoid", "task_major")
    assert choice.forward_training(x, w, None, None, options) == "cuda"
    monkeypatch.setattr(torch.ops.tsbn, "_cuda_active_clusters", lambda *_: 0, raising=False)
    choice._batch_norm.cache_clear()
    cuda_rules.plan.cache_clear()
    assert choice.forward_training(x, w, None, None, options) == "triton"


class Kernels:
    """Stands for a backend: answers with its name, or with an error."""

    def __init__(self, name: str) -> None:
        self.name, self.health = name, Health(name)
        self.error: Exception | None = None

    def __call__(self, *arguments: Any) -> str:
        if self.error is not None:
            raise self.error
        self.health.proved = True
        return self.name


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernels]:
    kernels = {name: Kernels(name) for name in ("triton", "cuda")}
    for backend, name in ((triton, "triton"), (cuda, "cuda")):
        monkeypatch.setattr(backend, "available", True)
        monkeypatch.setattr(backend, "health", kernels[name].health)
    monkeypatch.setattr(triton, "operator", lambda _: kernels["triton"])
    for name in ("backward", "moments"):
        monkeypatch.setattr(cuda, name, kernels["cuda"], raising=False)
    return kernels


def planned_for(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(choice, "backward", lambda *_: backend)


def chain(key: str = "CUDA", name: str = "backward") -> Any:
    return chained(name, key, lambda *_: "reference")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_one_that_is_planned_runs_and_the_other_takes_over(
    both: dict[str, Kernels], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned_for(monkeypatch, backend)
    other = {"triton": "cuda", "cuda": "triton"}[backend]
    call = chain()
    assert call(1) == backend
    both[backend].error = KernelError("slab", "OutOfResources: shared memory", own=True)
    with pytest.warns(UserWarning, match=f"without the kernel slab of {backend}"):
        assert call(1) == other
    both[other].error = ValueError("too many tasks")
    with pytest.warns(UserWarning, match=f"without the kernel backward of {other}"):
        assert call(1) == "reference"
    both[backend].error = None
    assert call(1) == backend
    both[backend].health.broken = "no compiler"
    both[other].error = None
    assert call(1) == other


@pytest.mark.usefixtures("both")
def test_what_is_forced_or_has_no_plan_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    planned_for(monkeypatch, "cuda")
    assert chain()(1) == "cuda"
    with use_backend("triton"):
        assert chain()(1) == "triton"
    planned_for(monkeypatch, "triton")
    with use_backend("cuda"):
        assert chain()(1) == "cuda"
    assert chain("XPU")(1) == "triton"
    assert chain(name="moments")(1) == "triton"  # which only Triton has a kernel for


def test_a_choice_that_fails_is_told_once_and_no_plan_is_none(
    both: dict[str, Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(*_: Any) -> str:
        raise error("of the choice")

    monkeypatch.setattr(choice, "backward", choose)
    choice._warn.cache_clear()
    error: type[Exception] = ValueError
    assert chain()(1) == "triton"
    for error in (RuntimeError, AttributeError):
        with pytest.warns(UserWarning, match=f"takes triton: {error.__name__}: of the choice"):
            assert chain()(1) == "triton"
        assert chain()(1) == "triton"
    both["triton"].error = torch.OutOfMemoryError("of the device")
    error = OSError
    with pytest.raises(torch.OutOfMemoryError):
        chain()(1)


# ---- forward in one, backward in the other ----------------------------------------------------------------------


@pytest.fixture
def no_launches(h100: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Both backends, allocating their results and launching nothing."""
    pytest.importorskip("triton")
    from tsbn_kernels.backends.triton import launch, layer_norm, ops

    monkeypatch.setattr(torch.ops.tsbn, "_cuda_launch", lambda *_: None, raising=False)
    monkeypatch.setattr(launch.Launch, "__call__", lambda *_: None)
    monkeypatch.setattr(ops, "device_of", lambda _: H100)
    for cache in ("forwards", "backwards"):
        monkeypatch.setattr(ops, cache, {})
    return {"triton": (ops, layer_norm), "cuda": (cuda, cuda)}


def places(tensors: Any) -> list[Any]:
    return [None if t is None else (t.shape, t.dtype, t.stride()) for t in tensors]


@pytest.mark.parametrize(("one", "other"), [("triton", "cuda"), ("cuda", "triton")])
def test_any_forward_may_be_followed_by_any_backward(no_launches: dict[str, Any], one: str, other: str) -> None:
    """What a forward leaves has the form that the other backend's has, and its backward takes it."""
    forms: tuple[dict[str, Any], ...] = ({}, {"residual": True}, {"rms": True}, {"fan_out": True})
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for memory_format in ("contiguous", "channels_last"):
            for fan_out in (False, True):
                p = problem(2, 3, 8, (4, 4), dtype=dtype, memory_format=memory_format)
                x = p.x[:3] if fan_out else p.x
                options = Options(*p.options, activation="relu", fan_out=fan_out)
                left = [no_launches[by][0].forward_training(x, p.weight, p.bias, p.dy, options) for by in (one, other)]
                assert places(left[0]) == places(left[1])
                _, mean, var = left[0]
                saved = Saved(x, p.weight, p.bias, p.dy, mean, var)
                needs = Needs(True, True, True, True)
                found = [no_launches[by][0].backward(p.dy, saved, True, needs, options) for by in (one, other)]
                assert places(found[0]) == places(found[1])
        for form in forms:
            q = layer_problem(2, 3, (4,), (8,), dtype=dtype, **form)
            arguments = q.x, q.weight, q.bias, q.residual, LayerOptions(2, *q.options)
            left = [no_launches[by][1].layer_norm(*arguments) for by in (one, other)]
            assert places(left[0]) == places(left[1])
            _, s, mean, rstd = left[0]
            kept = LayerSaved(q.x if s is None else s, q.weight, mean, rstd)
            row_needs = LayerNeeds(True, True, q.bias is not None)
            asked = q.dy, q.ds, kept, row_needs, arguments[-1]
            got = [no_launches[by][1].layer_norm_backward(*asked) for by in (one, other)]
            assert places(got[0]) == places(got[1])
