"""Five dense tasks on a vision transformer, as the paper has them for PascalContext (arXiv 2512.20420, F.3).

    python examples/dense_transformer.py                                 # ViT-S/16 at 512x512
    python examples/dense_transformer.py --size 64 --width 48 --steps 5  # seconds on a CPU

Its layer normalisation becomes TS-sigma-LN, and the batch normalisation of the module that fuses the scales
TS-sigma-BN with its GELU inside. All tasks see one image: it is cut into patches once, and the norm of the patches,
the first that is task-specific, makes a stream for each task. Images and labels are random: put in your own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsbn_kernels import MultiTaskModel, convert_model, parameter_groups

PATCH, DEPTH, SCALES = 16, 12, 4
CHANNELS = {"segmentation": 21, "parts": 7, "saliency": 1, "edges": 1, "normals": 3}  # that each task predicts


class PatchEmbedding(nn.Module):
    """Normalised patches and their positions: images ``[N, 3, H, W]`` to tokens ``[N, L, width]``."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty((size // PATCH) ** 2, width), std=0.02))

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.patches(images).flatten(2).transpose(1, 2)) + self.positions


def fusion(inputs: int, width: int) -> nn.Sequential:
    """Four blocks of a convolution, a normalisation and a GELU, by turns 1x1 and 3x3."""
    layers: list[nn.Module] = []
    for block, kernel in enumerate((1, 3, 1, 3)):
        convolution = nn.Conv2d(width if block else inputs, width, kernel, padding=kernel // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.GELU()]
    return nn.Sequential(*layers)


class DenseTransformer(nn.Module):
    """A ViT whose tokens behind each quarter of its blocks are fused: images to ``[N, features, H/16, W/16]``."""

    def __init__(self, size: int = 512, width: int = 384) -> None:
        super().__init__()
        self.side, self.features = size // PATCH, width * 4 // 3
        self.embedding = PatchEmbedding(size, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, max(1, width // 64), 4 * width, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
            )
            for _ in range(DEPTH)
        )
        self.fusion = fusion(SCALES * width, self.features)

    def forward(self, images: Tensor) -> Tensor:
        tokens, scales = self.embedding(images), []
        for count, block in enumerate(self.blocks, 1):
            tokens = block(tokens)
            if count % (DEPTH // SCALES) == 0:
                scales.append(tokens)
        return self.fusion(torch.cat(scales, 2).transpose(1, 2).unflatten(2, (self.side, self.side)))


def build(size: int = 512, width: int = 384) -> MultiTaskModel:
    """The backbone with task-specific normalisation, and a head for each task, which gives maps as large as the image.

    Without ``pretrained=False`` every task would start from the norms of a trained backbone.
    """
    backbone = DenseTransformer(size, width)
    heads = {
        task: nn.Sequential(nn.Conv2d(backbone.features, channels, 1), nn.Upsample(scale_factor=PATCH, mode="bilinear"))
        for task, channels in CHANNELS.items()
    }
    tasks = {"num_tasks": len(heads), "layer_norm": True, "layer_norm_gate": "sigmoid"}
    return MultiTaskModel(convert_model(backbone, pretrained=False, **tasks), heads)


def random_batch(count: int, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images, and of each task a class or the values of every pixel, the same all over a patch."""
    shape = count, size // PATCH, size // PATCH
    labels = {}
    for task, channels in CHANNELS.items():
        if task == "normals":
            values = functional.normalize(torch.randn(count, channels, *shape[1:]))
        else:
            values = torch.randint(max(2, channels), shape).unsqueeze(1).float()
        labels[task] = functional.interpolate(values, scale_factor=PATCH)
    return torch.rand(count, 3, size, size), labels


def loss_of(predictions: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """The sum over the tasks: cross entropy of classes, and the distance of normals."""
    losses = []
    for task, prediction in predictions.items():
        if task == "normals":
            losses.append(functional.l1_loss(functional.normalize(prediction), labels[task]))
        elif CHANNELS[task] == 1:
            losses.append(functional.binary_cross_entropy_with_logits(prediction, labels[task]))
        else:
            losses.append(functional.cross_entropy(prediction, labels[task].squeeze(1).long()))
    return torch.stack(losses).sum()


def train(arguments: Sequence[str] | None = None) -> None:
    """Some steps on one batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="of the images, a multiple of 16")
    parser.add_argument("--width", type=int, default=384, help="of a token; that of the fused features is 4/3 of it")
    parser.add_argument("--batch", type=int, default=1, help="images of a step")
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(options.size, options.width).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-4))  # gates at 10 (LN) and 100 times (BN) the rate
    images, labels = random_batch(options.batch, options.size)
    images, labels = images.to(device), {task: label.to(device) for task, label in labels.items()}
    for step in range(options.steps):
        start = time.perf_counter()
        loss = loss_of(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    train()
