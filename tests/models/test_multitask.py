"""One backbone with T streams, against the plain model of each task."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import NETWORKS, pretrained
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tsbn_kernels import FusedTSigmaBN2d, MultiTaskModel, convert_model, revert_model
from tsbn_kernels.layers.layer_norm import LayerNorm2d

TASKS = ("age", "smile", "hat")
T, N = len(TASKS), 4


def multitask(name: str = "celeba", **options: Any) -> MultiTaskModel:
    """A model whose tasks differ."""
    backbone = convert_model(pretrained(name), T, **options)
    for module in backbone.modules():
        if hasattr(module, "gates"):
            nn.init.normal_(module.weight)
        if hasattr(module, "running_mean"):
            nn.init.normal_(module.running_mean, std=0.1)
    return MultiTaskModel(backbone, {task: nn.Identity() for task in TASKS})


def plain_models(model: MultiTaskModel) -> dict[str, nn.Module]:
    return {task: revert_model(model.backbone, t) for t, task in enumerate(TASKS)}


def images(n: int = N, size: int = 16) -> Tensor:
    return torch.randn(n, 3, size, size)


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def assert_same_statistics(model: MultiTaskModel, plain: dict[str, nn.Module]) -> None:
    for task, now in plain_models(model).items():
        expected = plain[task].state_dict()
        for key, tensor in now.state_dict().items():
            if "running" in key or "tracked" in key:
                close(tensor, expected[key])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_each_head_gets_the_stream_of_its_task(training: bool, memory_format: Any, name: str) -> None:
    model = multitask(name).to(torch.float64, memory_format=memory_format).train(training)
    plain = plain_models(model)
    x = torch.randn(N, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=memory_format)
    y = model(x)
    assert list(y) == list(TASKS)
    for task in TASKS:
        close(y[task], plain[task](x))
    assert_same_statistics(model, plain)


@pytest.mark.parametrize("tasks", [["smile"], ["hat", "age"], ["age", "smile", "hat"], ["hat", "smile", "age"]])
@pytest.mark.parametrize("variant", ["ts_sigma_bn", "tsbn"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_some_tasks_leave_the_others_alone(momentum: float | None, variant: Any, tasks: list[str]) -> None:
    model = multitask(variant=variant)
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = momentum
    plain = plain_models(model)
    for _ in range(2):
        x = images()
        y = model(x, tasks=tasks)
        assert list(y) == tasks
        for task in tasks:
            close(y[task], plain[task](x))
    assert_same_statistics(model, plain)
    loss = sum(stream.square().mean() for stream in y.values())
    loss.backward()
    for layer in model.backbone.modules():
        if hasattr(layer, "gates"):
            rows = layer.weight.grad.abs().sum(1) > 0
            assert rows.tolist() == [task in tasks for task in TASKS]


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 4, 2), (2, 3, 4)])
def test_a_batch_of_each_task_of_equal_or_unequal_sizes(sizes: tuple[int, ...]) -> None:
    model = multitask().double()
    plain = plain_models(model)
    inputs = {task: images(n).double() for task, n in zip(reversed(TASKS), sizes, strict=True)}
    batches: list[int] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    y = model(inputs)
    assert batches == [sum(sizes)]
    assert list(y) == list(inputs)
    for task, x in inputs.items():
        expected = plain[task](x)
        close(y[task], expected)
        dy = torch.randn_like(expected)
        weight = next(iter(model.backbone.parameters()))
        found = torch.autograd.grad(y[task].relu_(), weight, dy, retain_graph=True)  # a head may write in place
        close(*found, *torch.autograd.grad(expected.relu(), next(iter(plain[task].parameters())), dy))
    assert_same_statistics(model, plain)
    only = model.eval()(inputs, tasks=["hat"])
    assert list(only) == ["hat"]
    close(only["hat"], plain["hat"].eval()(inputs["hat"]))


def test_the_shared_stem_runs_once_and_is_not_copied() -> None:
    model = multitask()
    seen: dict[str, Tensor] = {}
    convolution, norm, *_ = model.backbone
    convolution.register_forward_hook(lambda _, args, y: seen.update(stem=y))
    norm.register_forward_hook(lambda _, args, y: seen.update(read=args[0], streams=y))
    model(images())
    assert seen["stem"].shape[0] == N
    assert seen["read"].data_ptr() == seen["stem"].data_ptr()
    assert seen["streams"].shape[0] == T * N


def test_two_branches_may_normalise_the_shared_input() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.two = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x), self.two(x)], 1)

    plain, x = Branches(), images()
    y = MultiTaskModel(convert_model(plain, T, pretrained=True), dict.fromkeys(TASKS, nn.Identity()))(x)
    for task in TASKS:
        torch.testing.assert_close(y[task], plain(x), rtol=1e-4, atol=1e-4)


def test_features_of_several_scales() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.coarse = nn.Sequential(nn.Conv2d(4, 8, 2, 2), nn.BatchNorm2d(8))

        def forward(self, x: Tensor) -> dict[str, Any]:
            fine = self.fine(x)
            return {"input": x, "levels": [fine, self.coarse(fine)]}

    model = MultiTaskModel(convert_model(Pyramid(), T), {task: nn.Identity() for task in TASKS})
    plain, x = plain_models(model), images()
    for task, features in model(x).items():
        assert features["input"] is x  # the same for all tasks
        expected = plain[task](x)["levels"]
        for level, wanted in zip(features["levels"], expected, strict=True):
            close(level, wanted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_separate(duplicate: Any) -> None:
    model = multitask().eval()
    other = duplicate(model)
    x = images()
    y = other(x, tasks=["hat"])["hat"]
    assert torch.equal(y, model(x)["hat"])
    nn.init.zeros_(next(other.backbone.parameters()))
    assert not torch.equal(model(x)["hat"], other(x)["hat"])


def test_backbone_alone_and_in_two_models() -> None:
    """Outside of forward the layers are what they were: they take stacked streams."""
    model = multitask().eval()
    second = MultiTaskModel(model.backbone, {task: nn.Flatten(0) for task in TASKS})
    x = images()
    y = model(x)
    for stream, task in zip(model.backbone(x.repeat(T, 1, 1, 1)).chunk(T), TASKS, strict=True):
        close(stream, y[task])
        close(second(x)[task], y[task].flatten())
    with pytest.raises(RuntimeError):
        model(torch.randn(N, 1, 16, 16))
    close(model(x)["hat"], y["hat"])


def test_state_dict_has_no_names_of_its_own() -> None:
    model = MultiTaskModel(convert_model(pretrained("celeba"), T), {task: nn.Linear(16, 1) for task in TASKS})
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "heads"}
    model.backbone.load_state_dict(NETWORKS["celeba"]().state_dict())


def test_empty_batch() -> None:
    y = multitask("segnet").eval()(images(0))
    assert all(stream.shape == (0, 4, 16, 16) for stream in y.values())


def test_under_compile() -> None:
    model = multitask("segnet").eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    for tasks in (None, ["hat", "age"]):
        for task, stream in model(x, tasks).items():
            close(compiled(x, tasks)[task], stream)


def test_backbone_that_does_not_fit_is_an_error() -> None:
    heads = {task: nn.Identity() for task in TASKS}
    plain = pretrained("celeba")
    with pytest.raises(ValueError, match=r"CelebA has no task-specific layer; convert it with convert_model\(backbone"):
        MultiTaskModel(plain, heads)
    with pytest.raises(
        ValueError, match=r"layer '1' .* each of the 3 heads, got stacking='task_major' and num_tasks=2"
    ):
        MultiTaskModel(convert_model(plain, 2), heads)
    with pytest.raises(ValueError, match=r"must be task_major .* got stacking='sample_major'"):
        MultiTaskModel(convert_model(plain, T, stacking="sample_major"), heads)


def test_wrong_tasks_and_inputs_are_errors() -> None:
    model = multitask()
    for tasks in (["smile", "smile"], ["smile", "beard"]):
        with pytest.raises(
            ValueError, match=f"tasks must be different ones of age, smile, hat, got {', '.join(tasks)}"
        ):
            model(images(), tasks=tasks)
    with pytest.raises(ValueError, match="got none"):
        model(images(), tasks=[])
    with pytest.raises(ValueError, match="inputs has no batch for hat; it has age"):
        model({"age": images()}, tasks=["age", "hat"])
    with pytest.raises(ValueError, match="tasks must be different ones of age, smile, hat, got beard"):
        model({"beard": images()})


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[::2]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda: [Halved(), nn.BatchNorm2d(3)], "expected 4 shared samples or 12 of 3 streams"),
        (
            lambda: [nn.BatchNorm2d(3), Halved(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)],
            "got input .*in module .3. ",
        ),
        (lambda: [nn.BatchNorm2d(3), Halved()], "must return 4 samples for each of 3 tasks, got a tensor of shape"),
    ],
)
def test_backbones_that_change_the_number_of_samples_are_errors(layers: Any, message: str) -> None:
    backbone = convert_model(nn.Sequential(*layers()), T)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        MultiTaskModel(backbone, {task: nn.Identity() for task in TASKS})(images())


def test_outputs_of_the_backbone_are_recomputed() -> None:
    layers = [FusedTSigmaBN2d(T, 8, activation="silu") for _ in range(2)]
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), layers[0], nn.Conv2d(8, 8, 3), layers[1], nn.Conv2d(8, 8, 3))
    memory: list[StorageWeakRef] = []
    for k in (1, 3):
        backbone[k].register_forward_hook(lambda _, __, y: memory.append(StorageWeakRef(y.untyped_storage())))
    x, gradients = images(size=12), []
    for recompute in (True, False):
        model = MultiTaskModel(backbone, {task: nn.Flatten() for task in TASKS}, recompute=recompute)
        loss = torch.cat(list(model(x).values())).square().sum()
        assert [one.expired() for one in memory[-2:]] == 2 * [recompute]
        gradients.append(torch.autograd.grad(loss, list(backbone.parameters())))
    for got, wanted in zip(*gradients, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, LayerNorm2d])
def test_onnx_takes_the_model(norm: type[nn.Module], tmp_path: Path) -> None:
    """With all of its heads, in operators of ONNX alone."""
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 1), norm(4))
    backbone = convert_model(layers, T, pretrained=False)
    for module in backbone.modules():
        if hasattr(module, "gates"):
            nn.init.normal_(module.weight)
    model, x = MultiTaskModel(backbone, {task: nn.Conv2d(4, 2, 1) for task in TASKS}).eval(), images(2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = reference.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    found = session.run(None, {session.input_names[0]: x.numpy()})
    for got, wanted in zip(found, model(x).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=1e-4, atol=1e-5)
