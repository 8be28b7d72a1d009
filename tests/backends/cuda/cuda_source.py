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
        changes: a piece of the source and what takes its place, by name.
        kernels: their names.
        file: their source.
    """

    def __init__(self, changes: Mapping[str, tuple[str, str]], *kernels: str, file: str = "kernels.cu") -> None:
        self.changes, self.kernels, self.file = {None: ("", ""), **changes}, kernels, file

    def __getitem__(self, name: str | None) -> str:
        mark = self._mark(name)

        def own(kernel: re.Match[str]) -> str:
            name = kernel[1]
            return kernel[0].replace(name, name.replace(mark, "tsbn_")) if name.startswith(mark) else ""

        return _KERNEL.sub(own, self._compiled)

    def _mark(self, name: str | None) -> str:
        """The beginning of the names of its kernels."""
        return f"change{list(self.changes).index(name)}_"

    @cached_property
    def _compiled(self) -> str:
        head, definitions = parts(self.file)
        whole = head + "\n".join(definitions[f"tsbn_{kernel}"] for kernel in self.kernels)
        includes = re.findall("^#include <.*$", whole, re.MULTILINE)
        undefined = [f"#undef {macro}" for macro in re.findall(r"^#define (\w+)", whole, re.MULTILINE)]
        pieces = list(includes)
        for name, (old, new) in self.changes.items():
            assert old in head, f"nothing to change: {old}"
            mark = self._mark(name)
            changed = re.sub(r"\btsbn_(?=\w+\()", mark, whole.replace(old, new) if old else whole)
            pieces += [f"namespace {mark} {{", changed, "}", *undefined]
        return compile_cuda("\n".join(pieces), target=90, flags=_FLAGS)
