"""Runs the kernels of layer normalisation in the PTX machine as the operators would launch them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from cuda_machine import H100, KERNEL_DTYPES, POINTERS, name_of, parameters
from cuda_source import ptx
from support.layer_problems import LayerProblem, LayerResults
from torch import Tensor

from tools.ptxvm import Out, Report, launch
from tsbn_kernels.backends.plan import Device
from tsbn_kernels.backends.plan import layer_norm_cuda as rules
from tsbn_kernels.backends.plan.cuda import DTYPE_CODES
from tsbn_kernels.backends.plan.layer_norm import LayerWork, work_of
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.batch_norm import accumulate_dtype
from tsbn_kernels.definition.options import LayerNeeds, LayerOptions

ALL = LayerNeeds(True, True, True)


class Launched(NamedTuple):
    """What a pass did: a report of each launch, and its plans."""

    reports: list[Report]
    plans: tuple[rules.CudaLayerPlan, ...]

    @property
    def counted(self) -> tuple[int, int]:
        """Bytes of global memory read and written."""
        read = sum(report.global_read.bytes for report in self.reports)
        return read, sum(report.global_written.bytes for report in self.reports)

    @property
    def planned(self) -> tuple[int, int]:
        """What the plans claim of them."""
        return sum(plan.bytes_read for plan in self.plans), sum(plan.bytes_written for plan in self.plans)


class Machine:
    """The kernels on a device on paper.

    Args:
        target: of the PTX.
        code: PTX of some kernels, None for that of all.
        schedule: of blocks and warps.
        device: for which passes are planned.
    """

    def __init__(
        self, target: int = 90, code: str | None = None, schedule: str | int = "forward", device: Device = H100
    ) -> None:
        self.target, self.code, self.schedule, self.device = target, code, schedule, device

    def forward(self, p: LayerProblem) -> tuple[dict[str, Tensor | None], Launched]:
        """Y, s, mean and rstd by their names."""
        options = options_of(p)
        work = work_of(p.x, p.weight, options, bias=p.bias is not None, residual=p.residual is not None)
        rstd = torch.empty(p.x.numel() // p.weight[0].numel(), dtype=accumulate_dtype(p.x.dtype))
        found = {
            "y": p.x.new_empty(layout.output_shape(p.x, options)),
            "s": None if p.residual is None else torch.empty_like(p.x),
            "mean": None if p.rms else torch.empty_like(rstd),
            "rstd": rstd,
        }
        arrays = {
            "x": p.x,
            "residual": p.residual,
            "out": found["y"],
            "dresidual": found["s"],
            "weight": p.weight,
            "bias": p.bias,
            "first": found["mean"],
            "second": rstd,
        }
        return found, self._run(p, work, arrays)

    def backward(
        self, p: LayerProblem, s: Tensor, mean: Tensor | None, rstd: Tensor, needs: LayerNeeds = ALL
    ) -> tuple[dict[str, Tensor | None], Launched]:
        """The gradients by their names."""
        ds = p.ds if needs.dx else None
        work = work_of(s, p.weight, options_of(p), needs, residual=ds is not None)
        found = {
            "dx": torch.empty_like(s) if needs.dx else None,
            "dweight": torch.empty_like(p.weight) if needs.dweight else None,
            "dbias": torch.empty_like(p.weight) if needs.dbias else None,
        }
        arrays = {
            "x": s, "dy": p.dy, "residual": ds, "out": found["dx"], "weight": p.weight, "mean": mean, "var": rstd,
            "first": found["dweight"], "second": found["dbias"],
        }  # fmt: skip
        return found, self._run(p, work, arrays)

    def both(self, p: LayerProblem, needs: LayerNeeds = ALL) -> tuple[LayerResults, Launched, Launched]:
        """Both passes, as the operators return them."""
        there, first = self.forward(p)
        s = p.x if there["s"] is None else there["s"]
        assert there["rstd"] is not None
        back, second = self.backward(p, s, there["mean"], there["rstd"], needs)
        empty = p.x.new_empty(0)
        return LayerResults(*(empty if t is None else t for t in (*there.values(), *back.values()))), first, second

    def _run(self, p: LayerProblem, work: LayerWork, arrays: dict[str, Tensor | None]) -> Launched:
        aligned = all(
            t is None or t.storage_offset() * t.element_size() % 16 == 0
            for t in (arrays.get(name) for name in ("x", "dy", "residual", "out", "dresidual"))
        )
        plans = rules.plans(work, self.device, aligned)
        return Launched([report for plan in plans for report in self._launch(plan, p, dict(arrays))], plans)

    def _launch(self, plan: rules.CudaLayerPlan, p: LayerProblem, arrays: dict[str, Any]) -> list[Report]:
        work, dtype = plan.work, p.x.dtype
        if work.backward:
            for name, needed in (("out", work.needs_dx), ("first", work.needs_dweight), ("second", work.needs_dbias)):
                arrays[name] = arrays[name] if needed else None
            arrays["residual"] = arrays["residual"] if work.needs_dx else None
        direction = "backward" if work.backward else "forward"
        rows = f"tsbn_layer_norm_{direction}_{KERNEL_DTYPES[dtype]}_{plan.access}"
        results = "out", "first", "second", "dresidual"
        given = {name: Out(t) if name in results and t is not None else t for name, t in arrays.items()}
        if not plan.merges:
            return [self._one(plan, p, given, rows, plan.programs, plan.threads, plan.shared_bytes)]
        partial = torch.full((plan.partial_bytes,), 255, dtype=torch.uint8)  # NaN
        first = given | {"first": None, "second": None, "partial": Out(partial)}
        reports = [self._one(plan, p, first, rows, plan.programs, plan.threads, plan.shared_bytes)]
        second = given | {"out": None, "partial": partial}
        wide = "f64" if dtype == torch.float64 else "f32"
        name = f"tsbn_layer_norm_parameters_{wide}"
        return [*reports, self._one(plan, p, second, name, plan.merging_programs, rules.THREADS, 0)]

    def _one(
        self,
        plan: rules.CudaLayerPlan,
        p: LayerProblem,
        arrays: dict[str, Any],
        kernel: str,
        blocks: int,
        threads: int,
        shared: int,
    ) -> Report:
        channels = plan.work.channels
        vectors = [(0, 0, 0) if v is None else (DTYPE_CODES[name_of(v)], channels, 1) for v in (p.weight, p.bias)]
        values = rules.numbers(plan, p.gate == "sigmoid", tuple(k for v in vectors for k in v))
        pointers = [0 if arrays.get(name) is None else arrays[name] for name in POINTERS]
        struct = parameters(pointers, values, p.eps, 1 / channels)
        text = self.code or ptx(self.target, "layer_norm.cu")
        return launch(text, kernel, blocks, threads, [struct], shared=shared, schedule=self.schedule)


def options_of(p: LayerProblem) -> LayerOptions:
    """The options of a problem."""
    return LayerOptions(len(p.weight), p.eps, p.gate, p.stacking, p.rms, p.fan_out)
