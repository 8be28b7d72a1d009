"""What the GPU day measures of layers and of the network, run small on the CPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_day import setting
from torch import Tensor

from benchmarks.gpu_day import journal, network, race, speed, table
from benchmarks.gpu_day.race import Entrant
from benchmarks.gpu_day.step_api import Setting
from benchmarks.layers.cases import Case
from benchmarks.layers.peers import Fused, Loop
from benchmarks.layers.registry import PEERS
from benchmarks.layers.verify import MismatchError
from benchmarks.records.workloads import BATCH_NORM, LAYER_NORM, Layer
from benchmarks.timing.measure import HostTimer

CPU = torch.device("cpu")
LAYER = Case(Layer.of(8, (6, 5)), 3, 4, "float32", "contiguous", CPU, workload="celeba40")


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_every_layer_is_raced_at_full_size():
    found = speed.planned()
    shapes = {(case.layer.name, case.dtype, case.memory_format) for case in found if case.workload == "celeba40"}
    flat = {("bn8,bn9", dtype, "none") for dtype in ("bfloat16", "float32")}
    orders = itertools.product(speed.ORDER[:4], ("bfloat16", "float32"), ("contiguous", "channels_last"))
    assert shapes == flat | set(orders)
    assert {(case.tasks, case.batch) for case in found} == {(40, 256), (3, 4), (5, 8), (8, 32)}
    assert [case.layer.name for case in found if case.norm == LAYER_NORM] == ["384@1024 x25", "768@512 x25"]
    assert [case.layer.name for case in found[:3]] == ["bn4,bn5", "bn2,bn3", "bn6,bn7"]


class Wrong(Loop):
    name = "wrong"

    def forward(self) -> Tensor:
        return super().forward() * 1.01


class Huge(Loop):
    name = "huge"

    def forward(self) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


class WrongOurs(Fused):
    name = "fused"

    def forward(self) -> Tensor:
        y = super().forward()
        return torch.cat([y[:-1], 1.1 * y[-1:]])


def lines(folder: Path, kind: str = "speed") -> list[dict[str, Any]]:
    return journal.read(folder, kind)


def test_a_peer_that_is_wrong_or_too_large_is_left_out_and_the_rest_is_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS[BATCH_NORM], "wrong", Wrong)
    monkeypatch.setitem(PEERS[BATCH_NORM], "huge", Huge)
    entrants = [Entrant("wrong"), Entrant("huge"), Entrant("fused", "cpu"), Entrant("loop")]
    race.run(LAYER, entrants, setting(tmp_path), "speed")
    assert [(line["entrant"], line["pass"]) for line in lines(tmp_path)] == [
        ("cpu", "forward"),
        ("cpu", "forward+backward"),
        ("loop", "forward"),
        ("loop", "forward+backward"),
    ]
    assert all(line["verified"] and line["median_ms"] > 0 and line["copy_ms"] > 0 for line in lines(tmp_path))
    why = {line["entrant"]: line["why"] for line in lines(tmp_path, "left out")}
    assert why["huge"] == "out of memory"
    assert why["wrong"].startswith("MismatchError: wrong is wrong: y of")


def test_ours_is_timed_and_marked_where_it_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS[BATCH_NORM], "fused", WrongOurs)
    with pytest.raises(AssertionError, match="cpu: MismatchError: fused is wrong"):
        race.run(LAYER, [Entrant("fused", "cpu"), Entrant("loop")], setting(tmp_path), "speed")
    assert {line["entrant"]: line["verified"] for line in lines(tmp_path)} == {"cpu": False, "loop": True}
    assert "WRONG" in table.text(tmp_path, [])


class Graph:
    """Runs the step again where a graph would be replayed."""

    def __init__(self, step: Any) -> None:
        self.replay = step


def test_a_graph_holds_all_buffers_and_as_many_steps_as_fill_the_time(monkeypatch):
    steps = []

    def captured(step: Any) -> tuple[Graph, None]:
        step()
        return Graph(step), None

    monkeypatch.setattr(race.replay, "captured", captured)
    found = race.replayed(lambda: steps.append(time.sleep(1e-3)), race.QUICK_EFFORT, 3, race.REPLAY_SECONDS / 7, CPU)
    assert len(steps) % 9 == 0  # three buffers, three times: the least that fills seven steps
    assert 1e-3 <= found.median < 5e-3  # of one step


def test_a_replay_that_is_timed_begins_while_another_runs(monkeypatch):
    """So that the time in which the host starts it does not count."""
    happened = []

    class Clock(HostTimer):
        def mark(self) -> None:
            happened.append("mark")
            super().mark()

    monkeypatch.setattr(race.replay, "captured", lambda step: (Graph(lambda: happened.append("replay")), None))
    monkeypatch.setattr(race, "timer_for", lambda _: Clock())
    race.replayed(lambda: None, race.QUICK_EFFORT, 1, 1.0, CPU)
    assert len(happened) >= 12
    assert happened == ["replay", "mark", "replay", "mark"] * (len(happened) // 4)


def test_a_graph_has_no_more_steps_than_fill_its_time_at_twice_the_rate_of_a_copy(tmp_path, monkeypatch):
    least = []

    def replayed(step: Any, effort: Any, buffers: int, seconds: float, device: torch.device) -> race.Summary:
        least.append(seconds)
        return race.Summary(1.0, 0.0, 1, 0, (1.0,))

    monkeypatch.setattr(race, "can_capture", lambda _: True)
    monkeypatch.setattr(race, "replayed", replayed)
    for copy, wanted in ((8.0, [4.0, 10.0]), (1e-9, [pytest.approx(0, abs=1e-2)] * 2)):
        monkeypatch.setattr(race, "_copy_time", lambda *_, copy=copy: race.Summary(copy, 0.0, 1, 0, (copy,)))
        race.run(LAYER, [Entrant("loop")], setting(tmp_path), "speed")
        assert least == wanted and min(least) > 0
        least.clear()


def test_what_may_end_the_process_comes_last(monkeypatch):
    monkeypatch.setattr(race, "ours", lambda _: [Entrant("fused", "triton"), Entrant("fused", "cuda")])
    for case in speed.celeba(Setting("cpu", True, "")):
        assert [entrant.name for entrant in case.run.args[1]] == ["triton", "loop", "folded", "cuda"]


def test_a_step_is_timed_by_calls_and_by_replay_over_all_buffers(tmp_path, monkeypatch):
    taken = []

    class Noted(Loop):
        def forward(self) -> Tensor:
            taken.append(self.x.data_ptr())
            return super().forward()

    def captured(step: Any) -> tuple[Graph, None]:
        del taken[:]
        step()
        assert len(set(taken)) in (0, 3)  # none by a copy
        return Graph(step), None

    monkeypatch.setattr(race, "can_capture", lambda _: True)
    monkeypatch.setattr(race.replay, "captured", captured)
    monkeypatch.setattr(race, "rotating_buffers", lambda *_: 3)
    monkeypatch.setitem(PEERS[BATCH_NORM], "loop", Noted)
    race.run(LAYER, [Entrant("loop")], replace(setting(tmp_path), quick=False), "speed")
    assert [line["by"] for line in lines(tmp_path)] == ["eager", "eager", "graph", "graph"]
    assert {line["buffers"] for line in lines(tmp_path)} == {3}


def test_what_cannot_be_captured_keeps_the_times_of_its_calls(tmp_path, monkeypatch):
    def captured(step: Any) -> tuple[Graph, None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(race, "can_capture", lambda _: True)
    monkeypatch.setattr(race, "_copy_time", lambda *_: race.Summary(1.0, 0.0, 1, 0, (1.0,)))
    monkeypatch.setattr(race.replay, "captured", captured)
    with pytest.raises(AssertionError, match="not captured in a CUDA graph: operation not permitted"):
        race.run(LAYER, [Entrant("fused", "cpu")], setting(tmp_path), "speed")
    assert [line["by"] for line in lines(tmp_path)] == ["eager", "eager"]


def test_the_layers_that_decide_end_the_table(tmp_path):
    for name, dtype in (("celeba40", "bfloat16"), ("celeba40", "float32"), ("segnet", "bfloat16")):
        case = {"workload": name, "layer": name, "dtype": dtype, "memory_format": "contiguous", "entrant": "triton"}
        kind = "speed" if name == "celeba40" else "layers"
        journal.note(tmp_path, kind, **case, by="eager", **{"pass": "forward"})
    said = [line.partition(":")[0] for line in table.text(tmp_path, []).splitlines()[1:]]
    assert said == ["segnet bfloat16 contiguous", "celeba40 float32 contiguous", "celeba40 bfloat16 contiguous"]


# ---- the network -----------------------------------------------------------------------------------------------------


def test_the_largest_batch_follows_from_two_small_ones_and_shrinks_until_it_fits(tmp_path, monkeypatch):
    tried = []

    def measured(variant: str, backend: str, memory_format: str, batch: int, _: Setting) -> None:
        tried.append(batch)
        if batch > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(network, "_peak_at", lambda batch, *_: 1000 + 10 * batch)
    monkeypatch.setattr(network.environment, "available_bytes", lambda _: 6000)
    monkeypatch.setattr(network, "_measured", measured)
    network.largest("fused", "", "contiguous", replace(setting(tmp_path), quick=False))
    assert tried == [384, 256]  # room for 452


def measured_up_to(most: int) -> Callable[..., dict[str, Any]]:
    """Notes a line, as the network's step does, but of the batches that are too large for a library."""

    def measured(variant: str, backend: str, memory_format: str, batch: int, where: Setting) -> dict[str, Any]:
        if batch > most:
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nand more")
        found = {"variant": variant, "memory_format": memory_format, "batch": batch, "loss": 1.0}
        journal.note(where.folder, "network", **found)
        return found

    return measured


