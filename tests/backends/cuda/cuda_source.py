"""The kernels of csrc/cuda as PTX: as they are, or with a line broken on purpose."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from functools import cached_property, lru_cache

from support.processes import ROOT

from tools.ptxvm import compile_cuda

CSRC = ROOT / "csrc" / "cuda"
_FLAGS = ("-DTSBN_DEVICE_ONLY",)
_KERNEL = re.compile(r"^\.visible \.entry (\w+)\(.*?^}$(?=\n(?:\t// \.globl|\t\.file|\s*\Z))", re.DOTALL | re.MULTILINE)
# What test_targets and test_stackings launch for targets other than 90: the others need not be compiled.
_ELSEWHERE = re.compile(
    r"tsbn_(forward|backward)(_together)?_(f|bf)\d+_(rows|columns)|"
    r"tsbn_(forward|backward)_epilogue_f(16|32)_(rows|columns)|tsbn_backward_fan_out_f(16|32)_(rows|columns|scalar)|"
    r"tsbn_layer_norm_\w+_(rows|f32|f64)"
)
# What no test launches: mixed batches are tested with each dtype and with each access, but not with each of both.
_NOWHERE = re.compile(
    r"tsbn_(forward|backward)_mixed_(f32_(rows|scalar)|f64_(rows|columns)|f16_(columns|scalar)|bf16_rows)|"
    r"tsbn_mixed_keys_f32|tsbn_backward_epilogue_f(16|64)_scalar"
)


@lru_cache
def source(file: str = "kernels.cu") -> str:
    """A file with our headers in place, so that tests can change any line of it."""
    seen = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (CSRC / name).read_text().replace("#pragma once", "")
        return re.sub(r'#include "([^"]+)"', lambda match: expand(match[1]), text)

    return expand(file)


@lru_cache
def parts(file: str) -> tuple[str, dict[str, str]]:
    """What kernels are made of, and the definition of each kernel by its name, which the preprocessor writes."""
    text = source(file)
    head = text[: text.rindex("#define", 0, text.index('extern "C" __global__'))]
    command = ["g++", "-E", "-P", "-x", "c++", *_FLAGS, "-"]
    made = subprocess.run(command, input=text.removeprefix(head), capture_output=True, text=True, check=True).stdout
    _, *definitions = re.split(r'(?=extern "C")', made)
    return head, {re.findall(r" (tsbn_\w+)\(", one)[0]: one for one in definitions}


@lru_cache
def ptx(target: int = 90, file: str = "kernels.cu") -> str:
    """The kernels of a file that tests launch for this target."""
    head, definitions = parts(file)
    names = (n for n in definitions if not _NOWHERE.fullmatch(n) and (target == 90 or _ELSEWHERE.fullmatch(n)))
    text = head + "\n".join(definitions[name] for name in names)
    return compile_cuda(text, target=target, flags=_FLAGS)


class Broken:
    """PTX of some kernels by the name of what is broken in them; that of None is whole.

    All of it is compiled at once, each change in a namespace of its own: CUDA's headers take the most of one.

    Args:
        changes: a piece of the source and what takes its place, by name; and the kernel that is compiled with that,
            where the others stay whole.
        kernels: their names.
        file: their source.
    """

    def __init__(self, changes: Mapping[str, tuple[str, ...]], *kernels: str, file: str = "kernels.cu") -> None:
        self.changes: dict[str | None, tuple[str, ...]] = {None: ("", ""), **changes}
        self.kernels, self.file = kernels, file
        self._texts: dict[str | None, str] = {}

    def __getitem__(self, name: str | None) -> str:
        if name not in self._texts:
            marks = {self._mark(name if kernel in self._changed(name) else None) + kernel for kernel in self.kernels}

            def own(kernel: re.Match[str]) -> str:
                mark, _, plain = kernel[1].partition("_")
                return kernel[0].replace(kernel[1], f"tsbn_{plain}") if f"{mark}_{plain}" in marks else ""

            self._texts[name] = _KERNEL.sub(own, self._compiled)
        return self._texts[name]

    def _changed(self, name: str | None) -> tuple[str, ...]:
        """The kernels that are compiled with a change."""
        return self.changes[name][2:] or self.kernels

    def _mark(self, name: str | None) -> str:
        """The beginning of the names of its kernels."""
        return f"change{list(self.changes).index(name)}_"

    @cached_property
    def _compiled(self) -> str:
        head, definitions = parts(self.file)
        pieces = re.findall("^#include <.*$", head, re.MULTILINE)
        undefined = [f"#undef {macro}" for macro in re.findall(r"^#define (\w+)", head, re.MULTILINE)]
        for name, (old, new, *_) in self.changes.items():
            assert old in head, f"nothing to change: {old}"
            own = [definitions[f"tsbn_{kernel}"] for kernel in self._changed(name)]
            whole = "\n".join([head.replace(old, new) if old else head, *own])
            mark = self._mark(name)
            pieces += [f"namespace {mark} {{", re.sub(r"\btsbn_(?=\w+\()", mark, whole), "}", *undefined]
        return compile_cuda("\n".join(pieces), target=90, flags=_FLAGS)
