"""``python -m benchmarks.hot_paths``: see check.py."""

import typer

from benchmarks.hot_paths.check import check

if __name__ == "__main__":
    typer.run(check)
