"""Runs what Triton compiles for a GPU that is not here, as PTX, in the machine of :mod:`ptxvm`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import triton
from torch import Tensor
from triton import knobs

from benchmarks.profile.compile_offline import Call, compile_call, lines
from support.interpreter import passes
from tools.ptxvm import Out, Report
from tools.ptxvm import launch as run_ptx
from tsbn_kernels.backends.plan import Device, Plan
from tsbn_kernels.backends.triton import kernels, ops
from tsbn_kernels.backends.triton import launch as launches
from tsbn_kernels.backends.triton.launch import Launch

# What a kernel writes: each element once, the machine sees to that.
OUTPUTS = {
    "forward_slab": ("y", "mean", "var"),
    "forward_partial": ("partials",),
    "forward_apply": ("y", "mean", "var"),
    "backward_slab": ("dx", "dresidual", "dweight", "dbias"),
    "backward_partial": ("partials", "dx", "dresidual"),
    "backward_apply": ("dx", "dresidual", "dweight", "dbias"),
    "forward_cluster": ("y", "mean", "var"),
    "backward_cluster": ("dx", "dresidual", "dweight", "dbias"),
    "double_backward_partial": ("partials",),
    "double_backward_apply": ("ddy", "dx"),
    "fan_out_slab": ("y", "mean", "var"),
    "fan_out_apply": ("y", "mean", "var"),
    "fan_out_gather": ("dx", "dresidual", "dweight", "dbias", "partials"),
    "fan_out_sums": ("dweight", "dbias", "terms"),
    "fan_out_gradient": ("dx",),
    "layer_norm_forward": ("y", "added", "mean", "rstd"),
    "layer_norm_backward": ("dx", "dweight", "dbias"),
    "layer_norm_parameters": ("dweight", "dbias"),
    "layer_norm_double_backward": ("ddy", "ds", "partials"),
    "mixed_keys": ("keys",),
    "mixed_partial": (),  # partials have room for more blocks than most mixes have
    "mixed_statistics": ("mean", "rest", "var"),
    "mixed_forward": ("y",),
    "mixed_backward": ("dx", "dresidual"),
    "mixed_gradient": ("dx", "dresidual"),
    "mixed_sums": ("dweight", "dbias", "slopes", "offsets"),
    "mixed_layer_norm_forward": ("y", "added", "mean", "rstd"),
    "mixed_layer_norm_backward": ("dx",),
    "mixed_layer_norm_parameters": ("dweight", "dbias"),
}


@dataclass
class Machine:
    """What was launched: the plans of the passes, and for each launch its kernel and the machine's report."""

    plans: list[Plan] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    @property
    def kernels(self) -> list[str]:
        return [report.kernel for report in self.reports]


def _ptx_alone(*compilation: Any) -> tuple[str, str]:
    """Leaves out the machine code, which nothing here runs: a hook of Triton, which adds this to the cache's key."""
    if compilation:
        _, stages, *_ = compilation
        stages["cubin"] = lambda *_: b""
    return "PTX alone", "PTX alone"


def run_call(call: Call, target: str, schedule: str | int = "forward") -> Report:
    """Runs a launch on CPU tensors."""
    with mock.patch.object(knobs.runtime, "add_stages_inspection_hook", _ptx_alone):
        compiled, values = compile_call(call, target)
    made, kernel = compiled.metadata, call.launch.kernel
    named = dict(zip(call.launch.function.arg_names, call.arguments, strict=False))
    given = kernel.endswith("_apply") and named.get("partials") is None  # statistics that are read, not written
    written = [named[name] for name in OUTPUTS[kernel] if not (given and name in ("mean", "var"))]
    outputs = {id(value.data if isinstance(value, tuple) else value) for value in written}
    if "gathered" in named:
        outputs.discard(id(named["gathered"].data))  # dx is made of what it holds
    arguments = [Out(v) if isinstance(v, Tensor) and id(v) in outputs else v for v in values]
    assert made.global_scratch_size == made.profile_scratch_size == 0
    return run_ptx(
        compiled.asm["ptx"],
        made.name,
        call.launch.programs * made.num_ctas,
        made.num_warps * 32,
        [*arguments, None, None],
        shared=made.shared,
        schedule=schedule,
        stores_may_collide=True,
    )


