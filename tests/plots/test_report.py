"""The page of ``python -m tsbn_kernels analyse``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.runs import T, every_layer, multitask, random_gates

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from tsbn_kernels import FusedTSigmaBN2d
from tsbn_kernels.__main__ import main


def sections(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_page_of_several_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        torch.save({"ema": {"model": multitask().state_dict()}, "step": 3}, tmp_path / f"seed{seed}.pt")
    page = tmp_path / "new" / "report.html"
    main(["analyse", *(str(tmp_path / f"seed{seed}.pt") for seed in range(3)), "--out", str(page)])
    assert capsys.readouterr().out == f"report: {page}\n"
    text = page.read_text()
    names = ["Importance", "Capacity", "Specialised filters", "Similarity", "Graph of tasks", "Gates", "Clusters"]
    assert [name for name in sections(text) if not name.startswith("Stability")] == names
    assert re.search(r"<h2>Stability: -?\d\.\d\d</h2>", text)
    assert text.count('src="data:image/png;base64,') == len(names)
    assert not re.search(r'(?:src|href)="(?!data:)', text)  # nothing is fetched
    for name in names:  # a sentence below each title
        assert re.search(rf"<h2>{name}</h2>\n<p>[A-Z][^<]+\.</p>", text), name
    assert all(task in text for task in ("age", "hat", "smile", "seed2"))


def test_a_page_of_one_task_and_of_one_run(tmp_path: Path) -> None:
    torch.save(FusedTSigmaBN2d(1, 4).state_dict(), tmp_path / "one.pt")
    main(["analyse", str(tmp_path / "one.pt"), "--tasks", "<only>", "--out", str(tmp_path / "one.html")])
    text = (tmp_path / "one.html").read_text()
    assert sections(text) == ["Importance", "Capacity", "Specialised filters", "Gates"]
    assert "&lt;only&gt;" in text and "<only>" not in text


def test_untrained_runs_have_no_stability(tmp_path: Path) -> None:
    torch.save(FusedTSigmaBN2d(4, 4).state_dict(), tmp_path / "a.pt")
    main(["analyse", *[str(tmp_path / "a.pt")] * 2, "--out", str(tmp_path / "page.html")])
    assert "equally alike" in (tmp_path / "page.html").read_text()


def test_a_state_of_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that keeps tensors alone, as safetensors does, here by torch.save."""
    layer = random_gates(FusedTSigmaBN2d(T, 4, gate="identity", bias=True))
    torch.save(dict(torch.nn.Sequential(layer).state_dict()), tmp_path / "bare.pt")
    arguments = ["analyse", str(tmp_path / "bare.pt"), "--out", str(tmp_path / "page.html")]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 1
    assert "say gate='sigmoid' or gate='identity'" in capsys.readouterr().err
    main([*arguments, "--gate", "identity"])
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.pt"], "No such file"),
        (["two.pt"], "several states, say which by key: 'a', 'b'"),
        (["two.pt", "--key", "a", "--tasks", "x,y"], "must name the 3 tasks"),
        (["two.pt", "--key", "a", "--threshold", "1"], "threshold must be below 1"),
        (["two.pt", "two.pt", "--key", "a", "--clusters", "9"], "at most the 3 tasks"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    state = {key: value for key, value in every_layer().state_dict().items() if key.startswith("1.")}
    torch.save({"a": state, "b": state}, "two.pt")
    with pytest.raises(SystemExit) as exit_:
        main(["analyse", *options, "--gate", "sigmoid", "--out", "page.html"])
    assert exit_.value.code == 1
    assert message in capsys.readouterr().err
