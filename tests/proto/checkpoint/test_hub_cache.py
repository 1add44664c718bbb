"""Which links of a checkpoint may be followed.

Planted faults seen red: any folder named blobs, blobs of a folder that is no revision, blobs of
another model of the same cache.
"""

from __future__ import annotations

from pathlib import Path

from proto.checkpoint import hub_cache


def test_blobs_of_its_own_model_and_nothing_else(tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    root = model / "snapshots" / "0123abcd"
    root.mkdir(parents=True)
    assert hub_cache.allows(root, root / "model.safetensors")
    assert hub_cache.allows(root, model / "blobs" / "d1")
    for elsewhere in (
        model / "blobs",
        model / "d1",
        model / "refs" / "main",
        model / "snapshots" / "other" / "model.safetensors",
        tmp_path / "models--org--other" / "blobs" / "d1",
        tmp_path / "blobs" / "d1",
        Path("/blobs/d1"),
    ):
        assert not hub_cache.allows(root, elsewhere)
    assert not hub_cache.allows(model / "revisions" / "a", model / "blobs" / "d1")


def test_what_a_container_needs_is_the_model_of_a_revision(tmp_path: Path) -> None:
    root = tmp_path / "model" / "snapshots" / "a"
    root.mkdir(parents=True)
    assert hub_cache.mounted(root) == root
    (tmp_path / "model" / "blobs").mkdir()
    assert hub_cache.mounted(root) == tmp_path / "model"
    assert hub_cache.mounted(tmp_path) == tmp_path


def test_a_link_to_a_revision_is_that_revision(tmp_path: Path) -> None:
    root = tmp_path / "model" / "snapshots" / "a"
    root.mkdir(parents=True)
    (tmp_path / "link").symlink_to(root)
    assert hub_cache.allows(tmp_path / "link", tmp_path / "model" / "blobs" / "d1")
