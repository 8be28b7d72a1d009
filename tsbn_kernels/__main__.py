"""``python -m tsbn_kernels``: which backends are usable here, and which one runs on which device."""

from __future__ import annotations

import os

import torch

from tsbn_kernels import __version__, backends, memory


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def main() -> None:
    """Prints the report."""
    print(f"tsbn-kernels {__version__}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    for backend in backends.backends():
        state = "available" if backend.available else "missing"
        print(f"  {backend.name:10} {state:10} {backend.detail}")
    reason = "forced by TSBN_BACKEND" if os.environ.get("TSBN_BACKEND") else "the first that is available"
    for device in _devices():
        try:
            print(f"{device} tensors run on: {backends.select(device)} ({reason})")
        except RuntimeError as error:
            print(f"{device} tensors: {error}")
    print(f"reused memory for large CPU outputs: at most {memory.cache_limit() >> 20} MiB idle")


if __name__ == "__main__":
    main()