@pytest.mark.parametrize(("most", "batches"), [(500, [64, 384, 384]), (200, [64, 192, 192]), (70, [64, 64, 64])])
def test_ours_are_compared_with_the_loop_at_what_it_could_do(tmp_path, monkeypatch, most, batches):
    """At a small batch it is always timed, before one that may end the process."""
    where = replace(setting(tmp_path), quick=False)
    monkeypatch.setattr(network, "_peak_at", lambda batch, *_: 1000 + 10 * batch)
    monkeypatch.setattr(network.environment, "available_bytes", lambda _: 6000)
    monkeypatch.setattr(network, "_measured", measured_up_to(most))
    network.largest("loop", "", "contiguous", where)
    network.at_the_loops("fused", "cpu", "contiguous", where)
    assert [line["batch"] for line in lines(tmp_path, "network")][-3:] == batches


def test_a_loop_that_loses_the_device_is_not_tried_again_there(tmp_path, monkeypatch):
    where = replace(setting(tmp_path), quick=False)
    monkeypatch.setattr(network, "_peak_at", lambda batch, *_: 1000 + 10 * batch)
    monkeypatch.setattr(network.environment, "available_bytes", lambda _: 6000)
    monkeypatch.setattr(network, "_measured", measured_up_to(100))
    monkeypatch.setattr(network, "is_usable", lambda _: False)
    with pytest.raises(RuntimeError, match="CUDNN_STATUS_NOT_SUPPORTED"):
        network.largest("loop", "", "contiguous", where)
    assert [line["batch"] for line in lines(tmp_path, "network")] == [64]


def test_a_network_that_computes_something_else_is_wrong(tmp_path, monkeypatch):
    at = {"variant": "loop", "memory_format": "contiguous", "batch": 4, "loss": 10.0}
    with pytest.raises(AssertionError, match="the loop was not measured"):
        network.at_the_loops("fused", "cpu", "contiguous", setting(tmp_path))
    journal.note(tmp_path, "network", **at)
    for loss, wrong in ((10.1, False), (10.3, True), (float("nan"), True)):
        monkeypatch.setattr(network, "_measured", lambda *_, loss=loss: {"loss": loss})
        if wrong:
            with pytest.raises(MismatchError, match="'fused' is wrong: its loss"):
                network.at_the_loops("fused", "cpu", "contiguous", setting(tmp_path))
        else:
            network.at_the_loops("fused", "cpu", "contiguous", setting(tmp_path))
