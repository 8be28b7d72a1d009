"""What there is on this machine, in the summary of the check; and whether a layer runs there with nothing forced."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.gpu_day.facts import FACTS


@pytest.mark.facts
@pytest.mark.parametrize("name", FACTS)
def test_fact(device: str, name: str, record_property: Callable[[str, Any], None]) -> None:
    record_property(name, json.loads(json.dumps(FACTS[name](device), default=str)))
