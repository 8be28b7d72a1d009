"""The sweep: the CelebA layers by the rules' plans and by plans near them, timed one by one; its records are read here.

A record is a JSON object: layer, shape, tasks, dtype, format, pass, backend, device (what the plans know of the GPU),
plan (its numbers), by_rule, useful_bytes, planned_bytes, at_a_time (clusters of CUDA C++), copy_ms (of a tensor of this
size), and ms or failure. Where there is no GPU, ``stand_in`` says that something else was timed: the records show that
the sweep runs, and no more.
"""

from __future__ import annotations

import json
import math
import statistics
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_day.constants import CONSTANTS, changed
from benchmarks.layers.cases import Case, cases
from benchmarks.profile.predict import DIRECTIONS, work_of
from benchmarks.records.workloads import CELEBA, Layer
from benchmarks.timing.environment import cache_bytes
from benchmarks.timing.measure import Timer, rotating_buffers
from tsbn_kernels.backends import cuda
from tsbn_kernels.backends.cuda import batch_norm as cuda_backend
from tsbn_kernels.backends.plan import DEVICES, Device, Plan, Work, devices
from tsbn_kernels.backends.plan import cuda as cuda_rules
from tsbn_kernels.backends.plan import triton as triton_rules
from tsbn_kernels.backends.plan.work import Direction
from tsbn_kernels.definition.options import Needs, Options, Saved
from tsbn_kernels.operator.ops import operators

FILE = "sweep.jsonl"
LAYERS = ("bn4,bn5", "bn2,bn3", "bn6,bn7", "bn1", "bn8,bn9")  # the most telling first
KINDS = tuple(product(("bfloat16", "float32"), ("contiguous", "channels_last")))
BACKENDS = ("triton", "cuda")
NEAR = 8  # of the CUDA plans, by their predicted time: the others come after everything else
ROUNDS, GRAPH_SECONDS = 5, 2e-3
SweepStep = Callable[[], object]

_copies: dict[Case, float] = {}  # milliseconds of a copy


@dataclass(frozen=True)
class SweptPlan:
    """A plan for a pass of a layer.

    Attributes:
        by_rule: it is the one that a call would take.
        clusters: how many of a CUDA C++ plan run at a time.
    """

    case: Case
    direction: Direction
    device: Device
    plan: Plan
    by_rule: bool
    clusters: cuda_rules.Clusters

    @property
    def backend(self) -> str:
        return self.plan.backend

    def __str__(self) -> str:
        return f"{self.case} {self.direction}, {describe(self.numbers)}" + " (the rule's)" * self.by_rule

    @property
    def work(self) -> Work:
        return case_work(self.case, self.direction)

    @property
    def numbers(self) -> dict[str, Any]:
        """All of the plan."""
        return numbers_of(self.plan)

    def run(self, timer: Timer) -> dict[str, Any]:
        """A record; a plan that cannot be launched leaves its error there.

        Raises:
            RuntimeError: the device is lost.
        """
        case, record = self.case, self.record()
        on_cpu = case.device.type == "cpu"
        if on_cpu:
            record["stand_in"] = "the operator of the CPU"
        try:
            record["copy_ms"] = _copy_milliseconds(case, timer)
            with nullcontext() if on_cpu else forced(self.plan):
                record["ms"] = _milliseconds(self.steps(), timer, case.device)
        except Exception as error:
            record["failure"] = f"{type(error).__name__}: {error}"[:500]
            if not on_cpu:
                torch.get_device_module(case.device).synchronize()
        return record

    def record(self) -> dict[str, Any]:
        """All but the times."""
        case, plan = self.case, self.plan
        own = {"at_a_time": self.clusters(plan)} if isinstance(plan, cuda_rules.CudaPlan) else {}
        return {
            **own,
            "layer": case.layer.name,
            "shape": case.shape,
            "tasks": case.tasks,
            "dtype": case.dtype,
            "format": case.memory_format,
            "pass": self.direction,
            "backend": self.backend,
            "device": asdict(self.device),
            "by_rule": self.by_rule,
            "plan": self.numbers,
            "useful_bytes": self.work.useful_bytes,
            "planned_bytes": plan.bytes_read + plan.bytes_written,
        }

    def steps(self) -> list[SweepStep]:
        """The pass over one set of buffers after another, so many that no cache holds the next."""
        return [partial(_pass, self.case, self.direction, self.backend, *buffers) for buffers in _inputs(self.case)]

    def on_meta(self) -> None:
        """Asks for the launches of a Triton plan with tensors of no memory, for those who collect and compile them."""
        with forced(self.plan):
            _pass(self.case, self.direction, self.backend, *_meta(self.case))


