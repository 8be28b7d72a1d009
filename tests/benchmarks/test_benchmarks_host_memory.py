"""Freed memory of the host: kept or returned, and what the records say of it."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from support.synthetic import simulated_run

from benchmarks.records.groups import machine
from benchmarks.timing import environment, host_memory

needs_mallopt = pytest.mark.skipif(not host_memory.can_keep(), reason="the C library has no mallopt")
PAGES = 10240  # of a step, in pages of 4 KiB: 40 MiB, over glibc's largest limit for what it keeps by itself


def page_faults_of_a_step(code):
    """In a process of its own, for the setting is the process's."""
    program = f"""
        import resource
        import torch
        from benchmarks.timing import host_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty({PAGES} * 4096, dtype=torch.uint8).fill_(1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        faults()
    """
    program = textwrap.dedent(program) + textwrap.dedent(code)
    return [int(word) for word in subprocess.check_output([sys.executable, "-c", program], text=True).split()]


@needs_mallopt
def test_kept_memory_is_faulted_no_more():
    kept, released, after = page_faults_of_a_step("""
        with host_memory.keep_freed():
            kept = [faults() for _ in range(20)][-1]
            host_memory.release()
            released = faults()
        print(kept, released, faults())
    """)
    assert kept < PAGES / 20
    assert released > PAGES / 2
    assert after > PAGES / 2


@needs_mallopt
def test_nothing_is_kept_unasked():
    (returned,) = page_faults_of_a_step("""
        with host_memory.keep_freed(False):
            faults()
            print(faults())
    """)
    assert returned > PAGES / 2


def test_what_cannot_be_told_is_not_said(monkeypatch):
    monkeypatch.setattr(host_memory, "can_keep", lambda: False)
    with host_memory.keep_freed():
        assert host_memory.policy() == "returned"


@needs_mallopt
def test_records_say_what_happened_to_freed_memory():
    cpu, record = torch.device("cpu"), simulated_run()[0]
    with host_memory.keep_freed():
        kept = environment.versions(cpu)
    returned = environment.versions(cpu)
    assert (kept["freed_memory"], returned["freed_memory"]) == ("kept", "returned")
    assert machine(replace(record, versions=kept)) + ", fresh memory" == machine(replace(record, versions=returned))
