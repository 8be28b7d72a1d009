"""A small pre-norm transformer by each method, of one layout and with the same heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.layers.peers_layer_norm import SigmoidLayerNorm
from tsbn_kernels import MultiTaskModel, convert_model

MakeNorm = Callable[[int], nn.Module]  # width -> layer


@dataclass(frozen=True)
class TransformerLayout:
    """Sizes of the network.

    Attributes:
        inputs: channels of an image; of a word, how many letters there are.
        patch: side of the patches of an image, each of which is a token; 0: the tokens are the letters of a word.
        tokens: of a sample.
        width: of a token.
        heads: of the attention.
        depth: number of blocks.
    """

    inputs: int
    patch: int
    tokens: int
    width: int
    heads: int
    depth: int


DIGITS = TransformerLayout(inputs=1, patch=7, tokens=16, width=32, heads=2, depth=2)  # for images of 28x28
WORDS = TransformerLayout(inputs=27, patch=0, tokens=12, width=32, heads=2, depth=2)


class Patches(nn.Conv2d):
    """The patches of images ``[N, C, H, W]`` as tokens ``[N, L, width]``."""

    def __init__(self, channels: int, width: int, side: int) -> None:
        super().__init__(channels, width, side, side)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Attention and a multilayer perceptron, each behind a normalisation and around it a path of its own."""

    def __init__(self, layout: TransformerLayout, norm: MakeNorm) -> None:
        super().__init__()
        width = layout.width
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention = nn.MultiheadAttention(width, layout.heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class Encoder(nn.Module):
    """Features ``[N, width]`` of images or of words: the mean over the tokens behind the last block.

    The embedding has a normalisation of its own, which no path leads around: there the streams of tasks part.
    """

    def __init__(self, layout: TransformerLayout, norm: MakeNorm = nn.LayerNorm) -> None:
        super().__init__()
        width = layout.width
        self.embedding = (
            Patches(layout.inputs, width, layout.patch) if layout.patch else nn.Embedding(layout.inputs, width)
        )
        self.embedding_norm = norm(width)
        self.positions = nn.Parameter(torch.empty(layout.tokens, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(*(Block(layout, norm) for _ in range(layout.depth)))
        self.norm = norm(width)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.embedding_norm(self.embedding(inputs)) + self.positions
        features: Tensor = self.norm(self.blocks(x)).mean(1)
        return features


def _heads(tasks: int, layout: TransformerLayout) -> dict[str, nn.Module]:
    return {f"task{task}": nn.Linear(layout.width, 1) for task in range(tasks)}


class PlainTransformer(nn.Module):
    """An encoder and T heads, in plain PyTorch: logits ``[T, N]``.

    Args:
        encoder: takes the streams one after the other.
        heads: of the tasks.
        streams: T, one for each head, or 1 for all of them.
    """

    def __init__(self, encoder: nn.Module, heads: dict[str, nn.Module], streams: int) -> None:
        super().__init__()
        self.backbone, self.heads, self.streams = encoder, nn.ModuleDict(heads), streams

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.backbone(inputs.repeat(self.streams, *[1] * (inputs.dim() - 1)))
        streams = features.unflatten(0, (self.streams, -1)).expand(len(self.heads), -1, -1)
        return torch.cat([head(stream) for head, stream in zip(self.heads.values(), streams, strict=True)], 1).T


class TaskSpecificTransformer(MultiTaskModel):
    """A converted encoder and T heads: logits ``[T, N]``."""

    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat([*super().forward(inputs).values()], 1).T


def hard_sharing(tasks: int, layout: TransformerLayout) -> nn.Module:
    """Everything shared but the heads."""
    return PlainTransformer(Encoder(layout), _heads(tasks, layout), 1)


def _task_specific(gate: Literal["identity", "sigmoid"], tasks: int, layout: TransformerLayout) -> nn.Module:
    encoder = convert_model(Encoder(layout), tasks, layer_norm_gate=gate, pretrained=False)
    return TaskSpecificTransformer(encoder, _heads(tasks, layout))


tsln = partial(_task_specific, "identity")  # scale and shift of each task
ts_sigma_ln = partial(_task_specific, "sigmoid")  # gates of each task


class LoopOfLayerNorms(nn.ModuleList):
    """T layers, each on its stream, joined by ``cat``."""

    def __init__(self, tasks: int, width: int) -> None:
        norms = [SigmoidLayerNorm(width, bias=False) for _ in range(tasks)]
        for norm in norms:
            nn.init.zeros_(norm.weight)
        super().__init__(norms)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([norm(stream) for norm, stream in zip(self, x.chunk(len(self)), strict=True)])


def loop(tasks: int, layout: TransformerLayout) -> nn.Module:
    """TS-sigma-LN by T layers in a loop, to be timed against."""
    return PlainTransformer(Encoder(layout, partial(LoopOfLayerNorms, tasks)), _heads(tasks, layout), tasks)
