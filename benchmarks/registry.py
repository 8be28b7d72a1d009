"""All implementations by name, and which of them run where."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.cases import Case
from benchmarks.peers import CuDNN, Folded, Fused, Loop, Peer, Separate, Vmap
from benchmarks.peers_compiled import COMPILED
from benchmarks.peers_installed import INSTALLED

_ALL: tuple[type[Peer], ...] = (Fused, Separate, Loop, Folded, Vmap, CuDNN, *COMPILED, *INSTALLED)
PEERS = {peer.name: peer for peer in _ALL}


def defaults(device: torch.device) -> list[str]:
    """What is measured unless told otherwise.

    On a CPU without the autotuned ones: there max-autotune tries kernels of matrix products and convolutions alone, and
    makes the same code of a normalisation. Without the compiled loop, which takes minutes to compile for 40 tasks. And
    without vmap, which took two to three times as long as the folded form, compiled too.
    """
    slow = [
        name for name in PEERS if name.startswith("autotuned") or name in ("compiled_loop", "vmap", "compiled_vmap")
    ]
    return [name for name in PEERS if device.type != "cpu" or name not in slow]


def runnable(impls: Sequence[str], todo: Sequence[Case]) -> tuple[list[str], dict[str, str]]:
    """The implementations that have a part in one of the cases, all of one device, and why the others have none."""
    reasons = {}
    for impl in impls:
        peer = PEERS[impl]
        whys = [peer.unavailable(todo[0].device) or peer.unsupported(case) for case in todo]
        if all(whys):
            reasons[impl] = str(whys[0])
    return [impl for impl in impls if impl not in reasons], reasons
