"""Pickles and imports from before the modules had the names that they have."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support.processes import ROOT, python_output


def test_models_of_that_time_load() -> None:
    """They were saved with their inputs and outputs, in evaluation, by the last version with those names."""
    saved = torch.load(ROOT / "tests" / "data" / "models_by_earlier_names.pt", weights_only=False)
    for name, model in saved["models"].items():
        y, wanted = model(saved["inputs"][name]), saved["outputs"][name]
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6, msg=name)
        model.train()(saved["inputs"][name])
    fresh = saved["models"]["multitask"]
    fresh.load_state_dict(saved["state"])


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("modules", "layers.batch_norm"),
        ("multitask", "models.multitask"),
        ("plan", "backends.plan"),
        ("plan.work", "backends.plan.work"),
    ],
)
def test_a_module_has_one_copy(then: str, now: str) -> None:
    earlier = importlib.import_module(f"tsbn_kernels.{then}")
    assert earlier is importlib.import_module(f"tsbn_kernels.{now}")


def test_the_adapter_for_libmtl_is_found() -> None:
    """Its import needs LibMTL."""
    spec = importlib.util.find_spec("tsbn_kernels.integrations.libmtl")
    assert spec is not None
    assert spec.origin == "tsbn_kernels.models.libmtl"


def test_names_of_today_come_first() -> None:
    """In a fresh interpreter, whichever is imported first; a name that never was is not found."""
    program = """
import tsbn_kernels.plan.work as then
import tsbn_kernels.backends.plan.work as now
assert then is now and then.__name__ == "tsbn_kernels.backends.plan.work"
try:
    import tsbn_kernels.plan.missing
except ModuleNotFoundError as error:
    print(error)
"""
    assert "tsbn_kernels.backends.plan.missing" in python_output(program)
