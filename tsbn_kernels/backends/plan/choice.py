"""Which of two GPU backends makes a call: the one whose plans take less time. Pure functions; predicted, not measured.

Time is that of the bytes of activations, and of the launches: large passes are decided by how often they read, small
ones by how often they launch. Vectors and partial sums are left out, since they come from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tsbn_kernels.backends.plan import cuda, layer_norm, layer_norm_cuda, triton
from tsbn_kernels.backends.plan.core import LAUNCH_SECONDS, Plan
from tsbn_kernels.backends.plan.devices import Device
from tsbn_kernels.backends.plan.work import Work

MARGIN = 0.95  # of the time of the backend before it: with less to gain than the rest the order stays
# Of a call on the host, which shorter kernels wait for, and of an operator of PyTorch beside it: assumed.
HOST_SECONDS = {"triton": 35e-6, "cuda": 70e-6}
OPERATOR_SECONDS = 20e-6
TRACKING = 4  # operators by which running statistics are updated, where the kernels do not


@dataclass(frozen=True)
class Offer:
    """How a backend would do some work.

    Attributes:
        plans: one after the other.
        beside: operators of PyTorch that it calls beside its kernels.
    """

    backend: str
    plans: tuple[Plan, ...]
    beside: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of activations that are read and written."""
        return sum(plan.activation_bytes_read + plan.activation_bytes_written for plan in self.plans)

    @property
    def launches(self) -> int:
        """Kernels that are launched, those of PyTorch too."""
        return sum(plan.launches for plan in self.plans) + self.beside

    @property
    def seconds(self) -> float:
        """Predicted time: that of the device, or of the host where it takes longer."""
        device = self.bytes / self.plans[0].device.bandwidth + self.launches * LAUNCH_SECONDS
        return max(device, HOST_SECONDS[self.backend] + self.beside * OPERATOR_SECONDS)


def offers(
    work: Work, device: Device, clusters: cuda.Clusters = cuda.clusters_on_paper, tracks: bool = False
) -> tuple[Offer, ...]:
    """What backends offer that can do the work on the device, in the order in which they are preferred.

    That is Triton first, but not by a cluster: CUDA C++ asks the driver how many of its clusters a GPU runs, and waits
    less in them.

    Args:
        clusters: as for :func:`tsbn_kernels.backends.plan.cuda.plan`.
        tracks: whether the layer has running statistics. In training kernels update them, but Triton's not in float64.
    """
    updates = tracks and work.training and not work.backward
    found = []
    for backend in ("triton", *["cuda"] * device.target.startswith("sm_")):
        try:
            plans = plans_of(backend, work, device, clusters)
        except ValueError:  # nothing of the backend fits
            continue
        beside = updates and backend == "triton" and work.item_size == 8
        found.append(Offer(backend, plans, TRACKING * beside))
    return tuple(sorted(found, key=lambda one: one.backend == "triton" and one.plans[0].variant == "cluster"))


def plans_of(
    backend: str, work: Work, device: Device, clusters: cuda.Clusters = cuda.clusters_on_paper
) -> tuple[Plan, ...]:
    """The plans of a backend that do the work, one after the other.

    Raises:
        ValueError: it has none.
    """
    if isinstance(work, layer_norm.LayerWork):
        return layer_norm_cuda.plans(work, device) if backend == "cuda" else layer_norm.plans(work, device)
    return (cuda.plan(work, device, clusters) if backend == "cuda" else triton.plan(work, device),)


def best(offered: Sequence[Offer]) -> Offer:
    """The first offer, or a later one that takes less time than it by more than a twentieth."""
    first, *later = offered
    return min([first, *(one for one in later if one.seconds < MARGIN * first.seconds)], key=lambda one: one.seconds)


def reason(offered: Sequence[Offer]) -> str:
    """Which one was chosen and why, for people."""
    chosen = best(offered)
    if len(offered) == 1:
        return f"{chosen.backend}, which alone has a plan"
    (other,) = (one for one in offered if one is not chosen)
    return (
        f"{chosen.backend}, {chosen.seconds * 1e3:.3g} ms; {other.backend} would take {other.seconds * 1e3:.3g} ms: "
        f"{other.bytes / chosen.bytes:.3g} times the bytes, launches {other.launches} instead of {chosen.launches}"
    )
