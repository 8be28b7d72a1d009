"""``python -m tsbn_kernels``: which backends are usable here, and which one runs on which device.

``python -m tsbn_kernels plan --shape 40,256,64,64,64 --dtype bf16 --device H100``: what the kernels would do on a GPU;
``--norm layer --shape 5,8,1024,384``: those of layer normalisation.
``python -m tsbn_kernels analyse CHECKPOINT... --out report.html``: what the tasks of a network have learnt to use.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tsbn_kernels import __version__, backends, memory
from tsbn_kernels.analysis import importance, load_state
from tsbn_kernels.backends.plan import DEVICES, Plan, Work, choice, devices, layer_norm
from tsbn_kernels.backends.plan.describe import layer_alone, table, unfused_bytes
from tsbn_kernels.definition.activations import ACTIVATIONS
from tsbn_kernels.definition.layout import Family

ITEM_SIZES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a report of the backends, or a plan."""
    parser = argparse.ArgumentParser(prog="python -m tsbn_kernels", description="Which backends run here, and how.")
    commands = parser.add_subparsers(dest="command", title="commands (without one: the backends of this machine)")
    plan = commands.add_parser("plan", help="what the kernels do on a GPU, and the time that their bytes should take")
    plan.add_argument("--shape", type=_shape, required=True, metavar="T,N,C[,H,W]", help="of the stacked activation")
    kinds = "layer and rms: the shape is T,N[,*],D, and rows of D values are normalised"
    plan.add_argument("--norm", choices=("batch", "layer", "rms"), default="batch", help=kinds)
    plan.add_argument("--dtype", choices=ITEM_SIZES, default="fp32")
    plan.add_argument("--device", type=_device, default="H100", metavar="NAME", help=", ".join(DEVICES))
    plan.add_argument("--format", choices=("contiguous", "channels_last"), default="contiguous")
    both = "by default the one that each pass is planned for where both are at hand"
    plan.add_argument("--backend", choices=("auto", "triton", "cuda"), default="auto", help=both)
    plan.add_argument("--bandwidth", type=float, metavar="GB/S", help="instead of the data sheet's")
    plan.add_argument("--shared-input", action="store_true", help="all tasks read one x, as if it were T of them")
    plan.add_argument("--fan-out", action="store_true", help="one x [N, C, *] is read once for all tasks")
    plan.add_argument("--activation", choices=("none", *ACTIVATIONS), default="none", help="fused behind the layer")
    plan.add_argument("--residual", action="store_true", help="added before the activation")
    analyse = commands.add_parser(
        "analyse", help="what each task has learnt to use, from checkpoints, as one HTML page"
    )
    analyse.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="of torch.save or safetensors")
    analyse.add_argument("--out", type=Path, required=True, metavar="PAGE", help="the page that is written")
    analyse.add_argument("--tasks", metavar="A,B,...", help="their names; by default those of the model's heads")
    analyse.add_argument("--key", help="where in a checkpoint the state is, such as model, or ema.model")
    analyse.add_argument("--gate", choices=("sigmoid", "identity"), help="of a state that does not say it")
    analyse.add_argument("--modules", metavar="A,B,...", help="with gates, of a state that does not say it")
    analyse.add_argument("--threshold", type=float, default=0.5, help="of specialised filters")
    analyse.add_argument("--clusters", type=int, help="how many; by default a quarter of the tasks")
    options = parser.parse_args(arguments)
    if options.command == "analyse":
        try:
            _analyse(options)
        except (ImportError, OSError, TypeError, ValueError) as error:
            parser.exit(1, f"{error}\n")
    elif options.command == "plan":
        if options.backend == "cuda" and not options.device.target.startswith("sm_"):
            parser.error(f"the CUDA C++ kernels run on NVIDIA's GPUs alone, not on {options.device.name}; try triton")
        of_batches = options.activation != "none" or options.shared_input or options.format != "contiguous"
        if options.norm != "batch" and of_batches:
            parser.error(f"--norm {options.norm} takes no --activation, --shared-input or --format: leave them out")
        try:
            _plan(options)
        except ValueError as error:
            parser.exit(1, f"{error}\n")
    else:
        _report()


