"""Which kernels ran, as far as records tell: on a CPU the instruction set, on a GPU the plan, computed anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from rich.table import Table

from benchmarks.profile.predict import DIRECTIONS, work_of
from benchmarks.records.groups import BY_PLAN, backend_of
from benchmarks.records.record import FORWARD, Record
from benchmarks.records.workloads import BATCH_NORM, ITEM_BYTES, activation_named
from tsbn_kernels.backends.plan import Device, Plan, Work, choice
from tsbn_kernels.backends.plan.devices import by_driver


def _by_plan(work: Work, device: Device) -> tuple[Plan, ...]:
    return choice.best(choice.offers(work, device, tracks=True)).plans


RULES: dict[str, Callable[[Work, Device], tuple[Plan, ...]]] = {
    "triton": partial(choice.plans_of, "triton"),
    "cuda": partial(choice.plans_of, "cuda"),
    BY_PLAN: _by_plan,
}


def plans(records: Sequence[Record]) -> list[tuple[Record, Plan]]:
    """The plan of each pass of batch normalisation, for records of a GPU known on paper that name their tasks."""
    found = []
    for record in records:
        rules, device = RULES.get(backend_of(record)[0]), by_driver(record.device)
        known = record.impl == "fused" and record.pass_ == FORWARD and record.dtype in ITEM_BYTES
        if rules and device and known and record.tasks and record.norm in (None, BATCH_NORM):
            for direction in DIRECTIONS:
                work = work_of(
                    record.shape,
                    record.tasks,
                    record.dtype,
                    record.memory_format,
                    direction,
                    activation_named(record.workload),
                )
                found += [(record, plan) for plan in rules(work, device)]
    return found


def plans_table(rows: Sequence[tuple[Record, Plan]]) -> Table:
    """A line for each pass of each layer."""
    table = Table(title=f"Plans for {rows[0][1].device.name}")
    for name in ("layer", "dtype", "format", "pass", "backend", "variant"):
        table.add_column(name)
    for name in ("launches", "programs", "tile", "on chip", "moved of useful bytes", "predicted ms"):
        table.add_column(name, justify="right")
    for record, plan in rows:
        moved = (plan.bytes_read + plan.bytes_written) / plan.work.useful_bytes
        table.add_row(
            record.layer,
            record.dtype,
            record.memory_format,
            plan.work.direction,
            plan.backend,
            plan.variant,
            str(plan.launches),
            f"{plan.programs:,}",
            f"{plan.tile[0]} x {plan.tile[1]}",
            f"{plan.on_chip:.0%}",
            f"{moved:.2f}",
            f"{plan.seconds() * 1e3:.3g}",
        )
    return table
