"""Plans as a table for a person."""

from __future__ import annotations

from collections.abc import Sequence

from tsbn_kernels.backends.plan.core import Plan


def table(plans: Sequence[Plan], bandwidth: float | None = None, unfused: Sequence[int] | None = None) -> str:
    """One column for each plan: what it launches, what it needs on chip, what it moves, how long that should take.

    Args:
        plans: of passes over one activation on one device.
        bandwidth: bytes a second; None for the data sheet's.
        unfused: bytes of the same without fusion, see :func:`tsbn_kernels.backends.plan.unfused.unfused_bytes`.
    """
    rate = bandwidth or plans[0].device.bandwidth
    rows = {"": [_pass_name(plan) for plan in plans]}
    for plan in plans:
        for name, value in _facts(plan, rate).items():
            rows.setdefault(name, []).append(value)
    if unfused is not None:
        rows["bytes unfused"] = [_spared(plan, count) for plan, count in zip(plans, unfused, strict=True)]
    widths = [max(len(row[k]) for row in rows.values()) for k in range(len(plans))]
    lines = [
        f"{name:18}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows.items()
    ]
    return "\n".join(line.rstrip() for line in [_heading(plans[0], rate), "", *lines])


def _heading(plan: Plan, rate: float) -> str:
    work, device = plan.work, plan.device
    sizes = [work.tasks, work.samples, work.channels, work.positions]
    fused = ["one input for all tasks"] * work.fan_out + ["residual"] * work.residual
    fused += [work.activation] * (work.activation != "none")
    more = "".join(f", {what}" for what in fused)
    return (
        f"[T, N, C, S] = {sizes}, {work.item_size} bytes a value, {work.family}, {_bytes(work.activation_bytes)}"
        f"{more}\n"
        f"{device.name} ({device.target}, {device.multiprocessors} multiprocessors) at {rate / 1e12:.2f} TB/s; "
        f"times are predicted from the bytes, nothing was measured"
    )


def _pass_name(plan: Plan) -> str:
    return f"{plan.work.direction} {'training' if plan.work.training else 'evaluation'}"


def _facts(plan: Plan, rate: float) -> dict[str, str]:
    moved = plan.bytes_read + plan.bytes_written
    return {
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
    }


def _spared(plan: Plan, unfused: int) -> str:
    return f"{_bytes(unfused)} (fused {1 - (plan.bytes_read + plan.bytes_written) / unfused:.0%} fewer)"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"
