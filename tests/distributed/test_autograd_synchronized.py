"""Statistics synchronised over processes: equal to one process on the joined batch, with one collective each way."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from support import ranks
from support.graphs import GraphCounter
from support.problems import stack, unstack
from support.tolerances import assert_relative, assert_same_bits
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from tsbn_kernels import (
    FusedTSigmaBN,
    FusedTSigmaBN1d,
    FusedTSigmaBN2d,
    LateFanOut,
    convert_model,
    convert_sync_batchnorm,
    functional,
    recompute_outputs,
    revert_model,
    use_backend,
)

T, C, SPATIAL = 3, 5, (6, 7)
SIZES = (4, 0, 2, 7)  # samples of each rank
EXACT = {"rtol": 1e-10, "atol": 1e-11}
CLOSE = {
    torch.float64: EXACT,
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 0.01, "atol": 0.02},
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen bias, cumulative average": {"bias": "frozen", "momentum": None},
    "identity gate, activation": {"gate": "identity", "bias": True, "activation": "gelu"},
    "activation and residual": {"activation": "silu", "residual": True, "bias": True},
    "residual alone": {"residual": True},
    "fan-out": {"fan_out": True, "bias": True, "activation": "leaky_relu"},
    "fan-out and residual": {"fan_out": True, "activation": "relu", "residual": True, "stacking": "sample_major"},
    "some tasks": {"tasks": [2, 0], "bias": True, "stacking": "sample_major"},
}


def new_layer(dtype: torch.dtype = torch.float32, **options: Any) -> FusedTSigmaBN2d:
    """With random parameters."""
    layer = FusedTSigmaBN2d(T, C, dtype=dtype, **{"process_group": "world", **options})
    with torch.no_grad():
        layer.weight.normal_()
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


def alone(layer: FusedTSigmaBN2d) -> FusedTSigmaBN2d:
    """The layer of one process with the joined batch, in float64."""
    whole = copy.deepcopy(layer).double()
    whole.process_group = None
    return whole


# ---- against one process -----------------------------------------------------------------------------------------


def two_steps(
    sizes: tuple[int, ...], dtype: torch.dtype, memory_format: str, options: dict[str, Any], offset: float = 1.0
) -> Tensor:
    """Trains a rank's layer on its part beside one layer on the joined batch; returns the running statistics."""
    options = dict(options)
    tasks, residual = options.pop("tasks", None), options.pop("residual", False)
    layer = new_layer(**options)
    stacking, rank = layer.stacking, distributed.get_rank()
    whole, count = alone(layer), T if tasks is None else len(tasks)
    views = {"x": (1, "task_major") if layer.fan_out else (count, stacking), "dy": (count, stacking)}
    if residual:
        views["residual"] = count, stacking

    def step(module: FusedTSigmaBN2d, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items() if name != "dy"}
        module.zero_grad()
        y = module(*leaves.values(), tasks=tasks)
        y.backward(inputs["dy"])
        return {"dy": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}  # type: ignore[dict-item]

    for _ in range(2):
        mine, joined = {}, {}
        for name, (streams, how) in views.items():
            parts = [torch.randn(streams, n, C, *SPATIAL).add(offset * (name == "x")).to(dtype) for n in sizes]
            mine[name] = stack(parts[rank], how, memory_format)
            joined[name] = stack(torch.cat(parts, 1).double(), how)
        results, exact = step(layer, mine), step(whole, joined)
        for name, (streams, how) in views.items():
            wanted = unstack(exact[name], streams, how).split(sizes, 1)[rank]
            assert results[name].dtype == dtype
            torch.testing.assert_close(unstack(results[name], streams, how).double(), wanted, **CLOSE[dtype])
        for parameter, other in zip(layer.parameters(), whole.parameters(), strict=True):
            assert parameter.grad is not None
            distributed.all_reduce(parameter.grad)
            torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=2e-5, atol=2e-4)
        for buffer, other in zip(layer.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(buffer.to(other.dtype), other, rtol=1e-5, atol=1e-5)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return torch.stack((layer.running_mean, layer.running_var))


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_one_process_on_the_joined_batch(world_size: int, options: dict[str, Any]) -> None:
    """With unequal batches, one of them empty; the statistics have the same bits on all ranks."""
    for dtype, memory_format in ((torch.float64, "contiguous"), (torch.float32, "channels_last")):
        wide = options | {"dtype": dtype}
        statistics = ranks.run(two_steps, world_size, SIZES[:world_size], dtype, memory_format, wide)
        for other in statistics[1:]:
            assert_same_bits(other, statistics[0])


@pytest.mark.parametrize("fan_out", [False, True])
def test_half_precision(fan_out: bool) -> None:
    """Of the activations, with float32 parameters."""
    ranks.run(two_steps, 2, (3, 5), torch.bfloat16, "channels_last", {"activation": "silu", "fan_out": fan_out})


def far_means() -> None:
    """Of a batch with |mean| = 1e4 * std, whose mean float32 holds to one part in 2000 of std."""
    layer, rank = new_layer(bias=True), distributed.get_rank()
    xs = [torch.randn(T, n, C, *SPATIAL).add(1e4 * (1 + 1e-5 * n)) for n in (6, 3)]
    dys = [torch.randn_like(x) for x in xs]
    whole = alone(layer)
    joined = torch.cat(xs, 1).double().flatten(0, 1).requires_grad_()
    exact = whole(joined)
    exact.backward(torch.cat(dys, 1).double().flatten(0, 1))
    x = xs[rank].flatten(0, 1).requires_grad_()
    y = layer(x)
    y.backward(dys[rank].flatten(0, 1))
    wanted = exact.unflatten(0, (T, -1)).split((6, 3), 1)[rank].flatten(0, 1)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    assert layer.running_var is not None
    assert whole.running_var is not None
    assert_relative(layer.running_var, whole.running_var, 1e-6)


def test_means_that_are_far_from_zero() -> None:
    ranks.run(far_means, 2)


def one_value_each(samples: int) -> tuple[Tensor, Tensor]:
    layer = FusedTSigmaBN1d(T, C, process_group="world")
    x = torch.full((T * samples, C), float(distributed.get_rank()), requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def test_one_value_on_each_rank_and_none_on_any() -> None:
    mean, var = ranks.run(one_value_each, 2, 1)[0]
    torch.testing.assert_close(mean, torch.full((T, C), 0.05))
    torch.testing.assert_close(var, torch.full((T, C), 0.9 + 0.1 * 0.5))
    mean, var = ranks.run(one_value_each, 2, 0)[1]
    assert torch.equal(mean, torch.zeros(T, C))
    assert torch.equal(var, torch.ones(T, C))


def two_pairs() -> Tensor:
    """Ranks 0 and 1, and 2 and 3, in groups of their own; each rank's values are its number."""
    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    rank = distributed.get_rank()
    layer = new_layer(process_group=pairs[rank // 2], momentum=1.0)
    layer(torch.full((T * 2, C, 2, 2), float(rank)))
    other = pairs[1 - rank // 2]
    with pytest.raises(ValueError, match="this process is not in process_group"):
        new_layer(process_group=other)(torch.zeros(T, C, 1, 1))
    assert layer.running_mean is not None
    return layer.running_mean[0, 0]


def test_a_group_of_some_ranks() -> None:
    assert [float(mean) for mean in ranks.run(two_pairs, 4)] == [0.5, 0.5, 2.5, 2.5]


# ---- what runs ---------------------------------------------------------------------------------------------------


def counts(layer: Any, *, streams: bool = False) -> list[Counter[str]]:
    """The collectives, and the operators, of a forward and of a backward pass."""
    x = torch.randn(T * 4, C, 3, 3, requires_grad=True)
    found = []
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        y = torch.cat(layer.streams(x)) if streams else layer(x)
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        y.backward(torch.randn_like(y))
    for done in (forward, backward):
        events = {event.key: event.count for event in done.key_averages()}
        found.append(Counter({key: n for key, n in events.items() if key.startswith(("c10d::", "tsbn::"))}))
    return found


SYNCHRONISED = [
    {"tsbn::moments": 1, "c10d::_allgather_base_": 1, "tsbn::forward_eval": 1},
    {"tsbn::backward": 1, "c10d::allreduce_": 1, "tsbn::input_gradient": 1},
]


def one_collective_each_way() -> None:
    layer = new_layer(bias=True, activation="relu")
    assert counts(layer) == SYNCHRONISED
    assert counts(layer, streams=True) == SYNCHRONISED
    assert counts(layer.eval()) == [{"tsbn::forward_eval": 1}, {"tsbn::backward": 1}]
    assert counts(new_layer(track_running_stats=False).eval()) == [{"tsbn::forward_training": 1}, {"tsbn::backward": 1}]
    rank = distributed.get_rank()
    groups = [distributed.new_group([member]) for member in range(distributed.get_world_size())]
    single = new_layer(process_group=groups[rank])
    assert counts(single) == [{"tsbn::forward_tracked": 1}, {"tsbn::backward": 1}]
    late = LateFanOut.from_layer(new_layer(), nn.MaxPool2d(2))
    assert counts(late)[0] == {"tsbn::moments": 1, "c10d::_allgather_base_": 1, "tsbn::forward_eval": 2}


def test_one_collective_each_way_and_none_in_evaluation_or_alone() -> None:
    ranks.run(one_collective_each_way, 2)


def streams_and_recomputation() -> None:
    """The streams are those of the stacked output; what is computed again is what was there, to the bit."""
    layer, rank = new_layer(bias=True, activation="silu"), distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x = (torch.randn(T * (2 + rank), C, *SPATIAL, generator=generator) + 100).requires_grad_()
    dy = torch.randn(x.shape, generator=generator)
    convolution = nn.Conv2d(C, 4, 1)

    def gradients(how: str) -> tuple[Tensor, ...]:
        twin = copy.deepcopy(layer)
        if how == "streams":
            y = torch.cat(twin.streams(x))
        elif how == "checkpoint":
            y = checkpoint(twin, x, use_reentrant=False)  # type: ignore[assignment]
        else:
            y = twin(x)
        y = convolution(y)
        y.backward(dy[:, :4])
        results = y, x.grad, twin.weight.grad, convolution.weight.grad
        x.grad = convolution.weight.grad = convolution.bias.grad = None  # type: ignore[union-attr]
        return results  # type: ignore[return-value]

    wanted = gradients("plain")
    with recompute_outputs():
        again = gradients("recomputed")
    for got in (gradients("streams"), gradients("checkpoint"), again):
        for tensor, exact in zip(got, wanted, strict=True):
            torch.testing.assert_close(tensor, exact, rtol=1e-6, atol=1e-6)


def test_streams_checkpointing_and_recomputed_outputs() -> None:
    ranks.run(streams_and_recomputation, 2)


def on_the_reference() -> None:
    layer, rank = new_layer(bias=True, activation="gelu"), distributed.get_rank()
    x = torch.randn(T * (2 + rank), C, *SPATIAL, generator=torch.Generator().manual_seed(rank))
    results = []
    for name in ("cpu", "reference"):
        leaf, twin = x.clone().requires_grad_(), copy.deepcopy(layer)
        with use_backend(name):
            y = twin(leaf)
        y.backward(x.sin())
        results.append((y, leaf.grad, twin.weight.grad, *twin.buffers()))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("native")
def test_the_reference_backend() -> None:
    ranks.run(on_the_reference, 2)


def compiled() -> None:
    """Without a graph break, for batches of any size that differ between the ranks."""
    layer, rank = new_layer(bias=True, activation="silu"), distributed.get_rank()
    twin, counter = copy.deepcopy(layer), GraphCounter()
    graph = torch.compile(twin, fullgraph=True, backend=counter)
    for n in (4, 5, 6):
        x = torch.randn(T * (n + rank), C, 4, 3)
        results = []
        for module, owner in ((layer, layer), (graph, twin)):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(x.cos())
            results.append((y, leaf.grad, *(p.grad for p in owner.parameters()), *owner.buffers()))
            owner.zero_grad()
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)
    for name in ("all_gather_into_tensor", "all_reduce"):
        assert counter.targets.count(f"_c10d_functional.{name}.default") <= 2  # of one size, and of any


def test_under_compile() -> None:
    ranks.run(compiled, 2)


# ---- networks ----------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """For one image in, T streams out."""
    return nn.Sequential(
        nn.Conv2d(3, C, 3),
        FusedTSigmaBN2d(T, C, bias=True, activation="silu", fan_out=True),
        nn.Conv2d(C, C, 3),
        FusedTSigmaBN2d(T, C, activation="silu"),
    ).double()


def data_parallel() -> None:
    """The mean over the ranks of equal batches' losses has the gradients of one process on the joined batch."""
    rank, ranks_ = distributed.get_rank(), distributed.get_world_size()
    single, images = network(), torch.randn(4 * ranks_, 3, 8, 8, dtype=torch.float64)
    dys = torch.randn(ranks_, T * 4, C, 4, 4, dtype=torch.float64)
    model = DistributedDataParallel(convert_sync_batchnorm(copy.deepcopy(single)))
    model(images.split(4)[rank]).backward(dys[rank])
    whole = dys.unflatten(1, (T, 4)).transpose(0, 1).flatten(0, 2)
    single(images).backward(whole / ranks_)
    for got, wanted in zip(model.module.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, **EXACT)
    for got, wanted in zip(model.module.buffers(), single.buffers(), strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


def test_data_parallel_gives_the_gradients_of_one_process() -> None:
    ranks.run(data_parallel, 2)


def groups_of_converted_models() -> None:
    group = distributed.new_group([0, 1])
    plain = nn.ModuleList([nn.SyncBatchNorm(C), nn.SyncBatchNorm(C, process_group=group), nn.BatchNorm2d(C)])
    model: Any = convert_model(plain, T, fuse_activation=False)
    assert [layer.process_group for layer in model] == ["world", group, None]
    assert [layer.process_group for layer in copy.deepcopy(model)] == ["world", group, None]
    back: Any = revert_model(model, 1)
    assert [type(layer) for layer in back] == [type(layer) for layer in plain]
    assert [back[0].process_group, back[1].process_group] == [None, group]
    assert convert_sync_batchnorm(model, group) is model
    assert all(layer.process_group is group for layer in model)
    with pytest.raises(TypeError, match="cannot be pickled; set its process_group to None or 'world'"):
        pickle.dumps(model)


def test_converted_models_keep_their_groups() -> None:
    ranks.run(groups_of_converted_models, 2)


def test_convert_sync_batchnorm() -> None:
    model = network()
    assert convert_sync_batchnorm(model) is model
    assert [layer.process_group for layer in model if isinstance(layer, FusedTSigmaBN)] == ["world", "world"]
    assert "process_group='world'" in repr(model[1])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)[1].process_group == "world"
    with pytest.raises(ValueError, match="Conv2d has no task-specific layer to synchronise"):
        convert_sync_batchnorm(nn.Conv2d(1, 1, 1))
    model[1].activation, model[1].fan_out, model[1].process_group, model[1].recover_input = None, False, None, True
    with pytest.raises(ValueError, match="'1' has recover_input=True"):
        convert_sync_batchnorm(model)


# ---- errors ------------------------------------------------------------------------------------------------------


def test_errors_without_processes() -> None:
    x = torch.randn(T * 2, C, 3, 3)
    layer = new_layer()
    with pytest.raises(RuntimeError, match=r"torch.distributed is not initialised; call .*init_process_group"):
        layer(x)
    layer.eval()(x)
    for options in ({"recover_input": True}, {"recover_input": True, "activation": "leaky_relu"}):
        with pytest.raises(ValueError, match="recover_input=True does not work with a process_group"):
            new_layer(**options)
        with pytest.raises(ValueError, match="recover_input=True does not work with a process_group"):
            functional.task_batch_norm(
                x,
                layer.weight,
                layer.bias,
                layer.running_mean,
                layer.running_var,
                num_tasks=T,
                training=False,
                process_group="world",
                **options,
            )


def errors() -> None:
    layer, x = new_layer(), torch.randn(T * 2, C, 3, 3, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        (y.square().sum() + dx.square().sum()).backward()
    with pytest.raises(RuntimeError, match="do not work under vmap"):
        torch.func.vmap(new_layer(track_running_stats=False))(torch.randn(2, T * 2, C, 3, 3))
    with pytest.raises(RuntimeError, match="have no forward-mode"), torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))
    with pytest.raises(ValueError, match=r"process_group must be None, 'world' or .*, got 'all'"):
        new_layer(process_group="all")(x)
    mine = [2, 6] if distributed.get_rank() == 0 else [3, 4]
    with pytest.raises(RuntimeError, match=r"normalises . tasks of . channels where this rank has . of ."):
        FusedTSigmaBN1d(*mine, process_group="world")(torch.randn(6 * mine[0], mine[1]))


def test_errors() -> None:
    ranks.run(errors, 2)


def functional_gradient() -> None:
    """torch.func.grad over functional_call."""
    layer, rank = new_layer(track_running_stats=False), distributed.get_rank()
    x = torch.randn(T * 2, C, 3, 3, generator=torch.Generator().manual_seed(rank))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, parameters, (x,))
        return (y * x.sin()).sum()

    got = torch.func.grad(loss)({"weight": layer.weight.detach()})["weight"]
    (layer(x) * x.sin()).sum().backward()
    torch.testing.assert_close(got, layer.weight.grad)


def test_functional_gradient() -> None:
    ranks.run(functional_gradient, 2)