@contextmanager
def machine(device: Device, schedule: str | int = "forward") -> Iterator[Machine]:
    """Sends the launches of the Triton backend's operators to the machine, for the GPU that a device stands for."""
    done = Machine()

    def launch(self: Launch, *arguments: Any) -> None:
        done.reports.append(run_call(Call(self, arguments), device.target, schedule))

    with (
        mock.patch.object(Launch, "__call__", launch),
        mock.patch.object(ops, "device_of", return_value=device),
        mock.patch.dict(ops.forwards, clear=True),
        mock.patch.dict(ops.backwards, clear=True),
    ):
        yield done
        done.plans = [run.plan for run in passes()]


@dataclass(frozen=True)
class Moved:
    """Bytes and 32-byte sectors of the accesses of one kind, and how many requests of a warp they took."""

    bytes: int
    sectors: int
    requests: int


def moved(report: Report, what: str, activations: bool) -> Moved:
    """What a launch loads or stores: of the activations by tiles, or all the rest, vectors and partial sums."""
    operation = {"load": "ld", "store": "st"}[what]
    rows = [r for r in report.rows if r.space == "global" and r.operation == operation]
    assert all(r.source for r in rows)
    rows = [r for r in rows if _by_tiles(r.source, what) == activations]
    return Moved(*(sum(getattr(r, name) for r in rows) for name in ("bytes", "sectors", "requests")))


def _by_tiles(source: str, what: str) -> bool:
    place = re.match(r"tiles\.py:(\d+)\b", source)
    return place is not None and int(place[1]) in lines(what)


# ---- earlier compilers ----------------------------------------------------------------------------------------------

# What compilers before Triton 3.8 do otherwise in columns, at most. Warps that exchange sums meet in the banks of
# shared memory: the cycles that this adds to an access, by kernel, with 3.6 and 3.7. 3.6 reads some vectors twice.
_MEETINGS = {
    "forward_slab": (0.93, 1.42),
    "forward_partial": (0.83, 1.42),
    "forward_apply": (1, 1),
    "backward_slab": (1.2, 1.42),
    "backward_partial": (1.2, 1.42),
    "backward_apply": (1, 1.41),
    "double_backward_partial": (0.67, 1.2),
    "fan_out_apply": (1, 1),
    "fan_out_gather": (1.2, 1.2),
    "fan_out_sums": (1.2, 1.2),
    "fan_out_gradient": (1.2, 1.2),
    "layer_norm_backward": (13.23, 13.23),
    "layer_norm_double_backward": (12.56, 12.56),
}
_MORE_VECTORS = {"3.6": {"backward_slab": 13 / 12}}
_VERSION = triton.__version__[:4].rstrip(".")


def allowed_conflicts(report: Report, family: str) -> float:
    """The cycles that bank conflicts may add to the accesses of a launch to shared memory."""
    if family == "rows" or _VERSION not in ("3.6", "3.7"):
        return 0
    accesses = sum(report.traffic("shared", writes).requests for writes in (False, True))
    return _MEETINGS.get(report.kernel, (0, 0))[_VERSION == "3.7"] * accesses


def allowed_vectors(report: Report, family: str) -> float:
    """How often a launch may read a vector for each time that its plan does."""
    return _MORE_VECTORS.get(_VERSION, {}).get(report.kernel, 1) if family == "columns" else 1


# ---- broken on purpose -----------------------------------------------------------------------------------------------


def break_kernel(module: str, text: str, broken: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches kernels of a copy of their package in which ``text`` of one module, which it has once, is ``broken``."""
    package = "mutant_" + "".join(c for c in folder.name if c.isalnum())
    (folder / package).mkdir()
    for source in Path(kernels.__file__).parent.glob("*.py"):
        code = source.read_text().replace(kernels.__name__, package)
        if source.stem == module:
            assert code.count(text) == 1
            code = code.replace(text, broken)
        (folder / package / source.name).write_text(code)
    monkeypatch.syspath_prepend(folder)
    loaded = (importlib.import_module(part.__name__.replace(kernels.__name__, package)) for part in launches.MODULES)
    monkeypatch.setattr(launches, "MODULES", tuple(loaded))


@contextmanager
def rewritten(pattern: str, text: str) -> Iterator[None]:
    """Puts something else into what is compiled."""

    compile_whole = compile_call

    def broken(*arguments: Any) -> Any:
        made, values = compile_whole(*arguments)
        made.asm["ptx"], changes = re.subn(pattern, text, made.asm["ptx"])
        assert changes
        return made, values

    with mock.patch.dict(globals(), compile_call=broken):
        yield


def without_barriers() -> AbstractContextManager[None]:
    """Takes all barriers out of what is compiled."""
    return rewritten(r"bar\.sync", "// bar.sync")
