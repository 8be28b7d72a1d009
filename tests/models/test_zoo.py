"""Transformers of torchvision, timm and Hugging Face: converted, run for tasks, trained, reverted and exported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tsbn_kernels import MultiTaskModel, convert_model, export_task, parameter_groups, revert_model
from tsbn_kernels.layers.task_specific import TaskSpecific

pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = ("age", "smile", "hat")
T, N = len(TASKS), 2


def torchvision_model(name: str, *args: Any, **options: Any) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    if name == "ConvNeXt":
        block = models.convnext.CNBlockConfig
        args = ([block(8, 16, 1), block(16, 24, 2), block(24, None, 1)],)
    if name == "SwinV2":
        parts = models.swin_transformer
        options |= {"block": parts.SwinTransformerBlockV2, "downsample_layer": parts.PatchMergingV2}
    kind = {"ViT": "VisionTransformer", "Swin": "SwinTransformer", "SwinV2": "SwinTransformer"}.get(name, name)
    return getattr(models, kind)(*args, num_classes=5, **options)  # type: ignore[no-any-return]


def timm_model(name: str, **options: Any) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=5, **options)  # type: ignore[no-any-return]


def hugging_face_model(name: str, **config: Any) -> nn.Module:
    """A model of random parameters: nothing is fetched."""
    library = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    kind = "ForImageClassification" if name == "ViT" else "ForSequenceClassification"
    return getattr(library, name + kind)(getattr(library, f"{name}Config")(**small, num_labels=5, **config))  # type: ignore[no-any-return]


WORDS = 50, 7  # how many there are, and those of a sentence
_SWIN = [4, 4], 16, [2, 2], [2, 4], [2, 2]
# What makes the model, the side of its images (0: it reads words), and the module at whose input the streams part.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, str | None]] = {
    "torchvision ViT": (lambda: torchvision_model("ViT", 32, 8, 2, 2, 16, 32), 32, "encoder.layers.encoder_layer_0"),
    "torchvision Swin": (lambda: torchvision_model("Swin", *_SWIN, stochastic_depth_prob=0.0), 32, None),
    "torchvision Swin V2": (lambda: torchvision_model("SwinV2", *_SWIN, stochastic_depth_prob=0.0), 32, None),
    "torchvision ConvNeXt": (lambda: torchvision_model("ConvNeXt"), 32, None),
    "timm ViT": (lambda: timm_model("vit_tiny_patch16_224", img_size=32, depth=2), 32, "blocks.0"),
    "timm ViT, averaged": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=32, depth=2, global_pool="avg", class_token=False),
        32,
        "blocks.0",
    ),
    "timm ViT with registers": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=32, depth=2, reg_tokens=2, no_embed_class=True),
        32,
        "blocks.0",
    ),
    "timm ViT with a first norm": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=32, depth=2, pre_norm=True),
        32,
        None,
    ),
    "timm ViT, parallel blocks": (
        lambda: timm_model("vit_small_patch16_36x1_224", img_size=32, depth=2, embed_dim=48, num_heads=2),
        32,
        "blocks.0",
    ),
    "timm DeiT": (lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2), 32, "blocks.0"),
    "timm Swin": (
        lambda: timm_model("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2), num_heads=(2, 4), embed_dim=16),
        56,
        None,
    ),
    "timm ConvNeXt": (lambda: timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16)), 64, None),
    "timm ConvNeXt, channels last": (
        lambda: timm_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), conv_mlp=False),
        64,
        None,
    ),
    "timm MLP-Mixer": (lambda: timm_model("mixer_s32_224", img_size=64), 64, "blocks.0"),
    "timm MobileViT": (lambda: timm_model("mobilevit_xxs"), 64, None),
    # Beside its batch norms it has group norms, which stay shared.
    "timm MobileViT V2": (lambda: timm_model("mobilevitv2_050"), 64, None),
    "timm ViT with RMS norms": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=32, depth=2, norm_layer=rms_norm()),
        32,
        "blocks.0",
    ),
    "Hugging Face ViT": (lambda: hugging_face_model("ViT", image_size=32, patch_size=8), 32, "vit.layers.0"),
    "Hugging Face BERT": (lambda: hugging_face_model("Bert", vocab_size=WORDS[0]), 0, None),
}


def rms_norm() -> Any:
    return pytest.importorskip("timm.layers").RmsNorm


def pretrained(name: str) -> nn.Module:
    """A model in evaluation mode whose scales, also those of layers, leave (0, 1)."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for module in model.modules():
        if any(word in type(module).__name__.lower() for word in ("norm", "layerscale", "cnblock", "convnextblock")):
            for parameter in module.parameters(recurse=False):
                nn.init.uniform_(parameter, -0.5, 1.5)
    return model


