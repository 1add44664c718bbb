"""Where a packed store may go, known before anything is read: what is refused stays as it was.

Planted faults seen red: a mount point found by its device only, the link renamed instead of what it
leads to, rights looked at when everything is packed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expert_store.manifest.manifest import MANIFEST_NAME, Manifest
from expert_store.offline.index import index
from expert_store.offline.pack import pack
from expert_store.offline.pack_target import check_target
from expert_store.offline.verify import verify
from proto import errors
from tests.places import bind_mount, other_disk, read_only

CHECK = """
import sys
from pathlib import Path
from expert_store.offline.pack_target import check_target
from proto import errors
try:
    print(check_target(Path("/checkpoint"), Path(sys.argv[1]), True))
except errors.ManifestInvalid as error:
    print("refused:", error)
"""


def said(mounted: Callable[..., list[str]], folder: Path, target: Path) -> str:
    """What `check_target` says of `target` while `folder` is mounted."""
    command = mounted(folder, sys.executable, "-c", CHECK, str(target))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("mounted", [other_disk, bind_mount])
def test_a_mount_point_is_refused_and_a_folder_in_it_is_not(
    mounted: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Red: the store was packed onto the parent's disk, and the last rename refused."""
    folder = tmp_path / "my disk"
    folder.mkdir()
    assert "is a mount point" in (refusal := said(mounted, folder, folder))
    assert f"--out {folder / 'store'}" in refusal
    assert said(mounted, folder, folder / "store") == str(folder / "store")


def test_a_disk_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} cannot be written to" in said(read_only, tmp_path, tmp_path / "a" / "b")


def test_the_folder_that_one_is_in_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red: "." has no name to put .partial behind, a traceback."""
    (tmp_path / "here" / "below").mkdir(parents=True)
    for inside in ("here", "here/below"):
        monkeypatch.chdir(tmp_path / inside)
        for out in (Path("."), tmp_path / "here"):
            with pytest.raises(errors.ManifestInvalid, match=r"you are in.*--out .*/store"):
                pack(checkpoint, out)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_root_folder_is_refused(checkpoint: Path) -> None:
    with pytest.raises(errors.ManifestInvalid, match="give another --out"):
        pack(checkpoint, Path("/"))


@pytest.mark.parametrize("there", [True, False], ids=["overwrite", "dangling"])
def test_a_link_stays_a_link(there: bool, checkpoint: Path, tmp_path: Path) -> None:
    """Red: the link became a folder, and the disk it led to stayed empty."""
    (tmp_path / "disk").mkdir()
    if there:
        pack(checkpoint, tmp_path / "disk" / "store")
    (tmp_path / "link").symlink_to("disk/store")
    pack(checkpoint, tmp_path / "link", overwrite=there)
    assert (tmp_path / "link").is_symlink()
    assert verify(tmp_path / "disk" / "store") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["store"]


@pytest.mark.parametrize("out", ["file", "file/store", "kept", "ro/store"])
def test_what_cannot_become_a_store_is_refused_before_a_byte_is_read(
    out: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / MANIFEST_NAME).write_text("old")
    (tmp_path / "ro").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "ro" and real(path, _))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(errors.ManifestInvalid, match="give another --out"):
        check_target(checkpoint, tmp_path / out, overwrite=False)
    with pytest.raises(errors.ManifestInvalid, match="give another --out"):
        pack(Path("/no/such/checkpoint"), tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_index_does_not_make_a_packed_store_worthless(
    checkpoint: Path, packed: Path, tmp_path: Path
) -> None:
    """Red: its manifest was replaced by one in place, its records were nobody's."""
    store = Path(shutil.copytree(packed, tmp_path / "store"))
    with pytest.raises(errors.ManifestInvalid, match="holds a packed store: give another --out"):
        index(checkpoint, store)
    assert Manifest.load(store) == Manifest.load(packed)
