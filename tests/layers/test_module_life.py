"""What users do to a layer besides training it: copies, devices, averaging, pruning, hooks, checkpointing, sharing."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from support.layers import (
    GATES,
    LAYERS,
    SHAPE,
    WITH_BIAS,
    C,
    N,
    T,
    assert_batches,
    assert_same,
    gradients,
    of_any_kind,
    train,
    trained,
    with_a_bias,
)
from support.processes import python_output
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, update_bn

from tsbn_kernels import FusedTSigmaBN2d, LateFanOut, convert_model, parameter_groups
from tsbn_kernels.layers.task_specific import TaskSpecific

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


# ---- copies and files ------------------------------------------------------------------------------------------------


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@with_a_bias
def test_copies_go_on_by_themselves(duplicate: Any, kind: str) -> None:
    more = {"activation": "leaky_relu", "negative_slope": 0.3, "momentum": None} if kind == "BN" else {}
    layer = trained(kind, bias="frozen", stacking="sample_major", **more)
    other = duplicate(layer)
    assert repr(other) == repr(layer)
    before = copy.deepcopy(layer.state_dict())
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    got = gradients(other, x, dy)
    assert_same(layer.state_dict().values(), before.values())
    assert_same(got, gradients(layer, x, dy))
    assert_same(layer.state_dict().values(), other.state_dict().values())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
@with_a_bias
def test_a_state_dict_passes_through_a_safe_file(mmap: bool, assign: bool, tmp_path: Any, kind: str) -> None:
    source, target = trained(kind, bias=True), LAYERS[kind](bias=True)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True, mmap=mmap)
    target.load_state_dict(state, assign=assign)
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    assert_same(gradients(target, x, dy), gradients(source, x, dy))
    assert_same(target.state_dict().values(), source.state_dict().values())


@of_any_kind
def test_a_whole_layer_passes_through_a_safe_file(kind: str) -> None:
    layer = trained(kind)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with torch.serialization.safe_globals([type(layer)]):
        other = torch.load(file, weights_only=True)
    assert_same(other.state_dict().values(), layer.state_dict().values())


def test_pickles_of_before_the_epilogue_load() -> None:
    layer = trained()
    state = layer.__getstate__() if hasattr(layer, "__getstate__") else layer.__dict__.copy()
    state = {key: value for key, value in state.items() if key not in ("activation", "fan_out", "recover_input")}
    older = FusedTSigmaBN2d.__new__(FusedTSigmaBN2d)
    older.__setstate__(state)
    x = torch.randn(SHAPE)
    assert torch.equal(older(x), layer(x))
    assert repr(older) == repr(layer)


# ---- devices, dtypes, memory -----------------------------------------------------------------------------------------


@with_a_bias
def test_conversions_keep_what_they_should(kind: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, C, 3), trained(kind, bias=True))
    x, dy = torch.randn(T * N, 3, 5, 5), torch.randn(SHAPE)
    expected = gradients(copy.deepcopy(network), x, dy)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_same(gradients(network, x.to(memory_format=torch.channels_last), dy), expected)
    wide = copy.deepcopy(network).double()
    assert {t.dtype for t in wide[1].state_dict().values()} - {torch.int64} == {torch.float64}
    for half in (copy.deepcopy(network).half(), copy.deepcopy(network).to(torch.bfloat16)):
        assert half[1](torch.randn(SHAPE, dtype=half[0].weight.dtype)).dtype == half[0].weight.dtype
    network.to("meta")
    assert network(x.to("meta")).shape == SHAPE


@pytest.mark.parametrize("make", [*LAYERS.values(), partial(LateFanOut, T, C)])
def test_built_on_meta_and_filled_from_a_checkpoint(make: Any) -> None:
    source, target, x = make(), make(device="meta"), torch.randn(SHAPE)
    nn.init.normal_(source.weight)
    target.load_state_dict(source.state_dict(), assign=True)
    emptied = make(device="meta").to_empty(device="cpu")
    emptied.load_state_dict(source.state_dict())
    for layer in (target, emptied) if isinstance(source, TaskSpecific) else ():
        assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"cpu"}
        assert torch.equal(layer(x), source(x))


def test_statistics_in_shared_memory_stay_there() -> None:
    layer = trained(bias="frozen").share_memory()
    addresses = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(SHAPE))
    layer(torch.randn(2 * N, C, 3, 3), tasks=[0, 2])
    assert all(tensor.is_shared() for tensor in layer.state_dict().values())
    assert addresses == {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    assert layer.num_batches_tracked.tolist() == [2, 1, 2]


def test_another_process_sees_shared_statistics() -> None:
    program = """
