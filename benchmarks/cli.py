"""The command line. A command is imported when it is asked for: what reads records needs no PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

COMMANDS = {
    "layers": "benchmarks.cli_layers:layers",
    "sweep": "benchmarks.cli_layers:sweep",
    "train": "benchmarks.cli_train:train",
    "profile": "benchmarks.cli_profile:profile",
    "gpu-day": "benchmarks.cli_gpu_day:gpu_day",
    "fit-plans": "benchmarks.cli_fit:fit_plans",
    "report": "benchmarks.cli_report:report",
    "compare": "benchmarks.cli_report:compare",
    "celeba40": "benchmarks.cli_celeba40:celeba40",
    "fan-out": "benchmarks.cli_fan_out:fan_out",
    "host": "benchmarks.cli_host:host",
    "compiled-kernels": "benchmarks.cli_compile_gate:compile_kernels",
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
