"""``python -m benchmarks``: checks that everything needed is installed, then runs the command line."""

import sys
from importlib.util import find_spec

NEEDED = {
    "matplotlib": "matplotlib",
    "mlxtend": "mlxtend",
    "PIL": "pillow",
    "rich": "rich",
    "skimage": "scikit-image",
    "scipy": "scipy",
    "typer": "typer",
}

if __name__ == "__main__":
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        sys.exit(f"the benchmarks need {', '.join(missing)}: python -m pip install 'tsbn-kernels[bench]'")
    from benchmarks.cli import main

    main()
