"""A plugin of pytest for the check of a device: where tests run, within which time, from where on, and the verdict.

With ``--device`` only tests that take the fixture ``device`` are run. With ``-n 1`` they run in a process of their own:
a test that crashes, hangs or leaves the device unusable is one failed test, and a new process goes on with the next.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_day import sources
from benchmarks.timing import environment

# What decides comes first, by names of files; the last adds to it as the time allows, and is not missed.
ORDER = (
    "machine",
    "launch_kinds",
    "options",
    "modules",
    "graphs",
    "streams",
    "repeats",
    "large",
    "sanitizer",
    "random_options",
)
SECONDS = 90.0  # after which a test is taken to hang, unless it is marked with its own "patience"
CPU_PATIENCE = 4  # times as long there
MOST_LINES, MOST_NAMES = 25, 5
DEVICE_LOST = 3  # exit status of a process whose device a kernel has left unusable


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("check of a device")
    group.addoption("--device", help="run what takes a device, thoroughly: cuda, cpu, ...; auto: the accelerator")
    group.addoption("--seconds", type=float, default=math.inf, help="begin no test later after the start than that")
    group.addoption(
        "--record",
        type=Path,
        metavar="FILE.jsonl",
        help="what has passed, from where a later call goes on; the summary is beside it, FILE.md",
    )
    group.addoption("--fresh", action="store_true", help="forget what earlier calls have recorded")


@pytest.hookimpl(trylast=True)  # pytest's own faulthandler is set up by then
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "patience(seconds): how long the test may take on a GPU")
    config.addinivalue_line("markers", "facts: tells what is checked, in its properties; runs in every call")
    if config.option.device:
        config.option.device = device_named(config.option.device)
        config.pluginmanager.register(Check(config), "check of a device")


def device_named(name: str) -> str:
    """The name of a device of PyTorch that is here.

    Raises:
        UsageError: there is none.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto" and accelerator is None:
        raise pytest.UsageError("--device auto: PyTorch finds no accelerator here; --device cpu runs on the CPU")
    try:
        device = accelerator if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise pytest.UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise pytest.UsageError(f"--device {name}: PyTorch finds no such device here, but {accelerator or 'the CPU'}")
    return str(device)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """For tests that run on any device: that of ``--device``, or else the CPU."""
    return request.config.option.device or "cpu"


@pytest.fixture
def on_device(device: str) -> Iterator[None]:
    """Lets the test make its tensors on the device, where it does not say otherwise."""
    with torch.device(device):
        yield


