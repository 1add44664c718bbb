"""Verdicts on kernels outlive the process, and count for the machine that they were proved on.

Planted faults seen red: the machine not compared, the digest not compared, keys read back as lists,
a file that is damaged raised, a folder that cannot be written raised, a ratio passed over.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from compute_node.kernels.prober import Prober
from compute_node.kernels.verdicts import Verdict
from compute_node.native import binding

KEY = ((64, 32), torch.bfloat16, True, False, 2)


@pytest.fixture(autouse=True)
def build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "build_id", lambda: "portable-1")


def saved(path: Path) -> dict[str, Any]:
    prober = Prober()
    prober.gemm.ask((3, torch.Size((64, 32)), torch.bfloat16, True, 2), lambda: Verdict(1024, 0.5))
    prober.gemv.ask(KEY, lambda: Verdict(0))
    prober.norm.ask(("torch.nn.RMSNorm eps=1e-06", 64), lambda: Verdict(1))
    prober.save(path)
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_a_restart_knows_what_was_proved(tmp_path: Path) -> None:
    saved(tmp_path / "kernels.json")
    prober = Prober()
    prober.load(tmp_path / "kernels.json")
    assert prober.gemm.known == {(3, (64, 32), torch.bfloat16, True, 2): Verdict(1024, 0.5)}
    assert (3, torch.Size((64, 32)), torch.bfloat16, True, 2) in prober.gemm.known
    assert prober.gemv.known == {KEY: Verdict(0)}
    assert prober.norm.known == {("torch.nn.RMSNorm eps=1e-06", 64): Verdict(1)}
    assert prober.num_proofs == 0
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]


@pytest.mark.parametrize(
    "fact", ["cpu", "torch", "transformers", "library", "capability", "version", "timed"]
)
def test_another_machines_verdicts_are_not_trusted(
    fact: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kernels.json"
    document = saved(path)
    document["machine"][fact] = "another"
    path.write_text(json.dumps(document))
    check_ignored(path, caplog)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda _: "[1]",
        lambda _: "[" * 100_000,
        lambda text: text.replace("1024", "1025"),
        lambda text: json.dumps(json.loads(text) | {"verdicts": {"gemv": 1}}),
        lambda text: json.dumps({"machine": json.loads(text)["machine"]}),
        lambda _: "\udcff",
    ],
)
def test_a_damaged_file_is_proved_again(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kernels.json"
    saved(path)
    path.write_bytes(damage(path.read_text()).encode("utf8", "surrogateescape"))
    check_ignored(path, caplog)


def check_ignored(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    prober = Prober()
    with caplog.at_level(logging.INFO):
        prober.load(path)
    assert [record.message for record in caplog.records] == ["kernel verdicts are proved again"]
    assert not any(verdicts.known for verdicts in prober.entries.values())


def test_without_a_file_or_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prober = Prober()
    prober.load(tmp_path / "kernels.json")
    assert not caplog.records
    prober.save(tmp_path / "absent" / "kernels.json")
    assert [record.message for record in caplog.records] == ["kernel verdicts are not kept"]


def test_what_is_slower_is_left_to_torch() -> None:
    """Red when a kernel with torch's bits is used whatever it costs."""
    prober = Prober(times=True)
    ratio = prober.ratio(lambda: time.sleep(2e-3), lambda: None)
    verdict = prober.gemv.ask(KEY, lambda: Verdict(1, ratio))
    assert (verdict.way, verdict.chosen) == (1, 0)
    assert prober.gemv.count(native=False) == 1 and prober.gemv.count(native=True) == 0
    assert prober.ratio(lambda: None, lambda: time.sleep(2e-3)) < 1
    assert Prober().ratio(lambda: time.sleep(2e-3), lambda: None) == 0
