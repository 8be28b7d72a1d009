"""Layers that several threads use at once."""

from __future__ import annotations

import pytest
from support.processes import python_output

PROGRAM = """
import faulthandler, itertools, sys, threading
faulthandler.dump_traceback_later(60, exit=True)  # a thread that waits for Python's lock lets no other run either
import torch
from tsbn_kernels import FusedTSigmaBN2d, FusedTSigmaLN, hold_absent_tasks

torch.set_num_threads(1)
sys.setswitchinterval(1e-5)
kind, held = {kind!r}, {held}
x = torch.randn(6, 2, 2, 2)
layer = FusedTSigmaBN2d(3, 2) if kind == "batch" else FusedTSigmaLN(3, 2)
x = x if kind == "batch" else x.movedim(1, -1)
if held:
    hold_absent_tasks(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
index = torch.tensor([0, 1, 2, 0, 1, 2])
functions = lambda: layer(x), lambda: layer(x, task_of_sample=index)  # that get the parameters themselves
operators = lambda: layer(x[:2], tasks=[1]), lambda: layer.gates
# An output that is kept would keep the parameters' nodes, and nothing would wait.
for calls in itertools.product(functions, operators):
    threads = [threading.Thread(target=lambda call=call: [call().shape for _ in range(2000)]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("done")
"""


@pytest.mark.parametrize(("kind", "held"), [("batch", False), ("batch", True), ("layer", False)])
def test_threads_do_not_wait_for_each_other(kind: str, held: bool) -> None:
    """All the operators that a layer applies to its parameters, at once: see :mod:`tsbn_kernels.layers.concurrent`."""
    assert python_output(PROGRAM.format(kind=kind, held=held)) == "done\n"
