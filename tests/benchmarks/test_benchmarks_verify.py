"""Workloads, peers, and the comparison that comes before any timing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.layers.cases import DTYPES, Case, cases, choose_batch
from benchmarks.layers.peers import Fused
from benchmarks.layers.registry import PEERS
from benchmarks.layers.verify import Expected, MismatchError, check, check_by_tasks, outcome_of
from benchmarks.records.workloads import BATCH_NORM, CELEBA40, LAYER_NORM, NO_FORMAT, Layer, select_layers

CPU = torch.device("cpu")
EAGER = ("fused", "loop", "folded", "vmap")
GIB = 2**30


def small(dtype="float32", memory_format="contiguous", size: int | None = 4) -> Case:
    return Case(Layer(("bn",), 8, size and (size, size)), 3, 4, dtype, memory_format if size else NO_FORMAT, CPU)


def test_the_nine_layers_at_batch_256():
    assert [name for layer in CELEBA40 for name in layer.names] == [f"bn{i}" for i in range(1, 10)]
    elements = [torch.Size(layer.shape(40, 256)).numel() for layer in CELEBA40]
    assert elements[0] == 2_684_354_560
    gib = [count * 4 / GIB for count in elements]
    assert gib == [10.0, 5.0, 2.5, 1.25, 20 / 1024]


def test_cases_measure_one_dimensional_layers_once_for_each_dtype():
    found = cases(
        select_layers(["bn3", "bn9"], CELEBA40),
        tasks=2,
        batch=4,
        dtypes=["float32", "bfloat16"],
        memory_formats=["contiguous", "channels_last"],
        device=CPU,
    )
    assert [str(case) for case in found] == [
        "bn2,bn3 float32 contiguous",
        "bn2,bn3 float32 channels_last",
        "bn2,bn3 bfloat16 contiguous",
        "bn2,bn3 bfloat16 channels_last",
        "bn8,bn9 float32",
        "bn8,bn9 bfloat16",
    ]
    assert found[0].shape == (8, 128, 32, 32)
    assert found[0].tensor_bytes == 2 * found[2].tensor_bytes == 8 * 128 * 1024 * 4


def test_unknown_layer_is_named():
    with pytest.raises(ValueError, match="unknown layer 'bn10'"):
        select_layers(["bn1", "bn10"], CELEBA40)


def test_batch_fits_in_a_third_of_the_memory():
    dtypes, cuda = ["float32", "bfloat16"], torch.device("cuda")
    sample = 10 * 4 * 40 * 64 * 64 * 64  # ten tensors of the first layer
    assert choose_batch(CELEBA40, 40, dtypes, cuda, 3 * 8 * sample)[0] == 8
    assert choose_batch(CELEBA40, 40, dtypes, cuda, 3 * 8 * sample - 3)[0] == 4
    assert choose_batch(CELEBA40, 40, dtypes, cuda, 10**15) == (256, "the default on cuda")
    assert choose_batch(CELEBA40, 40, dtypes, CPU, 10**15)[0] == 16
    with pytest.raises(ValueError, match=r"choose fewer --tasks or smaller --layers"):
        choose_batch(CELEBA40, 40, dtypes, CPU, 3 * 2 * sample - 3)


def test_inputs_are_repeatable_and_in_the_memory_format():
    case = small("bfloat16", "channels_last")
    first, second = case.inputs(), case.inputs()
    assert torch.equal(first.x, second.x)
    assert first.x.dtype == torch.bfloat16
    assert first.gamma.dtype == torch.float32
    assert first.x.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(first.x, first.dy)


@pytest.mark.parametrize("size", [4, None])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", EAGER)
def test_every_peer_does_the_same_work(impl, dtype, memory_format, size):
    case = small(dtype, memory_format, size)
    if why := PEERS[BATCH_NORM][impl].unsupported(case):
        pytest.skip(why)
    inputs = case.inputs()
    errors = check(impl, case, outcome_of(PEERS[BATCH_NORM][impl](case, inputs)), Expected.of(case, inputs))
    assert set(errors) == {"y", "dx", "dgamma", "running_mean", "running_var"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["fused", "loop", "scaled"])
def test_every_peer_of_layer_normalisation_does_the_same_work(impl, dtype):
    case = Case(Layer.of_rows(37, 5), 3, 4, dtype, NO_FORMAT, CPU)
    inputs = case.inputs()
    errors = check(impl, case, outcome_of(PEERS[LAYER_NORM][impl](case, inputs)), Expected.of(case, inputs))
    assert set(errors) == {"y", "dx", "dgamma"}


@pytest.mark.parametrize("field", ["y", "dx", "dgamma"])
def test_a_wrong_result_of_layer_normalisation_is_found(field):
    case = Case(Layer.of_rows(37, 5), 3, 4, "float32", NO_FORMAT, CPU)
    inputs = case.inputs()
    outcome = outcome_of(PEERS[LAYER_NORM]["fused"](case, inputs))
    value = getattr(outcome, field).detach().clone()
    value[-1] *= 1.001
    wrong = replace(outcome, **{field: value})
    with pytest.raises(MismatchError, match=f"fused is wrong: {field} of 37@5 float32"):
        check("fused", case, wrong, Expected.of(case, inputs))
    with pytest.raises(MismatchError, match=f"fused is wrong: {field} of 37@5 float32"):
        check_by_tasks("fused", case, inputs, wrong)
    check_by_tasks("fused", case, inputs, outcome)


def test_reference_is_the_loop_of_float64_layer_norms(monkeypatch):
    case = Case(Layer.of_rows(8, 5), 3, 4, "float64", NO_FORMAT, CPU)
    inputs = case.inputs()
    monkeypatch.setattr("benchmarks.layers.verify.BLOCK", 3 * 8)  # blocks of three rows, the last of two
    expected = Expected.of(case, inputs).outcome
    for task in range(case.tasks):
        own = slice(4 * task, 4 * task + 4)
        norm = torch.nn.LayerNorm(8, bias=False, dtype=torch.float64)
        x = inputs.x[own].clone().requires_grad_()
        gamma = inputs.gamma[task].clone().requires_grad_()
        y = norm(x) * torch.sigmoid(gamma)
        dx, dgamma = torch.autograd.grad(y, (x, gamma), inputs.dy[own])
        torch.testing.assert_close(expected.y[own], y.detach())
        torch.testing.assert_close(expected.dx[own], dx)
        torch.testing.assert_close(expected.dgamma[task], dgamma)


def test_reference_is_the_loop_of_float64_batch_norms(monkeypatch):
    case = small("float64")
    inputs = case.inputs()
    monkeypatch.setattr("benchmarks.layers.verify.BLOCK", 3 * 64)  # blocks of three channels, the last of two
    expected = Expected.of(case, inputs).outcome
    for task in range(case.tasks):
        norm = torch.nn.BatchNorm2d(8, dtype=torch.float64)
        x = inputs.x[task * 4 : task * 4 + 4].clone().requires_grad_()
        gamma = inputs.gamma[task].clone().requires_grad_()
        y = norm(x) * torch.sigmoid(gamma)[:, None, None]
        dx, dgamma = torch.autograd.grad(y, (x, gamma), inputs.dy[task * 4 : task * 4 + 4])
        torch.testing.assert_close(expected.y[task * 4 : task * 4 + 4], y.detach())
        torch.testing.assert_close(expected.dx[task * 4 : task * 4 + 4], dx)
        torch.testing.assert_close(expected.dgamma[task], dgamma)
        norm(x)  # a second step
        torch.testing.assert_close(expected.running_mean[task], norm.running_mean)
        torch.testing.assert_close(expected.running_var[task], norm.running_var)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("field", ["y", "dx", "dgamma", "running_mean", "running_var"])
@pytest.mark.parametrize("defect", ["nan", "scaled"])
def test_a_wrong_result_is_found(dtype, field, defect):
    case = small(dtype)
    inputs = case.inputs()
    outcome = outcome_of(PEERS[BATCH_NORM]["fused"](case, inputs))
    value = getattr(outcome, field).detach().clone()
    if defect == "nan":
        value[-1, -1] = float("nan")
    else:
        value[-1] *= 1.2
    with pytest.raises(MismatchError, match=rf"candidate is wrong: {field} of bn {dtype}"):
        check("candidate", case, replace(outcome, **{field: value}), Expected.of(case, inputs))


def test_the_fused_layer_is_allowed_less_than_its_peers():
    case = small("bfloat16")
    inputs = case.inputs()
    outcome = outcome_of(PEERS[BATCH_NORM]["fused"](case, inputs))
    expected = Expected.of(case, inputs)
    unit = torch.nextafter(outcome.y, torch.full_like(outcome.y, float("inf"))).detach()
    check("folded", case, replace(outcome, y=unit), expected)
    with pytest.raises(MismatchError, match="fused is wrong: y"):
        check("fused", case, replace(outcome, y=unit), expected)


def test_a_wrong_shape_is_found():
    case = small()
    inputs = case.inputs()
    outcome = outcome_of(PEERS[BATCH_NORM]["fused"](case, inputs))
    with pytest.raises(MismatchError, match="a result of shape"):
        check("candidate", case, replace(outcome, y=outcome.y[..., :1]), Expected.of(case, inputs))


def test_a_candidate_in_another_dtype_is_found():
    case = small("bfloat16")
    inputs = case.inputs()
    outcome = outcome_of(PEERS[BATCH_NORM]["fused"](case, inputs))
    with pytest.raises(MismatchError, match=r"y .* is torch\.float32, expected torch\.bfloat16"):
        check("candidate", case, replace(outcome, y=outcome.y.float()), Expected.of(case, inputs))


def test_statistics_that_are_not_updated_are_found():
    class Forgetful(Fused):
        def statistics(self):
            return torch.zeros_like(self.module.weight), torch.ones_like(self.module.weight)

    case = small()
    inputs = case.inputs()
    with pytest.raises(MismatchError, match="running_mean"):
        check("forgetful", case, outcome_of(Forgetful(case, inputs)), Expected.of(case, inputs))


def test_folded_input_is_a_view_of_sample_major():
    case = small()
    inputs = case.inputs()
    peer = PEERS[BATCH_NORM]["folded"](case, inputs)
    assert peer.x.shape == (4, 24, 4, 4)
    # Sample 1 of task 2, channel 5.
    assert torch.equal(peer.x[1, 2 * 8 + 5], inputs.x[2 * 4 + 1, 5])
    assert torch.equal(peer.task_major(peer.x)[2, 1, 5], inputs.x[2 * 4 + 1, 5])


def test_a_value_that_is_not_written_is_found():
    class Careless(Fused):
        block: torch.Tensor | None = None

        def step(self):
            outcome = super().step()
            if self.block is not None:  # an allocator gives the first step's block again, and a sample is left out
                self.block[1:] = outcome.y[1:]
                outcome = replace(outcome, y=self.block)
            self.block = outcome.y
            return outcome

    case = small()
    inputs = case.inputs()
    with pytest.raises(MismatchError, match="y of bn float32 contiguous"):
        check("careless", case, outcome_of(Careless(case, inputs)), Expected.of(case, inputs))


@pytest.mark.parametrize("impl", EAGER)
def test_buffers_take_turns(impl):
    case = small(memory_format="channels_last")
    inputs = case.inputs()
    expected = Expected.of(case, inputs)
    peer = PEERS[BATCH_NORM][impl](case, inputs)
    peer.rotate_over(3)
    seen = []
    for _ in range(6):
        peer.next_buffers()
        seen.append((peer.x.data_ptr(), peer.dy.data_ptr(), peer.x.stride(), peer.dy.stride()))
    assert len(set(seen)) == 3 and seen[:3] == seen[3:]
    assert len({strides for *_, strides in seen}) == 1
    check(impl, case, outcome_of(peer), expected)
