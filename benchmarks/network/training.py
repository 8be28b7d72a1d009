"""One training step of the whole network, its variants against the loop: time, peak memory, differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.layers.verify import MismatchError
from benchmarks.network.data import Faces
from benchmarks.network.model import CelebaNetwork, stacked_gradients, task_specific_network, train_step
from benchmarks.records.network_run import VARIANTS, Differences, NetworkSteps
from benchmarks.records.summary import Summary
from benchmarks.timing.environment import memory_in_use
from benchmarks.timing.fresh_process import in_fresh_process
from benchmarks.timing.measure import Effort, measure, step_candidate, timer_for

LEARNING_RATE = 3e-4
# float32, nine layers deep: the two variants round differently in every layer, and the last two normalise over as few
# values as there are images, whose small variances amplify that (0.3% of the norm was seen with four images, 0.5% with
# two). In float64 they agree to nine digits: see the tests.
LOSS_TOLERANCE = 1e-4  # of the loss
GRADIENT_TOLERANCE = 3e-2  # norm of the difference over the norm of the gradient, of each parameter


@dataclass(frozen=True)
class FirstStep:
    """What one step in a process of its own gave."""

    loss: float
    gradients: dict[str, np.ndarray]
    peak_bytes: int  # the most memory during the step, above what lay there before


def prepared_step(variant: str, faces: Faces, device: torch.device) -> tuple[Callable[[], Tensor], CelebaNetwork]:
    """A training step of a variant's fresh network, to be called again and again, and the network."""
    tasks = faces.labels.shape[1]
    network = task_specific_network(variant, tasks).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    images, labels = faces.images.to(device), faces.labels.to(device)
    return lambda: train_step(network, optimizer, images, labels), network


def single_step(variant: str, images: np.ndarray, labels: np.ndarray, device_name: str, threads: int) -> FirstStep:
    """The first step of a fresh network. Run it in a fresh process: the peak is that of the whole process's life."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    faces = Faces(torch.from_numpy(images), torch.from_numpy(labels), "")
    step, network = prepared_step(variant, faces, device)
    before, _ = memory_in_use(device)
    loss = step()
    _, peak = memory_in_use(device)
    gradients = {name: gradient.cpu().numpy() for name, gradient in stacked_gradients(network).items()}
    return FirstStep(float(loss), gradients, peak - before)


def first_steps(faces: Faces, device: torch.device, meanwhile: Callable[[], None]) -> dict[str, FirstStep]:
    """The first step of each variant, in a fresh process of its own, two at a time, beside ``meanwhile``.

    Nothing is timed there: the processes share the threads of this one.
    """
    threads = max(1, torch.get_num_threads() // 2)
    arguments: tuple[Any, ...] = faces.images.numpy(), faces.labels.numpy(), str(device), threads
    with ThreadPoolExecutor(2) as pool:
        steps = {variant: pool.submit(in_fresh_process, single_step, variant, *arguments) for variant in VARIANTS}
        meanwhile()
        return {variant: step.result() for variant, step in steps.items()}


def differences(ours: FirstStep, theirs: FirstStep) -> Differences:
    """How far two first steps are from each other."""
    absolute = [float(np.abs(ours.gradients[name] - theirs.gradients[name]).max()) for name in theirs.gradients]
    relative = [
        float(np.linalg.norm(ours.gradients[name] - gradient) / (np.linalg.norm(gradient) + 1e-30))
        for name, gradient in theirs.gradients.items()
    ]
    # np.max and not max: NaN must not be lost.
    return Differences(abs(ours.loss - theirs.loss), float(np.max(absolute)), float(np.max(relative)))


def check(steps: Mapping[str, FirstStep]) -> None:
    """Compares the first step of each variant with that of the loop that computes the same.

    Raises:
        MismatchError: loss or gradients differ by more than the tolerance, or are NaN.
    """
    for name, step in steps.items():
        expected = steps[VARIANTS[name].reference]
        found = differences(step, expected)
        if not (found.loss <= LOSS_TOLERANCE * abs(expected.loss) and found.gradient_relative <= GRADIENT_TOLERANCE):
            raise MismatchError(
                f"{name!r} is wrong: in the network its loss differs from the loop's {expected.loss:.6f} by "
                f"{found.loss:.2e}, its gradients by up to {found.gradient_relative:.2e} of their norm; "
                f"{LOSS_TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e} are what rounding explains"
            )


def compare(faces: Faces, device: torch.device, effort: Effort, steps: Mapping[str, FirstStep]) -> NetworkSteps:
    """Times steps of the variants in turns; the rest is of their first steps, which have been checked."""
    candidates = {variant: step_candidate(prepared_step(variant, faces, device)[0]) for variant in VARIANTS}
    rounds = measure(candidates, effort, timer_for(device))
    return NetworkSteps(
        # A step allocates everything anew: each round counts as a visit.
        times={variant: Summary.of([[seconds] for seconds in taken]) for variant, (taken,) in rounds.items()},
        peak_bytes={variant: step.peak_bytes for variant, step in steps.items()},
        losses={variant: step.loss for variant, step in steps.items()},
        differences={name: differences(step, steps[VARIANTS[name].reference]) for name, step in steps.items()},
    )