def case_work(case: Case, direction: Direction) -> Work:
    """What a pass of a layer is."""
    return work_of(case.shape, case.tasks, case.dtype, case.memory_format, direction)


def numbers_of(plan: Plan) -> dict[str, Any]:
    """What a plan decides, and what follows from it."""
    return {name: value for name, value in asdict(plan).items() if name not in ("work", "device")}


def describe(plan: Mapping[str, Any]) -> str:
    """A plan's numbers in a few words, which tell it from the other plans of its pass."""
    names = ("warps", "splits", "cluster", *["teams"] * bool(plan.get("teams")), "registers", "resident")
    counts = [f"{plan[name]} {name}" for name in names if plan.get(name, 1) != 1]
    return ", ".join([f"{plan['variant']} {'x'.join(map(str, plan['tile']))}", *counts])


# ---- which plans ---------------------------------------------------------------------------------------------------


def candidates(device: str, paper: Device | None = None) -> list[SweptPlan]:
    """All candidates for a device such as ``"cuda: NVIDIA H100"``, the most telling first; on the CPU small ones.

    Args:
        device: a torch device, and what comes after a colon; see :func:`benchmarks.timing.environment.device_name`.
        paper: the GPU that plans are made for; by default the device at hand, and on the CPU an H100.
    """
    where = torch.device(device.partition(":")[0])
    on_cpu = where.type == "cpu"
    gpu = paper or (DEVICES["H100"] if on_cpu else devices.of(torch.device(where.type, 0)))
    near, far = [], []
    for (dtype, memory_format), name, direction in product(KINDS, LAYERS, DIRECTIONS):
        layer = next(layer for layer in CELEBA.layers if layer.name == name)
        if layer.size is None and memory_format != "contiguous":
            continue
        for case in _cases(layer, dtype, memory_format, where, small=on_cpu and paper is None):
            clusters = _clusters(case) if paper is None else cuda_rules.clusters_on_paper
            for backend in BACKENDS:
                rule, close, rest = _PLANS[backend](case_work(case, direction), gpu, clusters)
                near += [SweptPlan(case, direction, gpu, plan, plan == rule, clusters) for plan in close]
                far += [SweptPlan(case, direction, gpu, plan, False, clusters) for plan in rest]
    return near + far


def _clusters(case: Case) -> cuda_rules.Clusters:
    """How many run at a time, by the driver where there is one, as in a call; else on paper."""
    if case.device.type == "cpu" or not cuda.available:
        return cuda_rules.clusters_on_paper
    by_driver = cuda_backend.clusters(getattr(torch, case.dtype), torch.device(case.device.type, 0))

    def clusters(plan: cuda_rules.CudaPlan) -> int:
        try:
            return by_driver(plan)
        except RuntimeError:  # whatever it is, the other backend's plans are timed
            return cuda_rules.clusters_on_paper(plan)

    return clusters


def _cases(layer: Layer, dtype: str, memory_format: str, where: torch.device, *, small: bool) -> list[Case]:
    tasks, batch = (3, 4) if small else (CELEBA.tasks, CELEBA.batch)
    if small:
        layer = replace(layer, channels=16, size=layer.size and (8, 6))
    return cases([layer], tasks=tasks, batch=batch, dtypes=[dtype], memory_formats=[memory_format], device=where)


Plans = tuple[Any, list[Any], list[Any]]  # the rule's; what is near it, the rule's first; and what is not