class Check:
    """The check as one process sees it: the one that runs the tests, the one that gathers the reports, or both."""

    def __init__(self, config: pytest.Config) -> None:
        given = getattr(config, "workerinput", None)
        self.config, self.device, self.is_worker = config, torch.device(config.option.device), given is not None
        self.record: Path | None = config.option.record
        self.planned: set[str] = set()
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.seconds: Counter[str] = Counter()
        self.facts: dict[str, Any] = {}
        if given is None:
            self.deadline = time.time() + config.option.seconds
            self.name = environment.device_name(self.device)
            self.passed = self._recorded()
            with tempfile.NamedTemporaryFile(prefix="gpu-check-", suffix=".log", delete=False) as file:
                self.log = Path(file.name)
        else:
            self.deadline, self.passed, self.log = given["deadline"], set(given["passed"]), Path(given["log"])
            self._traceback = self.log.open("w")
            faulthandler.enable(self._traceback)
        if self.device.index is not None:
            torch.accelerator.set_device_index(self.device.index)

    def _recorded(self) -> set[str]:
        """Tests that an earlier call has passed; of other sources, versions and devices none."""
        if self.record is None:
            return set()
        head = json.dumps({"key": sources.digest(device=self.name, torch=torch.__version__)})
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        found = set()
        if lines[:1] == [head] and not self.config.option.fresh:
            for line in lines[1:]:
                with contextlib.suppress(ValueError):  # one that was cut off
                    found.add(json.loads(line))
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text("".join(f"{line}\n" for line in (head, *map(json.dumps, sorted(found)))))
        return found

    # ---- where the tests run ---------------------------------------------------------------------------------------

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves those that take the device and have not passed, in their order."""

        def place(item: pytest.Item) -> int:
            name = item.path.stem.removeprefix("test_")
            return ORDER.index(name) if name in ORDER else len(ORDER) - 1

        kept = [item for item in items if self._is_due(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = sorted(kept, key=place)

    def _is_due(self, item: pytest.Item) -> bool:
        given = getattr(getattr(item, "callspec", None), "params", {})  # some tests have a parameter of that name
        if "device" not in getattr(item, "fixturenames", ()) or "device" in given:
            return False
        return item.nodeid not in self.passed or item.get_closest_marker("facts") is not None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Runs nothing when the time is over. Else, in a process of its own, ends that where the test hangs."""
        if time.time() > self.deadline:
            return True
        if self.is_worker:
            marker = item.get_closest_marker("patience")
            seconds = (marker.args[0] if marker else SECONDS) * (CPU_PATIENCE if self.device.type == "cpu" else 1)
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._traceback)
        return None

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Ends the process where the test has left the device unusable: the next test gets another."""
        if self.is_worker:
            faulthandler.cancel_dump_traceback_later()
            if nodeid in self.failures and not is_usable(self.device):
                os._exit(DEVICE_LOST)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """An error of a kernel is that of the test that launched it."""
        result = yield
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return result

    # ---- where the reports are gathered ----------------------------------------------------------------------------

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """What a process that runs tests is told; the same of one that takes the place of another."""
        node.workerinput |= {"deadline": self.deadline, "passed": sorted(self.passed), "log": str(self.log)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.planned |= set(ids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.planned |= {item.nodeid for item in session.items}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures[report.nodeid] = report.longreprtext

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps what became of a test, on disk where it has passed."""
        test = report.nodeid
        self.seconds[test] += getattr(report, "duration", 0.0)
        self.facts |= dict(report.user_properties)
        if report.failed:
            self.failures.setdefault(test, self._why(report))
            self.outcomes[test] = "failed"
        elif report.skipped:
            self.outcomes.setdefault(test, "skipped")
        elif report.when == "teardown" and self.outcomes.setdefault(test, "passed") == "passed":
            self._note(test)

    def _why(self, report: pytest.TestReport) -> str:
        """What a failed test said last; what a process that has ended was doing, from the innermost call on."""
        if report.when not in ("setup", "call", "teardown"):  # xdist's word of a process that is gone
            return "\n".join([report.longreprtext, *self.log.read_text().splitlines()[:MOST_LINES]])
        said = "\n".join([report.longreprtext, report.capstdout, report.capstderr]).strip()
        return "\n".join(said.splitlines()[-MOST_LINES:])

    def _note(self, test: str) -> None:
        if self.record is not None and not self.is_worker and test not in self.passed:
            with self.record.open("a") as file:
                file.write(json.dumps(test) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Something that failed, and something that had no time, is an exit status of 1."""
        if not self.is_worker and session.exitstatus in (0, 1, 5):
            session.exitstatus = 0 if self.is_good else 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.record is not None:
            self._summary.write_text(self.markdown())
            terminalreporter.write_line(f"summary: {self._summary}")
        terminalreporter.write_line(self.sentence(), bold=True)

    def pytest_unconfigure(self) -> None:
        if not self.is_worker:
            self.log.unlink(missing_ok=True)

    # ---- the verdict -----------------------------------------------------------------------------------------------

    @property
    def _summary(self) -> Path:
        assert self.record is not None
        return self.record.with_suffix(".md")

    @property
    def left(self) -> set[str]:
        """Tests whose turn did not come, and that are missed: the last of the order only add to the others."""
        return {test for test in self.planned - set(self.outcomes) if f"test_{ORDER[-1]}.py" not in test}

    @property
    def is_good(self) -> bool:
        """Whether something passed, and nothing failed or was left."""
        return not self.failures and not self.left and self._count("passed") > 0

    def _count(self, outcome: str) -> int:
        earlier = self.passed - set(self.outcomes) if outcome == "passed" else set()
        return len(earlier) + Counter(self.outcomes.values())[outcome]

    def sentence(self) -> str:
        """What all tests say together, and what to do next."""
        total = len(self.planned | set(self.outcomes) | self.passed)
        if self.failures:
            names = [test.rpartition("::")[2] or test for test in self.failures]
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            send = f" Please send us {self._summary}." if self.record is not None else ""
            return (
                f"{len(names)} of {total} tests FAILED on {self.name}: {'; '.join(names[:MOST_NAMES])}{more}.{send} "
                "The same command runs again what failed."
            )
        if self.left:
            goes_on = " The same command goes on where this one stopped." if self.record is not None else ""
            return f"Nothing failed on {self.name}, but {len(self.left)} of {total} tests had no time.{goes_on}"
        skipped = self._count("skipped")
        alone = f", {skipped} skipped for the reasons above" if skipped else ""
        if not self._count("passed"):
            return f"No test was run on {self.name}{alone}: nothing is known."
        is_cpu = self.device.type == "cpu"
        about = "Every test works; a CPU says nothing about a GPU." if is_cpu else "The kernels are right here."
        return f"All {self._count('passed')} tests passed on {self.name}{alone}. {about}"

    def markdown(self) -> str:
        """The summary: verdict, a line for each file, what failed with its last lines, the machine."""
        rows: dict[str, Counter[str]] = defaultdict(Counter)
        for test in self.planned | set(self.outcomes) | self.passed:
            outcome = self.outcomes.get(test, "passed" if test in self.passed else "left")
            rows[test.partition("::")[0]][outcome] += 1
        columns = "passed", "failed", "skipped", "left"
        lines = [f"# The check of {self.name}", "", self.sentence(), "", f"| | {' | '.join(columns)} | seconds |"]
        lines.append(f"|---|{'---|' * 5}")
        for file, counts in sorted(rows.items()):
            seconds = sum(taken for test, taken in self.seconds.items() if test.startswith(f"{file}::"))
            lines.append(f"| {file} | {' | '.join(str(counts[name]) for name in columns)} | {seconds:.1f} |")
        for test, text in self.failures.items():
            lines += ["", f"**{test}**", "", "```", text, "```"]
        return "\n".join([*lines, "", "## The machine", "", "```", json.dumps(self.facts, indent=1), "```"]) + "\n"


def is_usable(device: torch.device) -> bool:
    """Whether the device still computes for this process: after an illegal access it does not."""
    try:
        return device.type == "cpu" or torch.ones(1, device=device).add_(1).item() == 2
    except Exception:
        return False