def inputs(name: str) -> Tensor:
    side, generator = MODELS[name][1], torch.Generator().manual_seed(1)
    if side == 0:
        return torch.randint(WORDS[0], (N, WORDS[1]), generator=generator)
    return torch.randn(N, 3, side, side, generator=generator)


def assert_close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_zoo(name: str) -> None:
    plain, x = pretrained(name), inputs(name)
    backbone = convert_model(plain, T, variant="tsbn", layer_norm=True)
    layers = [module for module in backbone.modules() if isinstance(module, TaskSpecific)]
    assert not any(
        isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)) and module not in layers
        for module in backbone.modules()
    )
    model = MultiTaskModel(backbone, {task: nn.Identity() for task in TASKS}).eval()
    with torch.no_grad():
        wanted = plain(x)
        for y in model(x).values():  # every task starts as the plain model
            assert_close(y, wanted)
    assert model._parting is not None
    assert model._parting.module == MODELS[name][2]
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            nn.init.uniform_(parameter, 0.5, 1.5)
    reverted = {task: revert_model(backbone, index) for index, task in enumerate(TASKS)}
    for tasks in (None, ["hat", "age"], ["smile"]):
        y = model(x, tasks)
        for task, got in y.items():
            assert_close(got, reverted[task](x))
    for task, got in model(dict.fromkeys(TASKS, x)).items():
        assert_close(got, reverted[task](x))
    assert_close(export_task(model, "smile")(x), reverted["smile"](x))
    groups = {group["name"]: len(group["params"]) for group in parameter_groups(model, 0.1)}
    rows = [layer for layer in layers if hasattr(layer, "normalized_shape")]
    assert groups.get("layer_norm_gates", 0) == len(rows)
    assert groups.get("gates", 0) == len(layers) - len(rows)
    model.backbone.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert_close(model(x)["hat"], wanted)


def test_words_with_a_mask() -> None:
    """A mask is made of the input itself: every task is given it, as the error says."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = pretrained("Hugging Face BERT")

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x[:, 0], attention_mask=x[:, 1]).logits  # type: ignore[no-any-return]

    words = inputs("Hugging Face BERT")
    x, plain = torch.stack((words, torch.arange(WORDS[1]).lt(5).expand_as(words)), 1), Masked()
    model = MultiTaskModel(convert_model(plain, T, layer_norm=True), {task: nn.Identity() for task in TASKS}).eval()
    with pytest.raises(IndexError, match=r"(?s)in module 'model.bert.*model\(dict.fromkeys\(model.heads, x\)\)"):
        model(x)
    for y in model(dict.fromkeys(TASKS, x)).values():
        assert_close(y, plain(x))


@pytest.mark.parametrize("name", ["torchvision ViT", "timm Swin", "timm ConvNeXt", "timm MobileViT"])
def test_gradients(name: str) -> None:
    """Those of shared parameters are the sums over the plain models of the tasks; those of layers are their rows."""
    backbone = convert_model(pretrained(name), T, variant="tsbn", layer_norm=True).double()
    for layer in backbone.modules():
        if isinstance(layer, TaskSpecific):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    model = MultiTaskModel(backbone, {task: nn.Identity() for task in TASKS}).eval()
    x = inputs(name).double()
    upstream = {task: torch.randn(N, 5, dtype=torch.float64) for task in TASKS}
    plain = {task: revert_model(backbone, index) for index, task in enumerate(TASKS)}
    sum((y * upstream[task]).sum() for task, y in model(x).items()).backward()
    for task, reverted in plain.items():
        (reverted(x) * upstream[task]).sum().backward()
    gradients = {task: dict(reverted.named_parameters()) for task, reverted in plain.items()}
    for key, parameter in backbone.named_parameters():
        parts = [gradients[task][key].grad for task in TASKS]
        if parts[0] is None:
            assert parameter.grad is None
            continue
        wanted = torch.stack(parts) if parameter.dim() > parts[0].dim() else sum(parts)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["timm MobileViT", "timm ViT with RMS norms", "timm ConvNeXt"])
def test_sigmoid_gates_tell_how_many_scales_they_clip(name: str) -> None:
    plain = pretrained(name)
    outside = sum(
        int(((module.weight < -1e-3) | (module.weight > 1 + 1e-3)).sum())
        for module in plain.modules()
        if "layernorm" in type(module).__name__.lower() or "rmsnorm" in type(module).__name__.lower()
    )
    with pytest.warns(UserWarning, match=rf"{outside} scales of \d+ layers.*layer_norm_gate='identity' keeps"):
        model = convert_model(plain, T, variant="tsbn", layer_norm=True, layer_norm_gate="sigmoid")
    for module, before in zip(model.modules(), copy.deepcopy(plain).modules(), strict=False):
        if isinstance(module, TaskSpecific) and module.gate == "sigmoid":
            assert_close(module.gates, before.weight.detach().clamp(0, 1).expand_as(module.gates))
