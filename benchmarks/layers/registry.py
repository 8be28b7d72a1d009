"""All implementations by the norm that they run and by name, and which of them run where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from benchmarks.layers.cases import Case
from benchmarks.layers.peer import Peer
from benchmarks.layers.peers import ActivationBehind, CuDNN, Folded, Fused, Loop, Vmap
from benchmarks.layers.peers_compiled import COMPILED
from benchmarks.layers.peers_installed import INSTALLED
from benchmarks.layers.peers_layer_norm import FusedLayerNorm, LoopOfLayerNorms, Scaled
from benchmarks.layers.peers_mixed import EqualTasks, FusedMixed, Grouped, MaskedLoop, SortedSlices
from benchmarks.records.workloads import BATCH_NORM, NORMS

_OF_BATCH_NORM: tuple[type[Peer], ...] = (Fused, ActivationBehind, Loop, Folded, Vmap, CuDNN)
_OF_LAYER_NORM: tuple[type[Peer], ...] = (FusedLayerNorm, LoopOfLayerNorms, Scaled)
_OF_MIXED: tuple[type[Peer], ...] = (FusedMixed, EqualTasks, MaskedLoop, SortedSlices, Grouped)
_ALL: tuple[type[Peer], ...] = (*_OF_BATCH_NORM, *_OF_LAYER_NORM, *_OF_MIXED, *COMPILED, *INSTALLED)
PEERS = {norm: {peer.name: peer for peer in _ALL if peer.norm == norm} for norm in NORMS}
NAMES = tuple(dict.fromkeys(peer.name for peer in _ALL))


def defaults(device: torch.device, norms: Iterable[str] = (BATCH_NORM,)) -> list[str]:
    """What is measured unless told otherwise: on a CPU without those that are slow there, and tell nothing."""
    chosen = [peer for norm in norms for peer in PEERS[norm].values() if device.type != "cpu" or peer.default_on_cpu]
    return list(dict.fromkeys(peer.name for peer in chosen))


def why_not(impl: str, case: Case) -> str | None:
    """Why an implementation has no part in a case; None where it has."""
    peer = PEERS[case.norm].get(impl)
    if peer is None:
        return f"it is no way to run {case.norm}"
    return peer.unavailable(case.device) or peer.unsupported(case)


def runnable(impls: Sequence[str], todo: Sequence[Case]) -> tuple[list[str], dict[str, str]]:
    """The implementations that have a part in one of the cases, and why the others have none."""
    reasons = {}
    for impl in impls:
        whys = [why_not(impl, case) for case in todo]
        if all(whys):
            reasons[impl] = str(whys[0])
    return [impl for impl in impls if impl not in reasons], reasons
