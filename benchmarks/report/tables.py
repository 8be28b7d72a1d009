"""The tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.records.groups import groups
from benchmarks.records.intervals import CONFIDENCE, Interval
from benchmarks.records.network_run import VARIANTS, NetworkRun
from benchmarks.records.record import FASTEST, FORWARD, PASSES, Means, Record


def milliseconds(value: float) -> str:
    """Milliseconds with three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _within(value: float | None, interval: Interval | None) -> str:
    """A ratio and its interval."""
    return _times(value) + ("" if interval is None else f" ({interval.low:.2g}-{interval.high:.2g})")


def _took(median: float, iqr: float, outliers: int | None) -> str:
    """Milliseconds, with a star for each outlier."""
    return f"{milliseconds(median)} ± {milliseconds(iqr)}" + "*" * (outliers or 0)


def layers_table(records: Sequence[Record]) -> Table:
    """A line for each layer, dtype, memory format and implementation, both passes side by side."""
    table = Table(
        title="Layers: median ± interquartile range; in copies of the activation; speed-up over the loop",
        caption="a star: a round that lies further from the quartiles than 1.5 interquartile ranges",
    )
    for name in ("layer", "shape", "dtype", "format", "impl"):
        table.add_column(name)
    for name in PASSES:
        short = "fwd" if name == FORWARD else "fwd+bwd"
        for unit in ("ms", "copies", "vs loop", "of copy bw"):
            table.add_column(f"{short}\n{unit}", justify="right")
    by_case: dict[tuple[object, ...], dict[str, dict[str, Record]]] = {}
    for record in records:
        case = by_case.setdefault((record.layer, record.shape, record.dtype, record.memory_format), {})
        case.setdefault(record.impl, {})[record.pass_] = record
    for (layer, shape, dtype, memory_format), impls in by_case.items():
        first = [str(layer), "x".join(str(size) for size in shape), str(dtype), str(memory_format)]  # type: ignore[attr-defined]
        for impl, passes in impls.items():
            cells = []
            for name in PASSES:
                measured = passes.get(name)
                if measured is None:
                    cells += ["-"] * 4
                    continue
                cells += [
                    _took(measured.median_ms, measured.iqr_ms, measured.outliers),
                    f"{measured.copies:.1f}",
                    _times(measured.speedup_over_loop),
                    f"{measured.fraction_of_copy_bandwidth:.2f}",
                ]
            table.add_row(*first, impl, *cells, style="bold green" if impl == "fused" else None)
            first = ["", "", "", ""]
        table.add_section()
    return table


def means_table(rows: Sequence[Means]) -> Table:
    """The speed-ups of the fused layer, geometric means over the network's layers."""
    table = Table(
        title="Fused layer: geometric means over the layers (a shape that two layers have counts twice), and the "
        f"intervals that hold them with {CONFIDENCE:.0%}, from the spread of the visits"
    )
    for name in ("pass", "dtype", "format"):
        table.add_column(name)
    headers = (
        "layers",
        "vs loop",
        "vs ReLU\nbehind it",
        "vs fastest peer\nof each layer",
        "vs fastest peer\nover all layers",
        "of copy bw",
    )
    for name in headers:
        table.add_column(name, justify="right")
    for row in rows:
        of = row.intervals.get
        single = "-"
        if row.single_fastest is not None:
            single = f"{_within(row.over_single_fastest, of(row.single_fastest))} {row.single_fastest}"
        ratios = (
            _within(row.over_loop, of("loop")),
            _within(row.over_separate, of("separate")),
            _within(row.over_fastest, of(FASTEST)),
            single,
            f"{row.bandwidth:.2f}",
        )
        table.add_row(row.pass_, row.dtype, row.memory_format, str(row.layers), *ratios)
    return table


def network_table(run: NetworkRun) -> Table:
    """Time and memory of a training step of the whole network."""
    result = run.comparison
    table = Table(
        title=f"Training step of the network, {run.tasks} tasks, batch {run.batch}, float32, {run.source}",
        caption=f"loss {result.losses['loop']:.6f} (leaky: {result.losses['loop, leaky']:.6f}); differences are those "
        f"of the first step from the loop's: of the loss, and of a gradient relative to its norm, the largest",
    )
    table.add_column("norm")
    for name in (
        "ms",
        "vs loop",
        "peak memory\nof the step",
        "of the\nloop's",
        "loss\ndifference",
        "gradient\ndifference",
    ):
        table.add_column(name, justify="right")
    for variant, summary in result.times.items():
        loop = VARIANTS[variant].reference
        speedup = result.times[loop].ratio(summary)
        peak, of = result.peak_bytes[variant], result.differences[variant]
        table.add_row(
            variant,
            _took(summary.median * 1e3, summary.iqr * 1e3, summary.outliers),
            "1"
            if variant == loop
            else _within(speedup.middle if speedup else result.times[loop].median / summary.median, speedup),
            f"{peak / 2**20:.0f} MiB",
            f"{peak / result.peak_bytes[loop]:.2f}",
            *(("-", "-") if variant == loop else (f"{of.loss:.1e}", f"{of.gradient_relative:.1e}")),
        )
    return table


def show(console: Console, records: Sequence[Record], network: NetworkRun | None) -> None:
    """Prints everything that was measured."""
    layers = [record for record in records if record.pass_ in PASSES]
    if layers:
        console.print(layers_table(layers))
    for one in groups(layers):
        if one.means:
            console.print(means_table(one.means))
    if network is not None:
        console.print(network_table(network))
