"""What kernels should move on a GPU that is known on paper, and how long that should take: predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from rich.table import Table

from benchmarks.records.workloads import ITEM_BYTES, NO_ACTIVATION, NO_FORMAT, Layer
from tsbn_kernels.backends.plan import Device, Plan, Work, choice
from tsbn_kernels.backends.plan import cuda as rules
from tsbn_kernels.backends.plan.expect import expected, reasons
from tsbn_kernels.backends.plan.work import Direction

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def work_of(
    shape: Sequence[int],
    tasks: int,
    dtype: str,
    memory_format: str,
    direction: Direction,
    activation: str = NO_ACTIVATION,
) -> Work:
    """A pass over an activation ``[T*N, C, *]``."""
    samples, channels, *spatial = shape
    return Work(
        tasks,
        samples // tasks,
        channels,
        math.prod(spatial),
        ITEM_BYTES[dtype],
        "columns" if not spatial or memory_format == "channels_last" else "rows",
        direction,
        activation=activation,
    )


def predictions(
    layers: Sequence[Layer], tasks: int, batch: int, dtypes: Sequence[str], formats: Sequence[str], device: Device
) -> list[tuple[str, str, str, Plan, Plan]]:
    """Layer, dtype and format of each pass, with CUDA C++'s streaming plan and the plan that is chosen."""
    found: list[tuple[str, str, str, Plan, Plan]] = []
    for layer, dtype, memory_format, direction in product(layers, dtypes, formats, DIRECTIONS):
        flat = layer.size is None
        if flat and memory_format != formats[0]:
            continue
        work = work_of(layer.shape(tasks, batch), tasks, dtype, memory_format, direction)
        (chosen,) = choice.best(choice.offers(work, device, tracks=True)).plans
        both = rules.plan(work, device, variant="streaming"), chosen
        found.append((layer.name, dtype, NO_FORMAT if flat else memory_format, *both))
    return found


def table(rows: Sequence[tuple[str, str, str, Plan, Plan]], device: Device) -> Table:
    """A line for each pass of each layer."""
    result = Table(
        title=f"predicted for {device.name} at {device.bandwidth / 1e12:.2f} TB/s from the bytes moved, not measured"
    )
    for name in ("layer", "dtype", "format", "pass", "backend", "chosen kernel"):
        result.add_column(name)
    for number in (
        "streaming\nx useful",
        "chosen\nGiB",
        "chosen\nx useful",
        "predicted\nms",
        "expected\nms",
        "of the\nbandwidth",
    ):
        result.add_column(number, justify="right")
    factors = ["What is left of the bandwidth, with waves, exchanges and launches:"]
    for layer, dtype, memory_format, streaming, chosen in rows:
        cells = [layer, dtype, memory_format, chosen.work.direction, chosen.backend, describe(chosen)]
        reads, moved = (plan.bytes_read + plan.bytes_written for plan in (streaming, chosen))
        useful = chosen.work.useful_bytes
        cells += [
            f"{reads / useful:.2f}",
            f"{moved / 2**30:.3g}",
            f"{moved / useful:.2f}",
            f"{chosen.seconds() * 1e3:.3g}",
        ]
        found = expected(chosen)
        result.add_row(*cells, f"{found.seconds * 1e3:.3g}", f"{found.fraction:.0%}")
        factors.append(f"{' '.join(cells[:4])}: {reasons(chosen, found)}")
    result.caption, result.caption_justify = "\n".join(factors), "left"
    return result


def describe(plan: Plan) -> str:
    """``cluster of 8, 88% on chip``."""
    if plan.variant == "split":
        return f"split in {plan.splits}, 2 launches"
    blocks = f"cluster of {plan.cluster}" if plan.cluster > 1 else f"{plan.parts} block" + "s" * (plan.parts > 1)
    return f"{blocks}, {plan.on_chip:.0%} on chip" if plan.on_chip else f"{blocks}, streaming"
