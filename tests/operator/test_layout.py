"""The [T, N, C, S] view: no copies, strides of outputs, which family reads what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import FORMATS, STACKINGS, defined, in_memory_format, stack, unstack
from torch import Tensor

from tsbn_kernels.definition import layout
from tsbn_kernels.definition.options import Options

SPATIAL = [(), (7,), (3, 4), (2, 3, 4)]


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("spatial", SPATIAL)
def test_task_view_shares_storage_and_finds_each_stream(
    spatial: tuple[int, ...], stacking: str, memory_format: str
) -> None:
    streams = numbered((2, 3, 5, *spatial))
    x = stack(streams, stacking, memory_format)
    view = layout.task_view(x, 2, stacking)
    assert view.data_ptr() == x.data_ptr()
    assert torch.equal(view, streams.reshape(2, 3, 5, -1))
    assert torch.equal(unstack(x, 2, stacking), streams)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("spatial", SPATIAL)
def test_round_trip_keeps_values_shape_and_strides(spatial: tuple[int, ...], stacking: str, memory_format: str) -> None:
    x = stack(numbered((2, 3, 5, *spatial)), stacking, memory_format)
    view = layout.task_view(x, 2, stacking)
    for computed in (view.clone(), view.contiguous(), view + 0):  # dense in the order of the view, or row-major
        back = layout.from_task_view(computed, x.shape, layout.dense_strides(x, stacking), stacking)
        assert torch.equal(back, x)
        assert back.stride() == x.stride()


def test_stackings_of_a_view_of_a_shared_input() -> None:
    shared = numbered((3, 5, 2, 2))
    x = shared.expand(4, 3, 5, 2, 2)
    view = layout.task_view(x, 4, "task_axis")
    assert view.stride(0) == 0
    assert view.data_ptr() == shared.data_ptr()
    assert layout.supported(x, "task_axis") is x


@pytest.mark.parametrize(
    ("x", "stacking", "family"),
    [
        (torch.empty(4, 5, 2, 3), "task_major", "rows"),
        (torch.empty(4, 5, 2, 3), "sample_major", "rows"),
        (torch.empty(2, 2, 5, 2, 3), "task_axis", "rows"),
        (torch.empty(4, 5, 2, 3).to(memory_format=torch.channels_last), "task_major", "columns"),
        (torch.empty(4, 5), "task_major", "columns"),
        (torch.empty(2, 2, 5), "task_axis", "columns"),
        (torch.empty(4, 5, 1, 1), "task_major", "columns"),
        (torch.empty(4, 1, 2, 3), "task_major", "rows"),
        (torch.empty(4, 1, 1, 1), "task_major", "columns"),
        (torch.empty(4, 5, 1, 3), "task_major", "rows"),
        (torch.empty(4, 5, 3, 1), "task_major", "rows"),
        (torch.empty(8, 10, 2, 3)[::2, ::2], "task_major", "rows"),  # gaps between samples and channels
        (torch.empty(4, 10, 2, 3).to(memory_format=torch.channels_last)[:, :5], "task_major", "columns"),
        (torch.empty(4, 5, 4, 3)[:, :, :2], "task_major", "rows"),  # whole rows of each plane
        (torch.empty(4, 5, 2, 6)[..., :3], "task_major", None),  # parts of rows
        (torch.empty(4, 5, 2, 6)[..., ::2], "task_major", None),
        (torch.empty(4, 5, 3, 2).mT, "task_major", None),
        (torch.empty(5, 4).t(), "task_major", None),
        (torch.empty(4, 5, 1, 1).expand(4, 5, 2, 3), "task_major", "columns"),  # all positions are one
    ],
)
def test_family(x: Tensor, stacking: str, family: str | None) -> None:
    assert layout.family(x, stacking) == family
    read = layout.supported(x, stacking)
    assert (read is x) == (family is not None)
    assert layout.family(read, stacking) is not None
    assert read.shape == x.shape


def test_channel_axis() -> None:
    assert [layout.channel_axis(stacking) for stacking in STACKINGS] == [1, 1, 2]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_in_family_passes_a_gradient_of_the_same_family(memory_format: str) -> None:
    x = in_memory_format(torch.randn(4, 5, 2, 3), "task_major", memory_format)
    dy = torch.randn_like(x)
    assert layout.in_family(dy, layout.family(x, "task_major"), "task_major") is dy


@pytest.mark.parametrize("memory_format", FORMATS)
def test_in_family_copies_others_into_the_format_of_x(memory_format: str) -> None:
    x = in_memory_format(torch.randn(4, 5, 2, 3), "task_major", memory_format)
    other = in_memory_format(torch.randn(4, 5, 2, 3), "task_major", FORMATS[1 - FORMATS.index(memory_format)])
    for dy in (other, torch.tensor(2.0).expand(4, 5, 2, 3), torch.randn(4, 5, 3, 2).mT):
        like = layout.in_family(dy, layout.family(x, "task_major"), "task_major")
        assert torch.equal(like, dy)
        assert like.stride() == x.stride()


def dense(x: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(x))


def native_strides(x: Tensor, num_tasks: int, stacking: str) -> tuple[int, ...]:
    parameters = torch.zeros(num_tasks, x.shape[layout.channel_axis(stacking)])
    ones = parameters + 1
    out = torch.ops.tsbn.forward_eval(x, parameters, None, parameters, ones, num_tasks, 1e-5, "sigmoid", stacking)
    assert out.shape == x.shape
    return tuple(out.stride())


def reference_strides(x: Tensor, num_tasks: int, stacking: str) -> tuple[int, ...]:
    parameters = torch.zeros(num_tasks, x.shape[layout.channel_axis(stacking)])
    ones = parameters + 1
    return tuple(
        defined.forward_eval(x, parameters, None, parameters, ones, num_tasks, 1e-5, "sigmoid", stacking).stride()
    )


@settings(max_examples=300)
@given(
    stacking=st.sampled_from(STACKINGS),
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    order=st.permutations(range(4)),
    steps=st.tuples(*[st.sampled_from([1, 1, 1, 2])] * 4),
    starts=st.tuples(*[st.sampled_from([0, 0, 1])] * 4),
    expanded=st.booleans(),
)
def test_strides_of_outputs_agree(
    stacking: str,
    sizes: tuple[int, ...],
    order: tuple[int, ...],
    steps: tuple[int, ...],
    starts: tuple[int, ...],
    expanded: bool,
) -> None:
    """Python, the native library and the reference give one answer, and it is PyTorch's for dense tensors.

    Any permutation of the dimensions in memory, with gaps, offsets, dimensions of size 1, and a task stride of 0.
    """
    leading = [2, sizes[0]] if stacking == "task_axis" else [2 * sizes[0]]
    shape = [*leading, *sizes[1:]]
    offset = len(leading) - 1
    steps = (*[1] * offset, *steps)
    starts = (*[0] * offset, *starts)
    axes = [*range(offset), *(axis + offset for axis in order)]
    room = [size * step + start for size, step, start in zip(shape, steps, starts, strict=True)]
    memory = torch.zeros([room[axis] for axis in axes])
    inverse = [axes.index(axis) for axis in range(len(axes))]
    slices = [slice(start, start + size * step, step) for size, step, start in zip(shape, steps, starts, strict=True)]
    x = memory.permute(inverse)[tuple(slices)]
    assert list(x.shape) == shape
    if expanded and stacking == "task_axis":
        x = x[:1].expand(2, *x.shape[1:])
    x = layout.supported(x, stacking)

    strides = layout.dense_strides(x, stacking)
    if dense(x):
        assert strides == torch.empty_like(x, memory_format=torch.preserve_format).stride()
    fresh = torch.empty_strided(x.shape, strides)
    assert dense(fresh)
    if sizes[1] > 1:  # both families read a single channel
        assert layout.family(fresh, stacking) == layout.family(x, stacking)
    assert native_strides(x, 2, stacking) == strides
    assert reference_strides(x, 2, stacking) == strides


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(4, 5, 2, 3),
        torch.empty(4, 5, 2, 3).to(memory_format=torch.channels_last),
        torch.empty(4, 1, 2, 3).to(memory_format=torch.channels_last),
        torch.empty(4, 5, 1, 1).to(memory_format=torch.channels_last),
        torch.empty(4, 5, 1, 1),
        torch.empty(1, 5, 2, 3).transpose(0, 1).contiguous().transpose(0, 1),
        torch.empty(5, 4, 2, 3).transpose(0, 1),
    ],
)
def test_dense_tensors_keep_their_strides(x: Tensor) -> None:
    num_tasks = 1 if x.shape[0] == 1 else 2
    assert layout.dense_strides(x, "task_major") == torch.empty_like(x).stride()
    assert native_strides(x, num_tasks, "task_major") == torch.empty_like(x).stride()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 2), (4, 3, 0, 2), (4, 3, 2, 0), (4, 0, 2, 2), (0, 0, 0, 0), (0, 3), (4, 3, 0)]
)
def test_empty_tensors_are_read(shape: tuple[int, ...], memory_format: str) -> None:
    x = in_memory_format(torch.empty(shape), "task_major", memory_format)
    assert layout.family(x, "task_major") is not None
    assert (
        native_strides(x, 2, "task_major")
        == layout.dense_strides(x, "task_major")
        == reference_strides(x, 2, "task_major")
    )


def test_a_single_channel_is_read_in_every_format() -> None:
    """A copy in the format of x would be of the same family again: the operators copied it without end."""
    x, dy = torch.randn(4, 1, 10)[:, :, ::2], torch.randn(4, 1, 5)
    assert layout.family(x, "task_major") == "columns"
    assert layout.family(dy, "task_major") == "rows"
    assert all(
        read is given
        for read, given in zip(layout.readable(x, Options(2, 1e-5, "sigmoid", "task_major"), dy), (x, dy), strict=True)
    )
