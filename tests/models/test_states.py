"""States of plain models, expanded outside of ``load_state_dict``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.networks import pretrained
from torch import nn

from tsbn_kernels import FusedTSigmaBN2d, convert_model, expand_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")

T, C = 3, 4


@pytest.mark.parametrize("variant", ["ts_sigma_bn", "tsbn"])
@pytest.mark.parametrize("wrap", ["", "compiled", "inside", "meta"])
def test_it_loads_as_the_plain_state_does(wrap: str, variant: Any) -> None:
    plain = pretrained("celeba")
    model = convert_model(pretrained("celeba"), T, variant=variant, exclude=["1"])
    expected = convert_model(pretrained("celeba"), T, variant=variant, exclude=["1"])
    expected.load_state_dict(plain.state_dict())
    state = plain.state_dict()
    if wrap == "inside":
        model, expected = nn.ModuleDict({"net": model}), nn.ModuleDict({"net": expected})
        state = {f"net.{key}": value for key, value in state.items()}
    given: Any = torch.compile(model) if wrap == "compiled" else model.to("meta") if wrap == "meta" else model
    before = {key: value.clone() for key, value in state.items()}
    got = expand_state_dict(given, state)
    assert got.keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(got[key], value), key
        assert torch.equal(state[key], before[key])
    again = expand_state_dict(given, got)
    assert all(again[key] is value for key, value in got.items())


def test_what_a_checkpoint_lacks() -> None:
    plain = nn.Sequential(nn.BatchNorm2d(C, affine=False))
    model = nn.Sequential(FusedTSigmaBN2d(T, C, bias=True, device="meta"))
    got = expand_state_dict(model, plain.state_dict())
    assert {key: value.shape[0] for key, value in got.items()} == dict.fromkeys(model.state_dict(), T)
    assert not any(value.is_meta for value in got.values())


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        expand_state_dict(None, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state_dict must be a dict, got list"):
        expand_state_dict(nn.Linear(1, 1), [])  # type: ignore[arg-type]
