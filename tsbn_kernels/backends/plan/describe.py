"""Plans as a table for a person, and what their fused passes spare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tsbn_kernels.backends.plan.core import Plan
from tsbn_kernels.backends.plan.expect import COPY, expected
from tsbn_kernels.backends.plan.work import Work


def table(plans: Sequence[Plan], bandwidth: float | None = None, unfused: Sequence[int] | None = None) -> str:
    """One column for each plan: what it launches, what it needs on chip, what it moves, how long that should take.

    The plans are of one activation on one device, ``bandwidth`` is in bytes a second (None: the data sheet's), and
    ``unfused`` are the bytes of :func:`unfused_bytes`.
    """
    rate = bandwidth or plans[0].device.bandwidth
    rows = {"": [plan.work.title for plan in plans]}
    for plan in plans:
        for name, value in _facts(plan, rate).items():
            rows.setdefault(name, []).append(value)
    if unfused is not None:
        fused = [plan.bytes_read + plan.bytes_written for plan in plans]
        pairs = zip(fused, unfused, strict=True)
        rows["bytes unfused"] = [f"{_bytes(apart)} (fused {1 - one / apart:.0%} fewer)" for one, apart in pairs]
    widths = [max(len(row[k]) for row in rows.values()) for k in range(len(plans))]
    lines = [
        f"{name:18}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows.items()
    ]
    return "\n".join(line.rstrip() for line in [_heading(plans[0], rate), "", *lines])


def _heading(plan: Plan, rate: float) -> str:
    work, device = plan.work, plan.device
    fused = ["one input for all tasks"] * work.fan_out + ["residual"] * work.residual
    fused += [work.activation] * (work.activation != "none")
    more = "".join(f", {what}" for what in fused)
    return (
        f"{work.layout}, {work.item_size} bytes a value, {work.form}, {_bytes(work.activation_bytes)}"
        f"{more}\n"
        f"{device.name} ({device.target}, {device.multiprocessors} multiprocessors) at {rate / 1e12:.2f} TB/s; "
        f"times are predicted from the bytes, nothing was measured;\n"
        f"what is expected counts a copy's {COPY:.0%}, waves, loads in flight, waits for sums, and launches too"
    )


def _facts(plan: Plan, rate: float) -> dict[str, str]:
    moved = plan.bytes_read + plan.bytes_written
    found = expected(plan, rate)
    waves = plan.programs / (plan.device.multiprocessors * plan.resident_programs)
    return {
        "backend": plan.backend,
        "variant": plan.variant,
        "launches": str(plan.launches),
        "programs": f"{plan.programs:,}",
        "threads": f"{plan.threads} ({plan.warps} warps)",
        "tile": f"{plan.tile[0]} x {plan.tile[1]}",
        "tiles of a slab": f"{plan.tiles:,}" + (f" in {plan.splits} splits" if plan.splits > 1 else ""),
        "on chip": f"{plan.on_chip:.0%} between two passes",
        "registers": f"at most {plan.registers} a thread",
        "shared memory": f"at most {plan.shared_bytes:,} B",
        "programs resident": f"{plan.resident_programs} a multiprocessor",
        "bytes read": _bytes(plan.bytes_read),
        "bytes written": _bytes(plan.bytes_written),
        "useful bytes": f"{_bytes(plan.work.useful_bytes)} ({plan.work.useful_bytes / moved:.0%})",
        "predicted time": f"{plan.seconds(rate) * 1e3:.3g} ms",
        "waves": f"{waves:.3g} ({found.filled:.0%} filled)",
        "loads in flight": f"{found.flowing:.0%} of what memory takes",
        "exchanges": f"{plan.exchanges} ({found.busy:.0%} busy)",
        "expected time": f"{found.seconds * 1e3:.3g} ms",
        "of the bandwidth": f"{found.fraction:.0%} is used",
    }


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def layer_alone(work: Work) -> Work:
    """The work without what is fused with it; of one input for all tasks each task has a view."""
    alone = replace(work, activation="none", residual=False, needs_dresidual=False, fan_out=False)
    return replace(alone, expanded=work.expanded or work.fan_out)


def unfused_bytes(alone: Plan, work: Work) -> int:
    """Bytes that a sequence of passes loads and stores, the layer's own by the plan ``alone``."""
    activation = work.activation_bytes
    moved = alone.bytes_read + alone.bytes_written
    if work.residual and not work.backward:
        moved += 3 * activation  # two are read; the gradient of a sum is that of its terms
    if work.activation != "none":
        moved += (3 if work.backward else 2) * activation  # backward dy and what the activation kept
    if work.gathers and work.needs_dx:
        moved += activation + work.input_bytes  # the tasks' gradients are added up
    return moved