import torch
from torch import multiprocessing
from tsbn_kernels import FusedTSigmaBN1d

def step(layer):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer(torch.randn(6, 4) + 5)

if __name__ == "__main__":
    torch.set_num_threads(1)
    layer = FusedTSigmaBN1d(2, 4, momentum=None).share_memory()
    child = multiprocessing.get_context("fork").Process(target=step, args=(layer,))
    child.start(), child.join()
    print(child.exitcode, layer.num_batches_tracked.tolist(), (layer.running_mean > 3).all().item())
"""
    assert python_output(program) == "0 [1, 1] True\n"


# ---- averages of weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_bn_measures_the_statistics_anew(momentum: float | None) -> None:
    network = nn.Sequential(FusedTSigmaBN2d(T, C, momentum=momentum), nn.ReLU()).eval()
    train(network[0])
    batches = [torch.randn(SHAPE) * 2 + 1 for _ in range(4)]
    update_bn(batches, network)
    assert not network.training
    assert network[0].momentum == momentum
    assert network[0].num_batches_tracked.tolist() == [4] * T
    streams = torch.stack([batch.view(T, N, C, -1) for batch in batches])
    torch.testing.assert_close(network[0].running_mean, streams.mean(dim=(0, 2, 4)))
    variances = streams.transpose(2, 3).flatten(3).var(dim=3).mean(0)
    torch.testing.assert_close(network[0].running_var, variances)


@pytest.mark.parametrize("use_buffers", [True, False])
@with_a_bias
def test_averaged_models(use_buffers: bool, kind: str) -> None:
    """As with plain layers: parameters are averaged; statistics are the last, or averaged with ``use_buffers``."""
    network = nn.Sequential(LAYERS[kind](bias=True))
    averaged = AveragedModel(network, use_buffers=use_buffers)
    steps = []
    for _ in range(3):
        train(network[0])
        averaged.update_parameters(network)
        steps.append(copy.deepcopy(network[0].state_dict()))
    got = averaged.module[0].state_dict()
    for name in ("weight", "bias"):
        torch.testing.assert_close(got[name], torch.stack([step[name] for step in steps]).mean(0))
    for name in STATISTICS[:2] if kind == "BN" else ():
        expected = torch.stack([step[name] for step in steps]).mean(0) if use_buffers else steps[-1][name]
        torch.testing.assert_close(got[name], expected)
    update_bn([torch.randn(SHAPE)], averaged)
    assert_batches(averaged.module[0], 1)


def test_a_converted_model_is_not_converted_again() -> None:
    network = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C))
    converted = convert_model(network, T)
    with pytest.raises(ValueError, match="no normalisation to convert"):
        convert_model(converted, T)
    both = convert_model(nn.Sequential(converted, nn.BatchNorm2d(C)), 2)
    assert (both[0][1].num_tasks, both[1].num_tasks) == (T, 2)


# ---- parametrizations and pruning ------------------------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@of_any_kind
def test_parametrized_weights(kind: str) -> None:
    layer, twin = trained(kind), LAYERS[kind]()
    with torch.no_grad():
        twin.weight.copy_(2 * layer.weight)
    parametrize.register_parametrization(layer, "weight", Double())
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    got, expected = gradients(layer, x, dy), gradients(twin, x, dy)
    assert_same(got, [expected[0], 2 * expected[1]])
    torch.testing.assert_close(layer.gates, twin.gates)
    torch.testing.assert_close(layer.task(1).weight, twin.gates[1])
    (group,) = parameter_groups(layer, lr=1.0)
    assert (group["name"], group["lr"]) == (GATES[kind], 100.0 if kind == "BN" else 10.0)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer.weight, twin.weight)


@with_a_bias
def test_pruned_weights(kind: str) -> None:
    layer, twin = trained(kind, bias=True), LAYERS[kind](bias=True)
    prune.l1_unstructured(layer, "weight", 0.5)
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
        twin.bias.copy_(layer.bias)
    assert (layer.weight == 0).sum() == round(layer.weight.numel() * 0.5)
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    dx, dbias, dweight = gradients(layer, x, dy)
    assert_same(
        (dx, dweight, dbias), [g * layer.weight_mask if i == 1 else g for i, g in enumerate(gradients(twin, x, dy))]
    )
    names = {group["name"]: len(group["params"]) for group in parameter_groups(layer, lr=1.0)}
    assert names == {"base": 1, GATES[kind]: 1}
    prune.remove(layer, "weight")
    assert torch.equal(layer(x), twin(x))


def test_a_parametrized_plain_layer_is_not_converted_in_silence() -> None:
    plain = nn.BatchNorm2d(C)
    parametrize.register_parametrization(plain, "weight", Double())
    with pytest.raises(ValueError, match=r"'0' is parametrized, which would be lost"):
        convert_model(nn.Sequential(plain), T)


# ---- hooks -----------------------------------------------------------------------------------------------------------


@of_any_kind
def test_hooks_of_every_kind_run_and_see_the_tensors(kind: str) -> None:
    layer, seen = trained(kind), []
    layer.register_forward_pre_hook(lambda m, args: seen.append(("before", args[0].shape)))
    layer.register_forward_hook(lambda m, args, y: seen.append(("after", y.shape)))
    layer.register_full_backward_pre_hook(lambda m, dy: seen.append(("dy", dy[0].shape)))
    layer.register_full_backward_hook(lambda m, dx, dy: seen.append(("dx", dx[0].shape)))
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    expected = gradients(copy.deepcopy(layer), x, dy)
    seen.clear()
    assert_same(gradients(layer, x, dy), expected)
    assert seen == [(name, torch.Size(SHAPE)) for name in ("before", "after", "dy", "dx")]


@of_any_kind
def test_hooks_may_replace_what_passes(kind: str) -> None:
    layer = trained(kind)
    x = torch.randn(SHAPE)
    expected = copy.deepcopy(layer)(2 * x) + 1
    layer.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    layer.register_forward_hook(lambda m, args, y: y + 1)
    torch.testing.assert_close(layer(x), expected)


@of_any_kind
def test_state_dict_hooks(kind: str) -> None:
    layer, seen = trained(kind), []
    layer.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append("save"))
    layer.register_state_dict_post_hook(lambda m, state, prefix, metadata: state.update(extra=torch.ones(1)))
    layer.register_load_state_dict_pre_hook(lambda m, state, *_: state.pop("extra"))
    layer.register_load_state_dict_post_hook(lambda m, keys: seen.append("load"))
    layer.load_state_dict(layer.state_dict())
    assert seen == ["save", "load"]


# ---- gradients that are not wanted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize(("kind", "options"), [("BN", {"activation": "relu"}), *((kind, {}) for kind in WITH_BIAS)])
def test_any_part_may_be_frozen(kind: str, options: Any, of_x: bool, frozen: tuple[str, ...]) -> None:
    layer = trained(kind, bias=True, **options)
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    expected = dict(zip(("x", "weight", "bias"), gradients(layer, x, dy), strict=True))
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    x.requires_grad_(of_x)
    y = layer(x)
    wanted = [name for name in expected if name not in frozen and (of_x or name != "x")]
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(dy)
    for name, tensor in {"x": x, "weight": layer.weight, "bias": layer.bias}.items():
        if name in wanted:
            torch.testing.assert_close(tensor.grad, expected[name])
        else:
            assert tensor.grad is None
    assert_batches(layer, 2)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@of_any_kind
def test_without_gradients(kind: str, without: Any) -> None:
    layer = trained(kind)
    x = torch.randn(SHAPE)
    twin = copy.deepcopy(layer)
    with without():
        y = layer(x.requires_grad_())
    assert not y.requires_grad
    assert torch.equal(y, twin(x))
    assert_same(layer.state_dict().values(), twin.state_dict().values())
    dy = torch.randn(SHAPE)
    assert_same(gradients(layer, x.detach(), dy), gradients(twin, x.detach(), dy))  # it trains on


# ---- one graph, several passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("BN", {"activation": "silu"}), ("BN", {"recover_input": True}), *((kind, {}) for kind in LAYERS)],
)
def test_backward_twice_over_a_retained_graph(kind: str, options: Any) -> None:
    layer = trained(kind, **options)
    x = torch.randn(SHAPE, requires_grad=True)
    y = layer(x)
    for _ in range(2):
        dy = torch.randn(SHAPE)
        got = torch.autograd.grad(y, (x, layer.weight), dy, retain_graph=True)
        assert_same(got, gradients(copy.deepcopy(layer), x.detach(), dy))
    y.backward(dy)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(dy)


@with_a_bias
def test_two_forwards_before_one_backward(kind: str) -> None:
    layer = trained(kind, bias=True)
    first, second = (torch.randn(SHAPE), torch.randn(SHAPE)), (torch.randn(SHAPE) * 3, torch.randn(SHAPE))
    separate = [gradients(copy.deepcopy(layer), *pass_) for pass_ in (first, second)]
    outputs = [layer(x) for x, _ in (first, second)]
    torch.autograd.backward(outputs, [dy for _, dy in (first, second)])
    assert_same([p.grad for p in layer.parameters()], [a + b for a, b in zip(*(s[1:] for s in separate), strict=True)])
    assert_batches(layer, 2)


@of_any_kind
def test_tied_weights(kind: str) -> None:
    first, second = trained(kind), trained(kind)
    second.weight = first.weight
    network = nn.Sequential(first, second)
    assert len(list(network.parameters())) == 1
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    apart = copy.deepcopy(network)
    apart[1].weight = nn.Parameter(apart[1].weight.detach().clone())
    dx, dfirst, dsecond = gradients(apart, x, dy)
    assert_same(gradients(network, x, dy), [dx, dfirst + dsecond])
    (group,) = parameter_groups(network, lr=1.0)
    assert len(group["params"]) == 1


@of_any_kind
def test_a_layer_used_twice(kind: str) -> None:
    layer = trained(kind, **({"momentum": 0.5} if kind == "BN" else {}))
    apart = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(layer))
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    dx, dfirst, dsecond = gradients(apart, x, dy)
    start = copy.deepcopy(layer)
    assert_same(gradients(nn.Sequential(layer, layer), x, dy), [dx, dfirst + dsecond])
    assert_batches(layer, 2)
    if kind == "BN":
        second = apart[1].running_mean - start.running_mean / 2  # what the second use adds
        torch.testing.assert_close(layer.running_mean, apart[0].running_mean / 2 + second)


@of_any_kind
def test_functional_call_leaves_the_layer_alone(kind: str) -> None:
    layer = trained(kind)
    before = copy.deepcopy(layer.state_dict())
    state = {name: tensor.clone() for name, tensor in trained(kind).state_dict().items()}
    x = torch.randn(SHAPE)
    y = torch.func.functional_call(layer, state, (x,))
    assert_same(layer.state_dict().values(), before.values())
    assert state.get("num_batches_tracked", torch.ones(T)).tolist() == [1] * T
    layer.load_state_dict(state)
    torch.testing.assert_close(y, layer(x))
