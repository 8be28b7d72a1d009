"""The command line. A command is imported when it is asked for: what reads records needs no PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

COMMANDS = {
    "layers": "benchmarks.commands.layers:layers",
    "sweep": "benchmarks.commands.layers:sweep",
    "train": "experiments.forty_tasks.command:train",
    "train-dense": "experiments.dense_tasks.command:train_dense",
    "dense-step": "experiments.dense_tasks.step_command:dense_step",
    "study": "experiments.forty_tasks.study_command:study",
    "profile": "benchmarks.commands.profile:profile",
    "gpu-day": "benchmarks.commands.gpu_day:gpu_day",
    "fit-plans": "benchmarks.commands.fit_plans:fit_plans",
    "report": "benchmarks.commands.report:report",
    "compare": "benchmarks.commands.report:compare",
    "celeba40": "benchmarks.commands.celeba40:celeba40",
    "fan-out": "benchmarks.commands.fan_out:fan_out",
    "export": "benchmarks.commands.export:export",
    "double-backward": "benchmarks.commands.double_backward:double_backward",
    "host": "benchmarks.commands.host:host",
    "compiled-kernels": "tools.compile_gate.command:compile_kernels",
}


class OnDemand(TyperGroup):
    """Imports the module of a command for that command alone; for the list of all, every one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"commands": dict(COMMANDS)})  # for the list, and for what a wrong name may mean

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name].partition(":")
        alone = typer.Typer(add_completion=False)
        alone.command(cmd_name)(getattr(import_module(module), function))
        return get_command(alone)


app = typer.Typer(cls=OnDemand, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Benchmarks of the fused layers."""


def main() -> None:
    """Entry of ``python -m benchmarks``."""
    app()
