"""The 40-task network, its training step, and the images that it is run on."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import cache

import numpy as np
import pytest
import torch
from support.celeba_folder import LAYOUTS, TORCHVISION, write_celeba

from benchmarks.layers.verify import MismatchError
from benchmarks.network.data import DataError, Faces, celeba_faces, lfw_faces
from benchmarks.network.model import CelebaNetwork, Layout, loss_of, stacked_gradients, task_specific_network
from benchmarks.network.training import FirstStep, check, differences
from benchmarks.records.network_run import VARIANTS
from experiments.forty_tasks.convolutional import plain_norm


def test_all_variants_have_the_same_parameters():
    assert len({sum(p.numel() for p in task_specific_network(name, 2).parameters()) for name in VARIANTS}) == 1


def test_each_task_is_a_network_of_its_own():
    """Task t of the stacked network is a single-task network with plain norms that have its gates."""
    tasks, images = 3, torch.rand(4, 3, 64, 64)
    network = task_specific_network("fused", tasks).double()
    logits = network(images.double())
    assert logits.shape == (tasks, 4)
    for task in range(tasks):
        single = CelebaNetwork(1, plain_norm, 1).double()
        state = network.state_dict()
        own = {k: v for k, v in state.items() if k.startswith(("convolutions", "linears"))}
        own |= {k: state[k][task : task + 1] for k in ("head_weight", "head_bias")}
        assert not single.load_state_dict(own, strict=False).unexpected_keys
        for norm, fused in zip(single.norms, network.norms, strict=True):
            norm.weight.data.copy_(torch.sigmoid(fused.weight[task]))
        torch.testing.assert_close(single(images.double())[0], logits[task])


def loss_and_gradients(name):
    faces = lfw_faces(3, 2)
    network = task_specific_network(name, 2, layout=Layout(3, (8, 16, 16, 24, 24, 16, 16))).double()
    loss = loss_of(network, faces.images.double(), faces.labels.double())
    loss.backward()
    return loss.detach(), stacked_gradients(network)


of_a_loop = cache(loss_and_gradients)


@pytest.mark.parametrize("variant", [name for name, variant in VARIANTS.items() if variant.fused])
def test_every_variant_has_the_loss_and_the_gradients_of_the_loop(variant):
    ours, our_gradients = loss_and_gradients(variant)
    theirs, their_gradients = of_a_loop(VARIANTS[variant].reference)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert list(our_gradients) == list(their_gradients)
    for name, gradient in their_gradients.items():
        assert gradient.abs().max() > 0, name
        assert (our_gradients[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


def test_loss_is_the_mean_over_images_and_the_sum_over_tasks():
    network = lambda _: torch.zeros(3, 5)  # noqa: E731
    loss = loss_of(network, torch.empty(0), torch.ones(5, 3))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(3 * np.log(2))


def test_differences_are_of_the_worst_gradient():
    theirs = FirstStep(2.0, {"a": np.array([3.0, 4.0]), "b": np.array([100.0, 0.0])}, 0)
    ours = FirstStep(2.5, {"a": np.array([3.0, 4.5]), "b": np.array([101.0, 0.0])}, 0)
    assert astuple(differences(ours, theirs)) == pytest.approx((0.5, 1.0, 0.1))


@pytest.mark.parametrize("wrong", [{"loss": 2.01}, {"loss": float("nan")}, {"gradient": 1.1}, {"gradient": np.nan}])
def test_a_wrong_network_is_found(wrong):
    right = FirstStep(2.0, {"a": np.ones(3), "b": np.ones(2)}, 0)
    check({"fused": right, "loop": right})
    gradients = {"a": np.full(3, wrong.get("gradient", 1.0)), "b": np.ones(2)}
    with pytest.raises(MismatchError, match="'fused' is wrong: in the network"):
        check({"fused": replace(right, loss=wrong.get("loss", 2.0), gradients=gradients), "loop": right})


def test_lfw_faces_are_real_repeatable_and_balanced():
    faces = lfw_faces(100, 40)
    assert faces.images.shape == (100, 3, 64, 64)
    assert faces.images.dtype == torch.float32
    assert 0 <= faces.images.min() < 0.1
    assert 0.9 < faces.images.max() <= 1
    assert torch.equal(faces.images[:, 0], faces.images[:, 2])
    assert torch.equal(faces.labels.sum(0), torch.full((40,), 50.0))
    assert torch.equal(faces.labels.unique(), torch.tensor([0.0, 1.0]))
    assert len({tuple(column.tolist()) for column in faces.labels.T}) == 40  # the tasks differ
    again = lfw_faces(130, 40)  # more than there are: in turn
    assert torch.equal(again.labels[:100], faces.labels)
    assert torch.equal(again.images[100:], faces.images[:30])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parent", ["", "celeba"])
def test_celeba_folder_in_both_layouts(tmp_path, layout, parent):
    write_celeba(tmp_path / parent, layout)
    faces = celeba_faces(tmp_path, 2, 2)
    assert faces.images.shape == (2, 3, 64, 64)
    assert faces.images[0, :, 0, 0].tolist() == [1, 0, 0]
    assert faces.images[1, :, 63, 63].tolist() == [0, 0, 1]
    assert faces.labels.tolist() == [[1, 0], [0, 1]]
    assert isinstance(faces, Faces)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", [1, 2])
def test_a_missing_file_is_named(tmp_path, layout, part):
    write_celeba(tmp_path, layout)
    (tmp_path / layout[part]).unlink()
    with pytest.raises(DataError, match=f"{tmp_path / layout[part]} is missing"):
        celeba_faces(tmp_path, 1, 1)


def test_celeba_problems_are_said(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        celeba_faces(tmp_path / "nowhere", 1, 1)
    root = write_celeba(tmp_path, TORCHVISION)
    with pytest.raises(DataError, match="has 2 training images, 3 were asked for"):
        celeba_faces(root, 3, 1)
    with pytest.raises(DataError, match="has 3 attributes, 40 tasks"):
        celeba_faces(root, 1, 40)
    (root / TORCHVISION[0] / "0.png").write_text("no image")
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        celeba_faces(root, 1, 1)
    (root / TORCHVISION[1]).write_text("3\nBald Male Young\n0.png 1 -1\n")
    with pytest.raises(DataError, match=r"the line of 0\.png should have 3 values"):
        celeba_faces(root, 1, 1)
