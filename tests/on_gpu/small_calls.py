"""``python -m on_gpu.small_calls BACKEND DEVICE`` makes a small call of each kind of launch, to be run under a tool."""

from __future__ import annotations

import sys

from on_gpu import kinds
from on_gpu.calls import check

MOST_ELEMENTS = 2**17
DONE = "all calls were made"


def main(backend: str, device: str) -> None:
    """One call of each kind that is small enough."""
    for spec in kinds.planned(backend, device):
        if spec.elements <= MOST_ELEMENTS:
            print(spec.name, flush=True)
            check(spec.call(), backend, device, sums=spec.sums)
    print(DONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
