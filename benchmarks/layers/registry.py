"""All implementations by name, and which of them run where."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.layers.cases import Case
from benchmarks.layers.peers import ActivationBehind, CuDNN, Folded, Fused, Loop, Peer, Vmap
from benchmarks.layers.peers_compiled import COMPILED
from benchmarks.layers.peers_installed import INSTALLED

_ALL: tuple[type[Peer], ...] = (Fused, ActivationBehind, Loop, Folded, Vmap, CuDNN, *COMPILED, *INSTALLED)
PEERS = {peer.name: peer for peer in _ALL}


def defaults(device: torch.device) -> list[str]:
    """What is measured unless told otherwise: on a CPU without those that are slow there, and tell nothing."""
    return [name for name, peer in PEERS.items() if device.type != "cpu" or peer.default_on_cpu]


def runnable(impls: Sequence[str], todo: Sequence[Case]) -> tuple[list[str], dict[str, str]]:
    """The implementations that have a part in one of the cases, all of one device, and why the others have none."""
    reasons = {}
    for impl in impls:
        peer = PEERS[impl]
        whys = [peer.unavailable(todo[0].device) or peer.unsupported(case) for case in todo]
        if all(whys):
            reasons[impl] = str(whys[0])
    return [impl for impl in impls if impl not in reasons], reasons
