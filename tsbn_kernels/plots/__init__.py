"""Pictures of what :mod:`tsbn_kernels.analysis` finds, in one style; they need the extra ``plots``.

Every function gives a ``matplotlib`` figure, which nothing else holds: ``figure.savefig("importance.png")``. They are
made for two tasks to forty. Colours are told apart by people who do not see all of them.
"""

try:
    import matplotlib as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("tsbn_kernels.plots needs Matplotlib: python -m pip install 'tsbn-kernels[plots]'") from error

from tsbn_kernels.plots.bars import capacity_bars, specialized_by_depth
from tsbn_kernels.plots.histograms import conflict_histograms, gate_histograms
from tsbn_kernels.plots.maps import drops_map, importance_map, similarity_map, together_map
from tsbn_kernels.plots.report import write_report
from tsbn_kernels.plots.tasks import task_graph, task_points

__all__ = [
    "capacity_bars",
    "conflict_histograms",
    "drops_map",
    "gate_histograms",
    "importance_map",
    "similarity_map",
    "specialized_by_depth",
    "task_graph",
    "task_points",
    "together_map",
    "write_report",
]
