"""``python -m benchmarks``: the command line needs two packages; a command that needs others imports them itself."""

import sys
from importlib.util import find_spec

NEEDED = {"rich": "rich", "typer": "typer"}
OF_SOME = {
    "matplotlib": "matplotlib",
    "mlxtend": "mlxtend",
    "PIL": "pillow",
    "scipy": "scipy",
    "skimage": "scikit-image",
}
INSTALL = "python -m pip install 'tsbn-kernels[bench]'"

if __name__ == "__main__":
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        sys.exit(f"the benchmarks need {', '.join(missing)}: {INSTALL}")
    from benchmarks.commands.app import main

    try:
        main()
    except ModuleNotFoundError as error:
        if error.name not in OF_SOME:
            raise
        sys.exit(f"this command needs {OF_SOME[error.name]}: {INSTALL}")
