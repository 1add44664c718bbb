"""A store with other weights than the checkpoint's says so, everywhere, and is another model.

Planted faults seen red: a journal that does not tell formats apart, bf16 with exact's fingerprint,
exact with another than before, version 1 refused, the makers' card overwritten or a stale one left,
backslashes in figures, room counted twice, groups of 48.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from expert_store.manifest.document import signed
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest
from expert_store.offline import card
from expert_store.offline import record_file as records_module
from expert_store.offline.formats.int4 import layout_here
from expert_store.offline.formats.table import FORMATS
from expert_store.offline.pack import pack
from expert_store.offline.record_file import JOURNAL_NAME, RECORDS_NAME
from expert_store.offline.verify import verify
from proto import errors
from proto.expert import ModelSpec
from proto.weight_format import EXACT, NAMES
from tests.checkpoints import make


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make("mixtral", tmp_path_factory.mktemp("checkpoint") / "tiny-mixtral")
    (root / "README.md").write_text("what its makers say\n")
    return root


@pytest.fixture(scope="module")
def int4(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "store"
    pack(checkpoint, folder, weight_format="int4")
    return folder


def test_the_format_is_written_and_crosses_the_wire(int4: Path) -> None:
    spec = Manifest.load(int4).spec
    found = spec.weight_format
    assert (found.name, found.group, found.lossy) == ("int4", 32, True)
    assert found.layout == layout_here()
    assert str(found) == "int4 (group 32, lossy)"
    assert ModelSpec.from_pb(spec.to_pb()) == spec
    assert verify(int4) == []


def test_every_format_has_an_encoder() -> None:
    assert tuple(FORMATS) == NAMES


def test_formats_are_different_models(checkpoint: Path, int4: Path, tmp_path: Path) -> None:
    """Evidence, advice and what was calibrated go by the fingerprint."""
    fingerprints = {Manifest.load(int4).spec.fingerprint}
    for name in set(NAMES) - {"int4", "lossless"}:  # the last is for bf16
        fingerprints.add(pack(checkpoint, tmp_path / name, weight_format=name).spec.fingerprint)
    assert len(fingerprints) == 4


def test_a_store_of_version_1_is_exact(checkpoint: Path, tmp_path: Path) -> None:
    """And keeps its fingerprint, with what was calibrated for it."""
    manifest = pack(checkpoint, tmp_path / "store")
    document = json.loads((tmp_path / "store" / MANIFEST_NAME).read_text())
    assert "weight_format" not in document["spec"], "it would count in the fingerprint"
    old = Manifest.parse(signed(document | {"version": 1}), "it")
    assert old == manifest == old.sealed()
    assert old.spec.weight_format == EXACT


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["int3", 32, "", True], "'int3', this program knows exact, lossless, bf16"),
        (["int4", 48, "blocks64", True], "groups of 48"),
        (["int4", 32, "blocks64", 1], "neither true nor false"),
        (["int4", 32], "damaged"),
    ],
)
def test_a_format_nobody_knows_is_refused(row: list[object], reason: str, int4: Path) -> None:
    document = json.loads((int4 / MANIFEST_NAME).read_text())
    document["spec"]["weight_format"] = row
    with pytest.raises(errors.ManifestInvalid, match=reason):
        Manifest.parse(signed(document), "it")


def test_the_card_says_what_it_is(checkpoint: Path, int4: Path) -> None:
    text = (int4 / card.CARD_NAME).read_text()
    assert "base_model: tiny-mixtral" in text and "int4 (group 32, lossy)" in text
    assert "this is lossy" in text and "flashmoe eval STORE --text FILE" in text
    assert f"{Manifest.load(int4).expert_bytes_total:,} here" in text
    assert str(checkpoint.parent) not in text, "where it was packed is nobody's business"
    assert (int4 / card.SOURCE_CARD_NAME).read_text() == "what its makers say\n"


def test_the_card_takes_what_was_measured(int4: Path, tmp_path: Path) -> None:
    before = (int4 / card.CARD_NAME).read_text().split("## Perplexity")[0]
    (tmp_path / card.CARD_NAME).write_text((int4 / card.CARD_NAME).read_text())
    for figures in (r"first \1", "second"):
        card.write_perplexity(tmp_path, figures)
        assert (tmp_path / card.CARD_NAME).read_text() == f"{before}## Perplexity\n\n{figures}\n"


def test_an_exact_store_has_its_makers_card_and_no_other(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store.partial").mkdir()
    (tmp_path / "store.partial" / card.SOURCE_CARD_NAME).write_text("a killed run's, packing int4")
    pack(checkpoint, tmp_path / "store")
    assert (tmp_path / "store" / card.CARD_NAME).read_text() == "what its makers say\n"
    assert not (tmp_path / "store" / card.SOURCE_CARD_NAME).exists()
    with pytest.raises(errors.ManifestInvalid, match="only stores packed with --format"):
        card.write_perplexity(tmp_path / "store", "")


def test_another_format_starts_over(
    checkpoint: Path, int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the journal does not tell formats apart: half of the records would be int8."""

    def interrupt(done_bytes: int, total_bytes: int) -> None:
        if done_bytes > total_bytes // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(records_module, "_SYNC_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, tmp_path / "store", interrupt, weight_format="int8")
    assert (tmp_path / "store.partial" / JOURNAL_NAME).exists()
    pack(checkpoint, tmp_path / "store", weight_format="int4")
    assert verify(tmp_path / "store") == []
    for name in os.listdir(int4):
        if name != MANIFEST_NAME:
            assert (tmp_path / "store" / name).read_bytes() == (int4 / name).read_bytes(), name


def test_space_is_counted_by_format(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An int4 store fits where an exact one does not."""
    exact = pack(checkpoint, tmp_path / "exact")
    free = exact.expert_bytes_total // 2 + exact.spec.dense_bytes
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(errors.ManifestInvalid, match="packing needs"):
        pack(checkpoint, tmp_path / "again")
    pack(checkpoint, tmp_path / "int4", weight_format="int4")
    assert (tmp_path / "int4" / RECORDS_NAME).exists()


def test_a_cpu_without_an_int4_kernel_is_told(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(errors.CheckpointUnsupported, match="--format int8 or bf16"):
        pack(checkpoint, tmp_path / "store", weight_format="int4")
