"""The peers that a compiler makes of others: ``torch.compile`` as it is, and told to try kernels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.layers.cases import Case, Inputs
from benchmarks.layers.peer import Peer
from benchmarks.layers.peers import Folded, Loop, Reference, Vmap
from benchmarks.layers.peers_layer_norm import LoopOfLayerNorms, Scaled
from benchmarks.layers.peers_mixed import Grouped, MaskedLoop, SortedSlices

# Without CUDA graphs: they spare launches, for whatever is put into them, and would copy x into a buffer of theirs.
MODES = {"compiled": "default", "autotuned": "max-autotune-no-cudagraphs"}


def _no_compiler(device: torch.device) -> str | None:
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in compilers if compiler):
        return "torch.compile needs a C++ compiler (g++ or clang++) and there is none"
    return None


class Compiled(Peer):
    """Compiles the step of the peer that stands behind it among a class's bases."""

    mode: ClassVar[str]
    step_function: Callable[..., Tensor]

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.step_function = torch.compile(self.step_function, dynamic=False, mode=self.mode)

    unavailable = staticmethod(_no_compiler)

    @staticmethod
    def unsupported(case: Case) -> str | None:
        return None  # what eager operators refuse is decomposed


def _compiled(prefix: str, peer: type[Peer]) -> type[Peer]:
    """A class of the peer, compiled.

    By default a CPU measures neither loops of batch normalisations, which take minutes to compile, nor what is
    autotuned: there max-autotune tries kernels of matrix products and convolutions alone, and makes the same
    code of a normalisation.
    """
    default = peer.default_on_cpu and not issubclass(peer, Loop) and prefix == "compiled"
    name = f"{prefix}_{peer.name}"
    return type(name, (Compiled, peer), {"name": name, "mode": MODES[prefix], "default_on_cpu": default})


_OF_MIXED: tuple[type[Peer], ...] = (MaskedLoop, SortedSlices, Grouped)
_PEERS: tuple[type[Peer], ...] = (Loop, Reference, Folded, Vmap, LoopOfLayerNorms, Scaled, *_OF_MIXED)
COMPILED = [_compiled(prefix, peer) for prefix in MODES for peer in _PEERS]


def warm_up(impls: Sequence[str], device: torch.device) -> None:
    """Compiles something small, if one of the implementations will be compiled: the first time takes ten seconds."""
    if {peer.name for peer in COMPILED} & set(impls):
        torch.compile(torch.neg)(torch.ones(8, device=device))
