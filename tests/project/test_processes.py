"""Programs of the tests: a fork starts as a fresh interpreter that has imported PyTorch, and ends as it does."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.processes import python

STATE = """
import atexit, json, os, sys, torch
where = os.getcwd(), sys.argv, sys.path, __name__, sys.stdin.read()
ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("tsbn_kernels", "triton", "pytest"))
print(json.dumps([where, ours, dict(sorted(os.environ.items())), torch.get_num_threads()]))
atexit.register(print, "the end")
"""


def test_a_fork_starts_and_ends_as_a_fresh_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSBN_BACKEND", "reference")  # is for this process alone
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")  # is for programs, too
    forked, fresh = (
        python(STATE, path=tmp_path, fresh=fresh, OMP_NUM_THREADS="1", LATER="set") for fresh in (False, True)
    )
    assert (forked.stdout, forked.stderr, forked.returncode) == (fresh.stdout, fresh.stderr, 0)
    assert '"LATER": "set"' in forked.stdout
    assert "TSBN_BACKEND" not in forked.stdout
    assert '"/elsewhere"' in forked.stdout
    assert forked.stdout.endswith("the end\n")


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("raise OSError('wrong')", 1, "OSError: wrong\n"),
    ],
)
def test_how_a_program_ends_is_told(program: str, status: int, said: str) -> None:
    done = python(program)
    assert done.returncode == status
    assert done.stderr.endswith(said)


def test_a_program_leaves_nothing_to_the_next() -> None:
    assert python("import tsbn_kernels, os; os.environ['LEFT'] = '1'").returncode == 0
    assert python("import sys, os; sys.exit('tsbn_kernels' in sys.modules or 'LEFT' in os.environ)").returncode == 0
