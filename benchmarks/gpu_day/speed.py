"""Steps: normalisation layers of known networks, by both backends and by peers; most telling first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu_day import race
from benchmarks.gpu_day.step_api import Measurement, Setting
from benchmarks.layers.cases import Case
from benchmarks.layers.cases import cases as layer_cases
from benchmarks.records.workloads import BERT_BASE, CELEBA, RESNET50, SEGNET, VIT_S16, Layer, Workload

ORDER = ("bn4,bn5", "bn2,bn3", "bn6,bn7", "bn1", "bn8,bn9")
DTYPES, FORMATS = ("bfloat16", "float32"), ("contiguous", "channels_last")
COMPILED = ("compiled_folded", "compiled_reference")


def celeba(setting: Setting, dtype: str = "bfloat16") -> list[Measurement]:
    """Every layer of the CelebA network at full size."""
    return _races(_celeba(setting, [dtype]), setting, "speed")


def float32(setting: Setting) -> list[Measurement]:
    """Races the entrants in every CelebA layer in float32."""
    return celeba(setting, "float32")


def compiled(setting: Setting) -> list[Measurement]:
    """What ``torch.compile`` makes of the folded form and of the reference, for three layers."""
    todo, names = (_celeba(setting)[:1], COMPILED[:1]) if setting.quick else (_celeba(setting)[:3], COMPILED)
    return _races(todo, setting, "speed", names)


def others(setting: Setting) -> list[Measurement]:
    """Layers of transformers; and of ResNet-50 and SegNet, where the host may take more time than the kernels."""
    return _races(_others(setting), setting, "layers")


def planned() -> list[Case]:
    """All layers at full size, on no device."""
    setting = Setting("meta", False, "")
    return _celeba(setting) + _others(setting)


def _celeba(setting: Setting, dtypes: Sequence[str] = DTYPES) -> list[Case]:
    layers = sorted(CELEBA.layers, key=lambda layer: ORDER.index(layer.name))
    if setting.quick:
        layers = [layers[0], layers[-1]]  # small ones are all alike
    found = [
        case
        for dtype in dtypes
        for memory_format in FORMATS
        for case in _cases(CELEBA, layers, dtype, memory_format, setting)
    ]
    return list(dict.fromkeys(found))  # 1-d layers have no memory format


def _others(setting: Setting) -> list[Case]:
    found = []
    for workload in (VIT_S16, BERT_BASE, RESNET50[0], SEGNET):
        layers = sorted(workload.layers, key=lambda layer: -layer.elements * layer.times)
        found += _cases(workload, layers[: 1 if setting.quick else None], "bfloat16", "contiguous", setting)
    return found


def _cases(workload: Workload, layers: Iterable[Layer], dtype: str, memory_format: str, setting: Setting) -> list[Case]:
    """The layers at full size, or with ``quick`` small."""
    tasks, batch = workload.tasks, workload.batch
    if setting.quick:
        tasks, batch = 3, 8
        layers = [replace(one, channels=16, size=one.size and (8, 6)[: len(one.size)]) for one in layers]
    return layer_cases(
        list(layers),
        tasks=tasks,
        batch=batch,
        dtypes=[dtype],
        memory_formats=[memory_format],
        device=torch.device(setting.device),
        workload=workload.name,
    )


def _races(todo: Iterable[Case], setting: Setting, kind: str, peers: Sequence[str] = ()) -> list[Measurement]:
    """Races of ours and the usual peers, or of the named peers alone.

    The last of ours comes behind the peers: what it may end, on a device where it has never run, is then measured.
    """
    device = torch.device(setting.device)
    ours = [] if peers else race.ours(device)

    def entrants(norm: str) -> list[race.Entrant]:
        return [*ours[:1], *race.peers(device, norm, peers), *ours[1:]]

    return [
        Measurement(f"{one.workload} {one}", partial(race.run, one, entrants(one.norm), setting, kind)) for one in todo
    ]