def _analyse(options: argparse.Namespace) -> None:
    from tsbn_kernels.plots import report

    tasks, modules = (names and names.split(",") for names in (options.tasks, options.modules))
    states = [load_state(path, options.key) for path in options.checkpoints]
    runs = [importance(state, tasks, gate=options.gate, modules=modules) for state in states]
    named = dict(zip(report.names_of(options.checkpoints), runs, strict=True))
    report.write_report(named, options.out, threshold=options.threshold, clusters=options.clusters)
    print(f"report: {options.out}")


def _shape(text: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) < 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not T,N,C or T,N,C,H,W with sizes of 1 and more")
    return sizes


def _device(name: str) -> devices.Device:
    try:
        return devices.named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _works(options: argparse.Namespace) -> list[Work]:
    tasks, samples, channels, *spatial = options.shape
    positions = math.prod(spatial)
    contiguous = options.format == "contiguous" or channels == 1
    family: Family = "rows" if positions > 1 and contiguous else "columns"
    work = Work(
        tasks,
        samples,
        channels,
        positions,
        ITEM_SIZES[options.dtype],
        family,
        expanded=options.shared_input,
        activation=options.activation,
        residual=options.residual,
        needs_dresidual=options.residual,
        fan_out=options.fan_out,
    )
    return [work, replace(work, direction="backward"), replace(work, training=False)]


def _rows(options: argparse.Namespace) -> list[Work]:
    """The passes of layer normalisation, of which a backward pass may have two plans."""
    tasks, samples, *tokens, size = options.shape
    work = layer_norm.LayerWork(
        tasks,
        1,
        size,
        samples * math.prod(tokens),
        ITEM_SIZES[options.dtype],
        "columns",
        residual=options.residual,
        fan_out=options.fan_out,
        rms=options.norm == "rms",
    )
    return [work, replace(work, direction="backward")]


def _plan(options: argparse.Namespace) -> None:
    """Prints the plans of each pass, and why they are those of their backend."""
    works = _works(options) if options.norm == "batch" else _rows(options)
    plans = [plan for work in works for plan in _plans(work, options)]
    unfused = None
    if options.norm == "batch" and works[0].fuses:
        alone = [plan for work in works for plan in _plans(layer_alone(work), options)]
        unfused = [unfused_bytes(plan, work) for plan, work in zip(alone, works, strict=True)]
    print(table(plans, options.bandwidth and options.bandwidth * 1e9, unfused))
    if options.backend == "auto":
        print("\nwhy, by the bytes of activations, or the time of a call on the host where that is longer:")
        for work in works:
            print(f"{work.title}: {choice.reason(_offers(work, options))}")


def _plans(work: Work, options: argparse.Namespace) -> tuple[Plan, ...]:
    if options.backend == "auto" and (offered := _offers(work, options)):
        return choice.best(offered).plans
    return choice.plans_of(options.backend, work, options.device)


def _offers(work: Work, options: argparse.Namespace) -> tuple[choice.Offer, ...]:
    return choice.offers(work, options.device, tracks=options.norm == "batch")


def _report() -> None:
    print(f"tsbn-kernels {__version__}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    for backend in backends.backends():
        state = "available" if backend.available else "missing"
        print(f"  {backend.name:10} {state:10} {backend.detail}")
    reason = "forced by TSBN_BACKEND" if os.environ.get("TSBN_BACKEND") else "the first that is available"
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for device in ["cpu", *([accelerator.type] if accelerator else [])]:
        try:
            by_plan = backends.plans_decide(device)
            found = "triton or cuda (by the plan of each call)" if by_plan else f"{backends.select(device)} ({reason})"
            print(f"{device} tensors run on: {found}")
        except RuntimeError as error:
            print(f"{device} tensors: {error}")
    print(f"reused memory for large CPU outputs: at most {memory.cache_limit() >> 20} MiB idle")


if __name__ == "__main__":
    main()
