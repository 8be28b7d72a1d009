"""Conversion of layer normalisation: which modules, how they start, and what of the model must know of it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from support import ranks
from torch import Tensor, nn

from tsbn_kernels import (
    FusedTSigmaLN,
    FusedTSigmaLN2d,
    FusedTSigmaRMSNorm,
    MultiTaskModel,
    convert_model,
    expand_state_dict,
    export_task,
    parameter_groups,
    revert_model,
    shard_tasks,
)
from tsbn_kernels.layers.layer_norm import LayerNorm2d

TASKS = ("age", "smile", "hat")
T, N, L, D = len(TASKS), 4, 5, 6


def randomized(model: nn.Module, low: float = -1.0, high: float = 2.0) -> nn.Module:
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for parameter in module.parameters(recurse=False):
                nn.init.uniform_(parameter, low, high)
    return model


def assert_close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def assert_starts_as(plain: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    model = convert_model(plain, T, **options)
    wanted = plain(x)
    for stream in model(torch.cat([x] * T)).chunk(T):
        assert_close(stream, wanted)
    for task in range(T):
        assert_close(revert_model(model, task)(x), wanted)
    return model


KINDS: dict[str, tuple[Any, type[nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(D), FusedTSigmaLN, nn.LayerNorm, (N, L, D)),
    "of several dimensions": (lambda: nn.LayerNorm((L, D), eps=1e-3), FusedTSigmaLN, nn.LayerNorm, (N, L, D)),
    "without bias": (lambda: nn.LayerNorm(D, bias=False), FusedTSigmaLN, nn.LayerNorm, (N, D)),
    "without parameters": (lambda: nn.LayerNorm(D, elementwise_affine=False), FusedTSigmaLN, nn.LayerNorm, (N, D)),
    "RMSNorm": (lambda: nn.RMSNorm(D), FusedTSigmaRMSNorm, nn.RMSNorm, (N, L, D)),
    "RMSNorm without weight": (
        lambda: nn.RMSNorm(D, eps=1e-3, elementwise_affine=False),
        FusedTSigmaRMSNorm,
        nn.RMSNorm,
        (N, L, D),
    ),
    "LayerNorm2d": (lambda: LayerNorm2d(D), FusedTSigmaLN2d, LayerNorm2d, (N, D, L, L)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_layer(kind: str, training: bool) -> None:
    make, layer_class, plain_class, shape = KINDS[kind]
    plain = nn.Sequential(randomized(make())).train(training)
    model = assert_starts_as(plain, torch.randn(shape))
    layer = model[0]
    assert type(layer) is layer_class
    assert (layer.gate, layer.eps, layer.training) == ("identity", plain[0].eps, training)
    assert (layer.bias is None) == (getattr(plain[0], "bias", None) is None)
    assert all(parameter.requires_grad for parameter in layer.parameters())
    back = revert_model(model, 0)[0]
    assert type(back) is plain_class
    assert (back.eps, back.training) == (plain[0].eps, training)
    assert set(plain.state_dict()) <= set(revert_model(model, 0).state_dict())


def test_dtypes_attributes_hooks_and_frozen_weights_stay() -> None:
    plain = nn.Sequential(nn.LayerNorm(D, dtype=torch.bfloat16), nn.Identity())
    plain[0].note, plain[0].weight.mark = "kept", "kept too"  # type: ignore[assignment,attr-defined]
    plain[0].weight.requires_grad_(False)
    seen: list[Any] = []
    plain[0].register_forward_hook(lambda module, *_: seen.append(module))
    plain[1].norm = plain[0]
    model = convert_model(plain, T)
    layer: Any = model[0]
    assert layer is model[1].norm
    assert layer.weight.dtype == torch.bfloat16
    assert (layer.note, layer.weight.mark) == ("kept", "kept too")
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
    model(torch.randn(T, D).bfloat16())
    assert seen == [layer]
    assert revert_model(model, 1)[0].note == "kept"


def mixed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)
    )
    return randomized(model, 0.1, 0.9).eval()


def kinds(model: Any) -> tuple[str, str]:
    return type(model[1]).__name__, type(model[4]).__name__


def test_beside_batch_normalisation_it_is_converted_where_that_is_said() -> None:
    with pytest.warns(UserWarning, match=r"'4' stay shared by all tasks: layer_norm=True converts"):
        assert kinds(convert_model(mixed(), T)) == ("FusedTSigmaBN1d", "LayerNorm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kinds(convert_model(mixed(), T, layer_norm=False)) == ("FusedTSigmaBN1d", "LayerNorm")
        assert kinds(convert_model(mixed(), T, exclude="1")) == ("BatchNorm1d", "FusedTSigmaLN")
        assert kinds(convert_model(mixed(), T, exclude="4")) == ("FusedTSigmaBN1d", "LayerNorm")
        model = assert_starts_as(mixed(), torch.randn(N, D), layer_norm=True)
    assert kinds(model) == ("FusedTSigmaBN1d", "FusedTSigmaLN")
    assert (model[1].gate, model[4].gate) == ("sigmoid", "identity")  # type: ignore[union-attr]
    assert isinstance(model[2], nn.Identity)  # its activation is fused as ever
    groups = {group["name"]: group for group in parameter_groups(model, 0.1)}
    assert groups["gates"]["lr"] == pytest.approx(10)
    assert groups["layer_norm_gates"]["lr"] == pytest.approx(1)
    assert groups["layer_norm_gates"]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer_norm": 1}, TypeError, "layer_norm must be"),
        ({"layer_norm_gate": "tanh"}, ValueError, "gate must be one of"),
        ({"layer_norm": False, "exclude": "1"}, ValueError, r"no normalisation to convert.*'4', and layer_norm=False"),
    ],
)
def test_wrong_options_are_errors(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        convert_model(mixed(), T, **options)


def test_sigmoid_gates_clip_and_freeze() -> None:
    plain = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.RMSNorm(3), nn.LayerNorm(3))
    with torch.no_grad():
        plain[0].weight.copy_(torch.tensor([-1.0, 0.5, 3.0]))
        plain[0].bias.fill_(2.0)
        plain[2].weight.copy_(torch.tensor([0.2, 0.3, 1.5]))
        plain[3].weight.copy_(torch.tensor([0.2, 0.3, 0.5]))
    with pytest.warns(
        UserWarning, match=r"3 scales of 2 layers, '0', '2', .* by up to 2: .*layer_norm_gate='identity'"
    ):
        model: Any = convert_model(plain, T, layer_norm_gate="sigmoid")
    assert_close(model[0].gates, torch.tensor([[0.0, 0.5, 1.0]] * T))
    assert_close(model[0].bias, torch.full((T, 3), 2.0))
    assert not isinstance(model[0].bias, nn.Parameter)
    assert_starts_as(plain[3:], torch.randn(N, 3), layer_norm_gate="sigmoid")


def test_new_layers_start_with_gates_that_learn() -> None:
    plain = nn.Sequential(nn.LayerNorm(D), nn.RMSNorm(D))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"pretrained": None}, {"pretrained": False}):
            model: Any = convert_model(plain, T, layer_norm_gate="sigmoid", **options)  # type: ignore[arg-type]
            assert all(bool((layer.gates == 0.5).all()) for layer in model)
        model = convert_model(randomized(plain), T, pretrained=False)
        assert all(bool((layer.gates == 1).all()) for layer in model)
        assert bool((model[0].bias == 0).all())


class Scaled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Noted(nn.LayerNorm):
    def note(self) -> str:
        return "nothing else changes"


class OwnRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))


def test_what_is_not_known_to_be_equal_is_refused_by_name() -> None:
    for norm, message in (
        (Scaled(D), r"'1' is a Scaled that has a class with its own forward"),
        (OwnRMSNorm(), r"'1' is a OwnRMSNorm, expected nn.BatchNorm1d.*nn.LayerNorm, nn.RMSNorm"),
    ):
        plain = nn.Sequential(nn.LayerNorm(D), norm)
        with pytest.raises(TypeError, match=message):
            convert_model(plain, T)
        assert isinstance(convert_model(plain, T, exclude="1")[0], FusedTSigmaLN)  # type: ignore[index]
    pruned = nn.Sequential(nn.LayerNorm(D))
    nn.utils.parametrize.register_parametrization(pruned[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"'0' is parametrized"):
        convert_model(pruned, T)
    assert_starts_as(nn.Sequential(randomized(Noted(D))), torch.randn(N, D))


def hugging_face(name: str, offset: float) -> Any:
    """A class as Hugging Face's transformers have them."""

    class Norm(nn.Module):
        __module__ = "transformers.models.some.modeling_some"

        def __init__(self, size: int, eps: float = 1e-6) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

        def forward(self, states: Tensor) -> Tensor:
            wide = states.to(torch.float32)
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return (offset + self.weight) * wide.to(states.dtype)

    Norm.__name__ = name
    return Norm


