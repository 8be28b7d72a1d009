"""What is read as gates: of models, of states, of files."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from support import ranks
from support.processes import python_output
from support.runs import T, every_layer, late, multitask
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from tsbn_kernels import FusedTSigmaBN2d, FusedTSigmaLN, FusedTSigmaRMSNorm, MultiTaskModel, analysis, shard_tasks
from tsbn_kernels.analysis import Importance, importance, load_state


def same(one: Importance, other: Importance) -> bool:
    return torch.equal(one.matrix, other.matrix) and (one.tasks, one.layers, one.sizes) == (
        other.tasks,
        other.layers,
        other.sizes,
    )


def test_each_layer_has_its_columns_and_each_column_its_filter() -> None:
    model = every_layer()
    found = importance(model)
    assert (found.layers, found.sizes) == (("1", "2", "3", "5"), (4, 4, 4, 4))
    assert found.tasks == ("task 0", "task 1", "task 2")
    assert found.matrix.dtype == torch.float64
    for name, part in found.slices.items():
        gates = model.get_submodule(name).gates.detach().double().flatten(1).abs()
        torch.testing.assert_close(found.matrix[:, part], gates)
        assert torch.equal(found.by_layer()[name].matrix, found.matrix[:, part])
    assert [found.filter(column) for column in (0, 3, 4, 15)] == [("1", 0), ("1", 3), ("2", 0), ("5", 3)]
    for column in (-1, 16):
        with pytest.raises(IndexError, match="out of range for 16 filters"):
            found.filter(column)


def test_the_sign_of_a_scale_is_no_importance() -> None:
    layer = FusedTSigmaBN2d(2, 2, gate="identity")
    layer.weight.data = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    assert importance(layer).matrix.tolist() == [[1.0, 2.0], [0.0, 3.0]]


def test_names_of_tasks() -> None:
    model = multitask()
    assert importance(model).tasks == importance(model.state_dict()).tasks == ("age", "hat", "smile")
    assert importance(nn.Sequential(model)).tasks == ("age", "hat", "smile")
    assert importance(nn.Sequential(model).state_dict(), ["a", "b", "c"]).tasks == ("a", "b", "c")
    for tasks in (["a"], "abc"):
        with pytest.raises(ValueError, match="must name the 3 tasks"):
            importance(model, tasks)


@pytest.mark.parametrize("make", [late, multitask, lambda: FusedTSigmaBN2d(T, 4, gate="identity", bias=True)])
def test_a_state_says_what_its_model_says(make, tmp_path: Path) -> None:
    model = make()
    expected = importance(model)
    torch.save({"step": 3, "model": model.state_dict()}, tmp_path / "model.pt")
    assert same(importance(model.state_dict()), expected)
    assert same(importance(load_state(tmp_path / "model.pt")), expected)
    assert same(importance(copy.deepcopy(model.state_dict())), expected)
    other = make()
    other.load_state_dict(load_state(tmp_path / "model.pt"))
    assert same(importance(other), expected)


def test_a_state_that_says_nothing_is_read_by_shapes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), FusedTSigmaBN2d(T, 4), nn.BatchNorm2d(12), nn.Linear(4, 4), FusedTSigmaBN2d(T, 4)
    )
    assert same(importance(dict(model.state_dict())), importance(model))
    biased = FusedTSigmaBN2d(T, 4, gate="identity", bias=True)
    nn.init.normal_(biased.weight)
    state = dict(nn.Sequential(biased).state_dict())
    with pytest.raises(ValueError, match="gate='sigmoid' or gate='identity', or give the model"):
        importance(state)
    assert same(importance(state, gate="identity"), importance(nn.Sequential(biased)))
    assert torch.equal(importance(state, gate="sigmoid").matrix, torch.sigmoid(biased.weight.detach()).double())


@pytest.mark.parametrize("make", [FusedTSigmaRMSNorm, partial(FusedTSigmaLN, bias=False)])
@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
def test_norms_without_bias_or_statistics_are_named(make, gate: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make(T, 4, gate=gate), nn.Linear(4, T, bias=False))
    nn.init.normal_(model[1].weight)
    assert same(importance(model.state_dict()), importance(model))
    state = dict(model.state_dict())
    with pytest.raises(ValueError, match="name modules by modules="):
        importance(state)
    with pytest.raises(ValueError, match="weights of '1' are gates or their logits"):
        importance(state, modules=["1"])
    assert same(importance(state, modules=["1"], gate=gate), importance(model))


def test_a_weight_that_may_be_of_gates_is_not_passed_by() -> None:
    model = nn.Sequential(FusedTSigmaBN2d(T, 4), FusedTSigmaRMSNorm(T, 4, gate="sigmoid"))
    state = dict(model.state_dict())
    with pytest.raises(ValueError, match=r"whether '1.weight', of shape \[3, 4\], holds the gates .* modules=\[...\]"):
        importance(state)
    assert same(importance(state, modules=["0", "1"], gate="sigmoid"), importance(model))
    assert importance(state, modules=["0"]).layers == ("0",)
    heads = dict(MultiTaskModel(model[1:], {task: nn.Linear(4, 1) for task in "abc"}).state_dict())
    with pytest.raises(ValueError, match=r"whether 'backbone\.1\.weight'"):
        importance(heads)


@pytest.mark.parametrize(
    ("modules", "kind", "message"),
    [("1", TypeError, "modules must be names in a state"), (["2"], ValueError, "the state has no '2.weight'")],
)
def test_bad_modules_are_refused(modules, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        importance(dict(nn.Sequential(FusedTSigmaBN2d(T, 4)).state_dict()), modules=modules)
    with pytest.raises(TypeError, match="and a Linear"):
        importance(nn.Linear(2, 2), modules=["0"])


def test_what_is_no_gate_is_passed_by() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.Linear(3, 3)  # a name that others use too

    model = nn.Sequential(Experts(), FusedTSigmaBN2d(T, 4))
    assert importance(model).layers == ("1",)
    shared = nn.Sequential(model[1], model[1])
    assert importance(shared).layers == ("0",)


class Scalar(nn.Module):
    gates = torch.ones(3)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (nn.Linear(2, 2), ValueError, "Linear has no layer with gates"),
        ({}, ValueError, "dict has no layer with gates"),
        ("model.pt", TypeError, "expected a model, its state, an Importance or a matrix"),
        (torch.ones(3), ValueError, r"floating-point \[T, \*\].*shape \[3\]"),
        (torch.ones(3, 4, dtype=torch.long), ValueError, "torch.int64"),
        (torch.ones(0, 4), ValueError, r"shape \[0, 4\]"),
        (torch.full((2, 2), torch.nan), ValueError, "not all finite"),
        (torch.ones(2, 2, device="meta"), ValueError, "no values"),
        (Scalar(), ValueError, r"shape \[3\]"),
        (nn.Sequential(FusedTSigmaBN2d(2, 3), FusedTSigmaBN2d(4, 3)), ValueError, "2 of '0' and 4 of '1'"),
    ],
)
def test_bad_sources_are_refused(source, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        importance(source)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="gate must be 'sigmoid' or 'identity', got 'tanh'"):
        importance(torch.ones(2, 2), gate="tanh")  # type: ignore[arg-type]
    state = multitask().state_dict()
    del state["backbone.1.weight"]
    with pytest.raises(ValueError, match=r"no 'backbone\.1\.weight'"):
        importance(state)


def test_files_with_several_states_or_none(tmp_path: Path) -> None:
    state = late().state_dict()
    torch.save({"last": state, "more": {"best": state}, "step": 1}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"several states, say which by key: 'last', 'more\.best'"):
        load_state(tmp_path / "two.pt")
    assert same(importance(load_state(tmp_path / "two.pt", "more.best")), importance(state))
    with pytest.raises(ValueError, match="no state at 'ema'; it has 'last'"):
        load_state(tmp_path / "two.pt", "ema")
    torch.save({"step": 1}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="has no state"):
        load_state(tmp_path / "none.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("module.pt", "text.pt"):
        with pytest.raises(ValueError, match="no checkpoint of tensors alone"):
            load_state(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "missing.pt")


def case_sharded(model: nn.Module) -> tuple[Importance, list[Tensor]]:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tasks",))
    sharded = shard_tasks(model, mesh).eval()
    first = sharded.backbone[1]  # type: ignore[union-attr,index]
    seen: list[Tensor] = []

    def metric(_: nn.Module) -> Tensor:
        seen.append(first.gates.full_tensor().detach())
        return seen[-1].sum(1)

    drops = analysis.specialization_test(sharded, metric, 3)
    return importance(sharded), [drops, first.gates.full_tensor().detach()]


def test_a_sharded_model_is_read_whole_by_all_processes() -> None:
    model = multitask()
    expected = importance(model)
    gates = model.backbone[1].gates.detach()  # type: ignore[union-attr,index]
    drops = analysis.specialization_test(model, lambda _: model.backbone[1].gates.sum(1), 3)  # type: ignore[index]
    for found, (sharded_drops, after) in ranks.run(case_sharded, 2, model):
        assert same(found, expected)
        torch.testing.assert_close(sharded_drops, drops)
        assert torch.equal(after, gates)


def test_importing_the_package_loads_no_optional_part() -> None:
    program = (
        "import sys, tsbn_kernels\n"
        "assert 'tsbn_kernels.analysis' not in sys.modules\n"
        "from tsbn_kernels import analysis\n"
        "print(sorted({'matplotlib', 'scipy', 'tsbn_kernels.plots'} & set(sys.modules)))"
    )
    assert python_output(program).strip() == "[]"
