"""A manifest is whole and means what it says, or it is refused with one error.

Planted faults seen red: RecursionError not expected of a parser, the file itself opened for
writing, resolve_inside before links are resolved, sizes not compared. What is changed inside a
document is in test_manifest_mutations.py.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.manifest.document import signed
from expert_store.manifest.manifest import MANIFEST_NAME, Manifest, check_sources
from expert_store.manifest.sources import resolve_inside
from proto import errors
from tests.expert_store.stores import (
    FILE_NAME,
    KEYS,
    PAYLOAD_BYTES,
    small_keys,
    with_small_variant,
    write_store,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    write_store(path)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return Manifest.load(folder)


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())
    return loaded


@given(data=st.binary(max_size=200))
@settings(deadline=None, max_examples=50)
def test_a_file_of_anything_is_refused(data: bytes, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("random")
    (folder / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(errors.ManifestInvalid, match=MANIFEST_NAME):
        Manifest.load(folder)


@pytest.mark.parametrize("data", ["[" * 100_000, '{"version":1', "null", "7" * 5000, '"\ud800"'])
def test_hostile_json_is_refused(data: str, tmp_path: Path) -> None:
    """Red where RecursionError is not expected of a parser."""
    (tmp_path / MANIFEST_NAME).write_bytes(data.encode(errors="surrogatepass"))
    with pytest.raises(errors.ManifestInvalid, match=MANIFEST_NAME):
        Manifest.load(tmp_path)


def test_it_returns_as_it_was_written(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    manifest.write(tmp_path / "new" / "folder")
    assert Manifest.load(tmp_path / "new" / "folder") == manifest
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [MANIFEST_NAME]


def test_a_missing_manifest_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(errors.ManifestInvalid, match="flashmoe index"):
        Manifest.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ManifestInvalid, match="cannot write"):
        manifest.write(tmp_path / "file" / "store")


def test_a_failed_write_leaves_the_old_one(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the manifest itself is opened for writing."""
    manifest.write(tmp_path)

    def crash(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(errors.ManifestInvalid, match="No space left"):
        replace(manifest, source_root="elsewhere").write(tmp_path)
    assert Manifest.load(tmp_path) == manifest


def test_the_fingerprint_covers_bytes_and_layout_but_not_places(manifest: Manifest) -> None:
    """Red when moving a store makes another model of it, or changed weights the same one."""
    moved = replace(manifest, source_root="elsewhere", files=())
    assert moved.sealed().spec.fingerprint == manifest.spec.fingerprint
    record = manifest.records[KEYS[0]]
    other = {**manifest.records, KEYS[0]: replace(record, checksum=record.checksum ^ 1)}
    sealed = replace(manifest, records=other).sealed()
    assert sealed.spec.fingerprint != manifest.spec.fingerprint


def test_another_format_version_is_named(document: dict[str, Any]) -> None:
    with pytest.raises(errors.ManifestInvalid, match="format version 99"):
        Manifest.parse(document | {"version": 99}, "it")


def test_older_formats_are_read(manifest: Manifest, document: dict[str, Any]) -> None:
    """Formats 1 and 2 had no variants. Red for a fingerprint that depends on the format: a store
    made before would be another model to its evidence and its forecaster.
    """
    for version in (1, 2):
        assert Manifest.parse(signed(document | {"version": version}), "it") == manifest
    assert manifest.sealed().spec.fingerprint == "2ded8aba830e654f9f2926c180439358"


def test_a_variant_is_read_as_it_was_written(tmp_path: Path) -> None:
    exact = write_store(tmp_path)
    manifest = with_small_variant(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert manifest.records == exact.records | {key: manifest.records[key] for key in small_keys()}
    assert manifest.slot_bytes == exact.slot_bytes
    assert manifest.spec.fingerprint != exact.spec.fingerprint
    assert manifest.spec.variant("exact").layouts == exact.spec.layouts


def test_a_variant_that_lacks_an_expert_is_named(tmp_path: Path) -> None:
    write_store(tmp_path)
    manifest = with_small_variant(tmp_path)
    records = {k: r for k, r in manifest.records.items() if k != small_keys()[3]}
    replace(manifest, records=records).write(tmp_path)
    with pytest.raises(errors.ManifestInvalid, match="variant 'int4': it has 11 experts"):
        Manifest.load(tmp_path)


def test_totals(manifest: Manifest) -> None:
    assert manifest.expert_bytes_total == len(KEYS) * PAYLOAD_BYTES
    assert manifest.slot_bytes % 4096 == 0
    assert manifest.slot_bytes >= PAYLOAD_BYTES


@pytest.mark.parametrize("path", ["/etc/passwd", "..", "../x", "a/../../x", "", ".", "a/..", "/"])
def test_paths_that_leave_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ManifestInvalid, match="leaves the source folder"):
        resolve_inside(tmp_path, path)


def test_links_may_not_leave_either(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("")
    (root / "out").symlink_to("../secret")
    (root / "in").symlink_to("file")
    (root / "loop").symlink_to("loop")
    assert resolve_inside(root, "in") == root / "file"
    with pytest.raises(errors.ManifestInvalid, match="after its links"):
        resolve_inside(root, "out")
    assert not resolve_inside(root, "loop").exists()


def test_the_source_may_be_elsewhere(manifest: Manifest, tmp_path: Path) -> None:
    assert manifest.root(tmp_path) == tmp_path
    assert manifest.root(tmp_path, Path("/elsewhere")) == Path("/elsewhere")


def test_changed_sources_are_named(store_dir: Path) -> None:
    """Missing, of another size, touched: each says which file and what to do."""
    manifest, path = Manifest.load(store_dir), store_dir / FILE_NAME
    check_sources(manifest, store_dir)
    os.utime(path, ns=(1, 1))
    check_sources(manifest, store_dir, times=False)
    with pytest.raises(errors.SourceChanged, match=rf"{FILE_NAME} was touched.*flashmoe verify"):
        check_sources(manifest, store_dir)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(errors.SourceChanged, match=rf"{FILE_NAME} has .* index again"):
        check_sources(manifest, store_dir, times=False)
    path.unlink()
    with pytest.raises(errors.SourceChanged, match=rf"{FILE_NAME} is missing.*--source"):
        check_sources(manifest, store_dir, times=False)
