"""``python -m benchmarks.micro``: see check.py."""

import typer

from benchmarks.micro.check import check

if __name__ == "__main__":
    typer.run(check)
