"""Verdicts on kernels outlive the process, and count for the machine that they were proved on.

Planted faults seen red: the machine not compared, the digest not compared, keys read back as lists,
a file that is damaged raised, a folder that cannot be written raised.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from compute_node.kernels import prober
from compute_node.native import binding

KEY = ((64, 32), torch.bfloat16, True, False, 2)


@pytest.fixture(autouse=True)
def build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "build_id", lambda: "portable-1")
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for verdicts in prober.ENTRIES.values():
        monkeypatch.setattr(verdicts, "known", {})


def saved(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    prober.GEMM.prove((3, torch.Size((64, 32)), torch.bfloat16, True, 2), lambda: 1024)
    prober.GEMV.prove(KEY, lambda: False)
    prober.save(path)
    forget(monkeypatch)
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_a_restart_knows_what_was_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "kernels.json", monkeypatch)
    prober.load(tmp_path / "kernels.json")
    assert prober.GEMM.known == {(3, (64, 32), torch.bfloat16, True, 2): 1024}
    assert prober.GEMM.known[(3, torch.Size((64, 32)), torch.bfloat16, True, 2)] == 1024
    assert prober.GEMV.known == {KEY: 0}
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]


@pytest.mark.parametrize("fact", ["cpu", "torch", "library", "capability", "version"])
def test_another_machines_verdicts_are_not_trusted(
    fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kernels.json"
    document = saved(path, monkeypatch)
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
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kernels.json"
    saved(path, monkeypatch)
    path.write_bytes(damage(path.read_text()).encode("utf8", "surrogateescape"))
    check_ignored(path, caplog)


def check_ignored(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        prober.load(path)
    assert [record.message for record in caplog.records] == ["kernel verdicts are proved again"]
    assert not any(verdicts.known for verdicts in prober.ENTRIES.values())


def test_without_a_file_or_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prober.load(tmp_path / "kernels.json")
    assert not caplog.records
    prober.save(tmp_path / "absent" / "kernels.json")
    assert [record.message for record in caplog.records] == ["kernel verdicts are not kept"]