def rule_of(
    backend: str, work: Work, device: Device, clusters: cuda_rules.Clusters = cuda_rules.clusters_on_paper
) -> Plan:
    """The plan that a call takes."""
    return triton_rules.plan(work, device) if backend == "triton" else cuda_rules.plan(work, device, clusters)


def triton_plans(work: Work, device: Device, clusters: cuda_rules.Clusters) -> Plans:
    """The plan, what the rules would say with other constants, its neighbours; and other variants, tiles and warps."""
    rule = triton_rules.plan(work, device)
    near = dict.fromkeys([rule, *_by_other_constants("triton", work, device, clusters)])
    near |= dict.fromkeys(triton_rules.alternatives(rule))
    near |= dict.fromkeys(_with_registers(rule))
    far: dict[Plan, None] = {}
    for plan in list(near):
        if plan.variant == "cluster":
            continue
        if plan.variant != "resident":
            streaming = replace(plan, variant="streaming", splits=1)
            counts = [plan.splits // 2, plan.splits * 2] if plan.variant == "split" else [2, 8, 32]
            far |= dict.fromkeys([streaming, *(triton_rules._split(streaming, "split", count) for count in counts)])
        for warps in (4, 8, 16, 32):
            if warps * device.warp <= device.block_threads:
                other = triton_rules._plan(work, device, plan.variant, plan.tile, warps)
                far[triton_rules._split(other, plan.variant, plan.splits)] = None
    if rule.variant in ("resident", "cluster"):
        streaming = triton_rules._plan(work, device, "streaming", triton_rules._tile(work, device))
        far |= dict.fromkeys([streaming, *(triton_rules._split(streaming, "split", count) for count in (2, 8))])
    return rule, list(near), [plan for plan in far if plan not in near]


def _with_registers(plan: Plan) -> Iterator[Plan]:
    """Other budgets, where the compiler is told of one: those at which one program more or less is resident."""
    if triton_rules.limits_registers(plan):
        for programs in {plan.resident_programs - 1, plan.resident_programs + 1} - {0}:
            budget = plan.device.registers // (programs * plan.warps * plan.device.warp) // 8 * 8
            if 32 <= budget <= 255:
                yield replace(plan, registers=budget)


def cuda_plans(work: Work, device: Device, clusters: cuda_rules.Clusters) -> Plans:
    """The plans that the rules compare, with other numbers of threads too, by their predicted time."""

    def seconds(plan: cuda_rules.CudaPlan) -> float:
        return cuda_rules.seconds(plan, clusters)

    rule = cuda_rules.plan(work, device, clusters)
    found = dict.fromkeys([rule, *cuda_rules.candidates(work, device)])
    for plan, threads in product(list(found), (64, 128, 512)):
        if plan.threads != threads <= plan.part_slots:
            limit = min(device.block_shared_memory, device.shared_memory // 2 - 1024)
            options = {"most_shared_bytes": max(plan.shared_bytes, limit), "threads": threads}
            options |= {"most_lanes": plan.most_lanes, "teams": plan.teams}
            found[cuda_rules.lay_out(work, device, plan.variant, plan.parts, **options)] = None
    fitting = [plan for plan in found if plan.shared_bytes <= device.block_shared_memory]
    fitting = sorted((plan for plan in fitting if seconds(plan) < math.inf), key=seconds)
    near = dict.fromkeys([rule, *_by_other_constants("cuda", work, device, clusters)])
    best: dict[tuple[str, int], Any] = {}
    for plan in fitting:
        best.setdefault((plan.variant, plan.cluster), plan)
    near |= dict.fromkeys([*fitting[:NEAR], *best.values()])
    return rule, list(near), [plan for plan in fitting if plan not in near]


def _by_other_constants(backend: str, work: Work, device: Device, clusters: cuda_rules.Clusters) -> Iterator[Any]:
    """What the rules say where one of their constants has another of the values that a fit may give it."""
    for constant in CONSTANTS[backend]:
        for value in constant.values:
            with changed({constant: value}):
                yield rule_of(backend, work, device, clusters)


_PLANS: dict[str, Callable[[Work, Device, cuda_rules.Clusters], Plans]] = {"triton": triton_plans, "cuda": cuda_plans}


# ---- running one ---------------------------------------------------------------------------------------------------


@contextmanager
def forced(plan: Plan) -> Iterator[None]:
    """The operators of the plan's backend are run by it, whatever the rules say."""
    if not isinstance(plan, cuda_rules.CudaPlan):
        from tsbn_kernels.backends.triton import ops

        with mock.patch.multiple(ops, choose=lambda *_: plan, forwards={}, backwards={}):
            yield
        return
    cuda_backend._prepare.cache_clear()
    try:
        with mock.patch.object(cuda_backend, "_choose", lambda work, *_: replace(plan, work=work)):
            yield
    finally:
        cuda_backend._prepare.cache_clear()


def _pass(case: Case, direction: Direction, backend: str, x: Tensor, dy: Tensor, gamma: Tensor, var: Tensor) -> object:
    """One pass; ``gamma`` stands for the means too."""
    on_cpu = case.device.type == "cpu" and x.device.type == "cpu"
    by = operators("cpu" if on_cpu else backend)
    options = Options(case.tasks, 1e-5, "sigmoid", "task_major")
    if direction == "forward":
        return by.forward_training(x, gamma, None, None, options)
    saved, needs = Saved(x, gamma, None, None, gamma, var), Needs(True, True, False, False)
    return by.backward(dy, saved, True, needs, options)


@lru_cache(maxsize=1)
def _inputs(case: Case) -> list[tuple[Tensor, ...]]:
    """Sets of x, dy, gate and variance; those of the last case are kept."""
    made = case.inputs()
    count = rotating_buffers(2 * case.tensor_bytes, cache_bytes(case.device)) if case.device.type != "cpu" else 1
    vectors = made.gamma, torch.ones_like(made.gamma)
    copies = [(made.x.clone(), made.dy.clone()) for _ in range(count - 1)]
    return [(x, dy, *vectors) for x, dy in [(made.x, made.dy), *copies]]


def _meta(case: Case) -> tuple[Tensor, ...]:
    shape, vector = case.shape, (case.tasks, case.layer.channels)
    order = torch.channels_last if case.memory_format == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=getattr(torch, case.dtype), device="meta", memory_format=order)
    gamma = torch.empty(vector, dtype=torch.float64 if case.dtype == "float64" else torch.float32, device="meta")
    return x, x, gamma, gamma


def _copy_milliseconds(case: Case, timer: Timer) -> float:
    if case not in _copies:
        target = torch.empty_like(_inputs(case)[0][0])
        _copies[case] = _milliseconds([partial(target.copy_, x) for x, *_ in _inputs(case)], timer, case.device)
    return _copies[case]


def _milliseconds(steps: list[SweepStep], timer: Timer, device: torch.device) -> float:
    """Median time of a step; on CUDA devices without the host, by replays of a graph."""
    for step in steps:
        step()
    count = 1
    if device.type == "cuda":
        once = _timed(steps[-1], timer)
        count = -(-max(1, int(GRAPH_SECONDS / once)) // len(steps)) * len(steps)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(count):
                steps[index % len(steps)]()
        steps = [graph.replay]
        graph.replay()
    rounds = [_timed(steps[index % len(steps)], timer) for index in range(ROUNDS)]
    return 1e3 * statistics.median(rounds) / count


def _timed(step: SweepStep, timer: Timer) -> float:
    timer.mark()
    step()
    timer.mark()
    return timer.read()[-1]


# ---- reading -------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The records of an archive's sweep, from any folder of it; an interrupted last line is left out.

    Raises:
        ValueError: it holds no sweep.
    """
    try:
        with tarfile.open(path) as archive:
            files = [m for m in archive.getmembers() if PurePosixPath(m.name).name == FILE]
            lines = [line for file in files for line in archive.extractfile(file) or ()]
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no archive of a GPU day: {error}") from None
    if not lines:
        raise ValueError(f"{path} holds no {FILE}, or an empty one")
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