def test_rms_norms_of_hugging_face_are_tried() -> None:
    plain = nn.Sequential(randomized(hugging_face("SomeRMSNorm", 0.0)(D)))
    state = torch.get_rng_state()
    model = assert_starts_as(plain, torch.ones(N, L, D).cumsum(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model[0], FusedTSigmaRMSNorm)  # type: ignore[index]
    assert model[0].eps == 1e-6  # type: ignore[index]
    with pytest.raises(TypeError, match=r"'0' is a OtherRMSNorm"):
        convert_model(nn.Sequential(hugging_face("OtherRMSNorm", 1.0)(D)), T)


class Encoder(nn.Module):
    """Like BERT: embeddings, positions, PyTorch's encoder, and what the first token has become."""

    def __init__(self, *, pre: bool, nested: bool = False) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(20, D), nn.Parameter(torch.randn(L, D))
        layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, norm_first=pre, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(D) if pre else None, enable_nested_tensor=nested)
        self.masked = nested

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (torch.arange(L) >= 1 + tokens[:, :1] % L).expand(-1, L) if self.masked else None
        states = self.encoder(self.embedding(tokens) + self.positions, src_key_padding_mask=mask)
        return states[:, 0]  # type: ignore[no-any-return]


def encoder(**options: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    backbone = convert_model(randomized(Encoder(**options), 0.5, 1.5), T)
    for module in backbone.modules():
        if hasattr(module, "gates"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return MultiTaskModel(backbone, {task: nn.Identity() for task in TASKS}).eval()


def tokens() -> Tensor:
    return torch.randint(20, (N, L), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("options", [{"pre": True}, {"pre": False}, {"pre": False, "nested": True}], ids=str)
def test_encoders_of_pytorch(options: Any, grad: bool) -> None:
    """Also in evaluation without gradients, where PyTorch would not call the norms of plain encoders."""
    model, x = encoder(**options), tokens()
    with torch.set_grad_enabled(grad):
        for tasks in (None, ["hat", "age"]):
            for task, y in model(x, tasks).items():
                reverted = revert_model(model.backbone, TASKS.index(task))
                assert_close(y, reverted(x))
                assert_close(y, export_task(model, task)(x))
        for task, y in model(dict.fromkeys(TASKS, x)).items():
            assert_close(y, revert_model(model.backbone, TASKS.index(task))(x))
    assert model._parting is not None
    where = {True: ("encoder.layers.0", (0,)), False: (None, (0,))}[options["pre"]]
    if options.get("nested"):  # its mask leads around all blocks
        where = "encoder", (0, 1)
    assert model._parting[:2] == where
    for plain in (revert_model(model.backbone, 0), export_task(model, 0)[0]):  # type: ignore[index]
        assert [layer.activation_relu_or_gelu for layer in plain.encoder.layers] == [1, 1]  # type: ignore[union-attr]
        assert plain.encoder.use_nested_tensor is bool(options.get("nested"))  # type: ignore[union-attr]


def test_encoders_that_users_build_keep_to_their_norms() -> None:
    layer: Any = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True)
    layer.norm1, layer.norm2 = FusedTSigmaLN(T, D, bias=True), FusedTSigmaLN(T, D, bias=True)
    for norm in (layer.norm1, layer.norm2):
        nn.init.normal_(norm.weight)
    model = MultiTaskModel(layer, {task: nn.Identity() for task in TASKS}).eval()
    x = torch.randn(N, L, D)
    with torch.no_grad():
        for task, y in model(x).items():
            assert_close(y, revert_model(layer, TASKS.index(task))(x))


@pytest.mark.parametrize("pre", [True, False])
def test_encoders_compiled_and_copied(pre: bool) -> None:
    model, x = encoder(pre=pre), tokens()
    wanted = copy.deepcopy(model)(x)
    assert_close(pickle.loads(pickle.dumps(model))(x), wanted)
    torch._dynamo.reset()
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted)


def test_plain_states_load_and_expand() -> None:
    plain = Encoder(pre=True)
    model = convert_model(plain, T)
    state = randomized(Encoder(pre=True)).state_dict()
    expanded = expand_state_dict(model, state)
    model.load_state_dict(expanded)
    plain.load_state_dict(state)
    assert_close(revert_model(model, 2)(tokens()), plain(tokens()))
    model.load_state_dict(randomized(plain).state_dict())
    assert_close(revert_model(model, 1)(tokens()), plain(tokens()))


def case_shards() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    backbone = convert_model(Encoder(pre=True), 4)
    for module in backbone.modules():
        if hasattr(module, "gates"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    alone = MultiTaskModel(backbone, {f"task{t}": nn.Linear(D, 1) for t in range(4)})
    sharded = copy.deepcopy(alone)
    shard_tasks(sharded, init_device_mesh("cpu", (2,), mesh_dim_names=("tasks",)))
    wanted, outputs = alone(tokens()), sharded(tokens())
    assert len(outputs) == 2
    for name, y in outputs.items():
        assert_close(y, wanted[name])
    sum(y.square().sum() for y in wanted.values()).backward()
    sum(y.square().sum() for y in outputs.values()).backward()
    for one, other in zip(alone.backbone.parameters(), sharded.backbone.parameters(), strict=True):
        gradient = other.grad.full_tensor() if hasattr(other.grad, "full_tensor") else other.grad
        torch.testing.assert_close(gradient, one.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_tasks_are_sharded() -> None:
    ranks.run(case_shards, 2)
