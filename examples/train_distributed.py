"""Ten tasks (is this digit a 0? a 1? ...) trained on several processes, by data, by tasks, or by both.

    torchrun --nproc-per-node 2 examples/train_distributed.py --parallel tasks
    torchrun --nproc-per-node 4 examples/train_distributed.py --parallel tasks_data --checkpoint runs --resume

``data`` is DistributedDataParallel, ``fsdp`` FSDP2; ``tasks`` gives each rank its own tasks and all the same samples;
``tasks_data`` is a mesh of tasks by ``--data-ranks``. A checkpoint resumes under any of them, on any number of ranks.
GPUs are used where there are any (NCCL), else the CPU (gloo).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from tsbn_kernels import MultiTaskModel, convert_model, parameter_groups, shard_tasks

TASKS = [f"is_{digit}" for digit in range(10)]
FLAT = states.StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter: ranks have different ones


def load(name: str) -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, 8, 8]`` and the digits that they show ``[N]``: scikit-learn's, or noise with a pattern in it."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(10, (600,), generator=generator)
    patterns = torch.randn(10, 1, 8, 8, generator=generator)
    return patterns[targets] + torch.randn(600, 1, 8, 8, generator=generator), targets


def build() -> MultiTaskModel:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    backbone = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten())
    heads = {task: nn.Linear(512, 1) for task in TASKS}
    return MultiTaskModel(convert_model(backbone, len(TASKS), pretrained=False), heads)


def distribute(model: MultiTaskModel, how: str, data_ranks: int, device: torch.device) -> tuple[nn.Module, DeviceMesh]:
    """The model, and the mesh; ranks along its dimension ``"data"`` get samples of their own."""
    ranks = distributed.get_world_size()
    data = {"data": ranks, "fsdp": ranks, "tasks": 1, "tasks_data": data_ranks}[how]
    if ranks % data:
        raise SystemExit(f"--data-ranks must divide the {ranks} ranks, got {data}")
    mesh = init_device_mesh(device.type, (ranks // data, data), mesh_dim_names=("tasks", "data"))
    if how == "data":
        return DistributedDataParallel(model), mesh
    if how == "fsdp":
        return fully_shard(model, mesh=mesh["data"]), mesh
    return shard_tasks(model, mesh), mesh


def run_epoch(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer | None
) -> tuple[float, float]:
    """Trains where there is an optimizer; returns loss (the sum over the tasks) and accuracy, of all ranks' samples."""
    model.train(optimizer is not None)
    totals: Any = 0  # of each task: loss, correct answers, answers
    for images, digits in batches:
        with torch.set_grad_enabled(optimizer is not None):
            predictions = model(images)  # of this rank's tasks
            losses, seen = [], images.new_zeros(3, len(TASKS))
            for task, logits in predictions.items():
                index = TASKS.index(task)
                labels = (digits == index).to(logits.dtype).unsqueeze(1)
                losses.append(binary_cross_entropy_with_logits(logits, labels))
                seen[0, index] = losses[-1].detach() * len(labels)
                seen[1, index] = ((logits > 0) == (labels > 0)).sum()
                seen[2, index] = len(labels)
        if optimizer is not None:
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
        totals = totals + seen
    distributed.all_reduce(totals)
    loss, right, count = totals
    return (loss / count).sum().item(), (right / count).mean().item()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> dict[str, Any]:
    return {
        "model": states.get_model_state_dict(model),
        "optimizer": states.get_optimizer_state_dict(model, optimizer, options=FLAT),
        "epoch": epoch,
    }


def shown(batches: list[Any], label: str) -> Iterable[Any]:
    """With a progress bar on the first rank, where rich is installed."""
    if distributed.get_rank() == 0:
        with suppress(ImportError):
            from rich.progress import track

            return track(batches, label, transient=True)
    return batches


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("data", "fsdp", "tasks", "tasks_data"), default="tasks")
    parser.add_argument("--data-ranks", type=int, default=2, help="of tasks_data")
    parser.add_argument("--data", choices=("digits", "random"), default="digits")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="samples of a step, over all ranks")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--checkpoint", type=Path, help="folder for a checkpoint after each epoch")
    parser.add_argument("--resume", action="store_true", help="from the last one in it")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a lost rank is an error")
    options = parser.parse_args(arguments)
    if options.resume and options.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    return options


def train(options: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(0)
    model, mesh = distribute(build().to(device), options.parallel, options.data_ranks, device)
    optimizer = torch.optim.Adam(parameter_groups(model, options.lr, gate_lr_multiplier=10.0))  # after distribute
    images, digits = (tensor.to(device) for tensor in load(options.data))
    part, parts = mesh.get_local_rank("data"), mesh.size(1)
    test = len(images) // 5

    def batches_of(samples: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each batch the share of this rank; all ranks along "tasks" have the same."""
        shares = [batch[part::parts] for batch in samples.split(options.batch) if len(batch) >= 2 * parts]
        return [(images[share], digits[share]) for share in shares]

    first = 0
    if options.resume and (saved := sorted(options.checkpoint.glob("epoch*"))):
        state = state_of(model, optimizer, 0)
        checkpoint.load(state, checkpoint_id=saved[-1])
        states.set_model_state_dict(model, state["model"])
        states.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FLAT)
        first = state["epoch"]
    for epoch in range(first + 1, options.epochs + 1):
        order = torch.randperm(len(images) - test, generator=torch.Generator().manual_seed(epoch)) + test
        loss, _ = run_epoch(model, shown(batches_of(order), f"epoch {epoch}"), optimizer)
        _, accuracy = run_epoch(model, batches_of(torch.arange(test)), None)
        if distributed.get_rank() == 0:
            print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.4f}", flush=True)
        if options.checkpoint:
            checkpoint.save(state_of(model, optimizer, epoch), checkpoint_id=options.checkpoint / f"epoch{epoch:03}")


if __name__ == "__main__":
    options = parse()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=options.timeout))
    try:
        train(options, device)
    finally:
        distributed.destroy_process_group()
