"""What a multi-task network has learnt, read from its gates: who uses what, who is alike, who stands in whose way.

Every function that reads gates takes a model, the state of one, an :class:`Importance`, or a matrix ``[T, F]``. They
compute in float64 on the CPU, draw nothing (:mod:`tsbn_kernels.plots` does), and need PyTorch alone, but for
:func:`cluster_tasks`, which needs SciPy.

A model's layers are its modules with ``gates``: those of this package, and a user's own. ``gates`` is a floating-point
tensor ``[T, *]``, the factors that each task multiplies its normalised activation by. What lies inside such a module is
not looked at.
"""

from tsbn_kernels.analysis.checkpoints import load_state
from tsbn_kernels.analysis.clusters import Clusters, cluster_tasks
from tsbn_kernels.analysis.conflicts import Conflicts, gradient_conflicts
from tsbn_kernels.analysis.decomposition import Capacity, capacity
from tsbn_kernels.analysis.gates import Importance, Source, importance
from tsbn_kernels.analysis.likeness import rank_correlations, similarity, similarity_by_layer, stability
from tsbn_kernels.analysis.pruning import specialization_test
from tsbn_kernels.analysis.representations import task_representations
from tsbn_kernels.analysis.specialised import Specialized, specialized_filters

__all__ = [
    "Capacity",
    "Clusters",
    "Conflicts",
    "Importance",
    "Source",
    "Specialized",
    "capacity",
    "cluster_tasks",
    "gradient_conflicts",
    "importance",
    "load_state",
    "rank_correlations",
    "similarity",
    "similarity_by_layer",
    "specialization_test",
    "specialized_filters",
    "stability",
    "task_representations",
]
