"""Modules by the names that they had before version 0.1: pickles and imports of that time find what they name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Those that a pickle may name, or that were documented; with their submodules.
_MOVED = {
    f"tsbn_kernels.{before}": f"tsbn_kernels.{now}"
    for before, now in {
        "chains": "models.fuse_activations",
        "convert": "models.convert",
        "hold": "models.hold",
        "integrations": "models",
        "late": "layers.late_fan_out",
        "modules": "layers.batch_norm",
        "multitask": "models.multitask",
        "plan": "backends.plan",
    }.items()
}


class _EarlierNames(MetaPathFinder, Loader):
    """Finds a module of today for a name of then."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Takes the names that are in the table, and those below them."""
        before, below = fullname.split(".")[:2], fullname.split(".")[2:]
        now = _MOVED.get(".".join(before))
        return ModuleSpec(fullname, self, origin=".".join([now, *below]), is_package=True) if now else None

    def exec_module(self, module: ModuleType) -> None:
        """Puts the module of today under the name of then."""
        assert module.__spec__ is not None
        assert module.__spec__.origin is not None
        sys.modules[module.__name__] = importlib.import_module(module.__spec__.origin)


def find_earlier_names() -> None:
    """Lets imports find modules by their earlier names too."""
    sys.meta_path.insert(0, _EarlierNames())  # before what searches the folders: one module has one copy
