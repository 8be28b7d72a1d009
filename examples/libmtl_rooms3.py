"""LibMTL's architectures of experts and branches beside task-specific normalisation: three dense tasks of rooms3.

    python -m examples.libmtl_rooms3                    # at the root of the repository; about a minute on a CPU
    python -m examples.libmtl_rooms3 --rooms 400 --epochs 20 --width 16

It needs LibMTL: pip install git+https://github.com/median-research-group/LibMTL

All have the same encoder, a small dilated residual network, decoders, optimiser and number of steps. LibMTL's trainer
wants CUDA; its architectures and its weighting (here: equal weights) do not, and the loop below is the trainer's.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from experiments.dense_tasks.data import DenseData, rooms
from experiments.dense_tasks.deeplab import DilatedResNet, Enlarge
from tsbn_kernels import parameter_groups

SIZE = 48, 64
BLOCKS = 1, 1, 1, 1  # of the encoder's stages
# What LibMTL calls arch_args. The experts: two that tasks share and, of CGC and PLE, one more of each task.
_EXPERTS = {"img_size": [3, *SIZE], "num_experts": [2, 1, 1, 1]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "HPS": {},
    "MMoE": _EXPERTS,
    "CGC": _EXPERTS,
    "PLE": _EXPERTS,
    "LTB": {},
    "DSelect_k": {**_EXPERTS, "num_nonzeros": 2, "kgamma": 1.0},
    "TSSigmaBN": {"pretrained": False},  # gates begin at one half
}


def build(name: str, data: DenseData, width: int) -> Any:
    """An architecture and a weighting in one class, as LibMTL's trainer makes it."""
    from LibMTL import architecture, weighting

    from tsbn_kernels.models.libmtl import TSSigmaBN

    base = TSSigmaBN if name == "TSSigmaBN" else getattr(architecture, name)
    made = type(name, (base, weighting.EW), {})
    encoder = partial(DilatedResNet, width, BLOCKS)
    features = encoder().features
    decoders = nn.ModuleDict(
        {task: nn.Sequential(nn.Conv2d(features, kind.outputs, 1), Enlarge()) for task, kind in data.tasks.items()}
    )
    model: Any = made(list(data.tasks), encoder, decoders, False, False, torch.device("cpu"), **ARCHITECTURES[name])
    model.init_param()
    return model


def train(model: Any, data: DenseData, epochs: int, batch: int, lr: float) -> float:
    """Trains, and returns the seconds of a step."""
    optimizer = torch.optim.Adam(parameter_groups(model, lr))  # the gates at a hundred times the rate
    model.train()
    model.epochs, steps, begin = epochs, 0, time.perf_counter()
    for model.epoch in range(epochs):
        order = torch.Generator().manual_seed(model.epoch)
        for images, truths in DataLoader(data.train, batch, shuffle=True, drop_last=True, generator=order):
            predictions = model(images)
            losses = torch.stack([kind.loss(predictions[task], truths[task]) for task, kind in data.tasks.items()])
            optimizer.zero_grad(set_to_none=False)
            model.backward(losses)
            optimizer.step()
            steps += 1
    return (time.perf_counter() - begin) / steps


@torch.no_grad()
def evaluate(model: Any, data: DenseData, batch: int) -> list[float]:
    """The first metric of each task on rooms that were not trained on."""
    model.eval()
    scores = {task: kind.scores() for task, kind in data.tasks.items()}
    for images, truths in DataLoader(data.validation, batch):
        for task, prediction in model(images).items():
            scores[task].add(prediction, truths[task])
    return [found.values()[0] for found in scores.values()]


def compare(arguments: Any) -> None:
    data = rooms(arguments.rooms, max(1, arguments.rooms // 4), *SIZE, lambda _: None)
    names = [f"{task}: {kind.metrics[0].name}" for task, kind in data.tasks.items()]
    print(f"{'':10} {'parameters':>10} {'ms a step':>10}", *(f"{name:>22}" for name in names))
    for name in arguments.architectures:
        torch.manual_seed(arguments.seed)
        model = build(name, data, arguments.width)
        seconds = train(model, data, arguments.epochs, arguments.batch, arguments.lr)
        scores = evaluate(model, data, arguments.batch)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:10} {parameters:10,} {1e3 * seconds:10.1f}", *(f"{score:22.3f}" for score in scores), flush=True)


def parse(arguments: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--rooms", type=int, default=64, help="to train on; a quarter as many are held out")
    parser.add_argument("--width", type=int, default=4, help="channels of the encoder's first layer")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    compare(parse())
