"""The operators of the CUDA backend, whose launches the PTX machine makes at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from cuda_machine import H100, KERNEL_DTYPES, POINTERS, dx_of_fan_out, parameters
from cuda_source import ptx
from torch import Tensor

from tools.ptxvm import Out, Report, launch
from tsbn_kernels.backends.cuda import batch_norm, launches
from tsbn_kernels.backends.plan import Device
from tsbn_kernels.backends.plan import cuda as rules
from tsbn_kernels.backends.plan.slots import PASSES

DTYPES = {launches.code(dtype): name for dtype, name in KERNEL_DTYPES.items()}
ACCESSES = "rows", "columns", "scalar"


class Machine:
    """Makes launches in the PTX machine; memory that a launch does not complete holds NaN before it.

    Args:
        target: of the PTX.
        code: PTX of some kernels, None for that of all.
        schedule: of blocks and warps.

    Attributes:
        reports: of the launches.
        plans: that were made.
    """

    def __init__(self, target: int, code: str | None, schedule: str | int) -> None:
        self.target, self.code, self.schedule = target, code, schedule
        self.reports: list[Report] = []
        self.plans: list[rules.CudaPlan] = []

    def launch(
        self, name: str, kernel: list[int], numbers: list[int], eps: float, slope: float, operands: launches.Operands
    ) -> None:
        """Stands for :func:`tsbn_kernels.backends.cuda.launches.launch`."""
        dtype, access, which, blocks, threads, cluster, shared, together = kernel
        phases, training = numbers[:2]
        assert name == PASSES[which]
        keys = name == "mixed_keys"
        given: dict[str, Any] = operands._asdict()
        if phases & rules.SPILL:
            _poison(operands.partial)
        written = {
            "out": phases & rules.APPLY or (phases & rules.REDUCE and not training),
            "dresidual": True,
            "first": keys or (phases != rules.REDUCE | rules.SPILL and "mixed" not in name),
        }
        written["second"] = written["first"]
        for operand, complete in written.items():
            if given[operand] is not None and complete:
                given[operand] = Out(given[operand])
        if "fan_out" in name and training and operands.out is not None:
            first = rules.SPILL if phases == rules.APPLY else phases
            given["out"] = dx_of_fan_out(operands.out, first, operands.staged is not None)
        pointers = [0 if given[name] is None else given[name] for name in POINTERS]
        struct = parameters(pointers, numbers, eps, slope, operands.momentum)
        entry = f"tsbn_{name}{'_together' * together}_{DTYPES[dtype]}" + ("" if keys else f"_{ACCESSES[access]}")
        text = self.code or ptx(self.target)
        options: dict[str, Any] = {"cluster": cluster, "shared": shared, "schedule": self.schedule}
        options["cooperative"] = bool(together)
        self.reports.append(launch(text, entry, blocks, threads, [struct], **options))


def _poison(tensor: Tensor | None) -> None:
    if tensor is not None:
        tensor.fill_(255)  # NaN


@contextmanager
def obedient(
    target: int = 90, code: str | None = None, schedule: str | int = "forward", device: Device = H100
) -> Iterator[Machine]:
    """Lets the operators of the backend launch in a machine."""
    machine, prepare = Machine(target, code, schedule), batch_norm._prepare

    def observed(*arguments: Any) -> batch_norm.Pass:
        found = prepare.__wrapped__(*arguments)
        machine.plans.append(found.plan)
        return found

    with (
        mock.patch.object(launches, "launch", machine.launch),
        mock.patch.object(launches, "device_of", return_value=device),
        mock.patch.object(batch_norm, "clusters", return_value=rules.clusters_on_paper),
        mock.patch.object(batch_norm, "_prepare", observed),
    ):
        yield machine
