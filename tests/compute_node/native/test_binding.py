"""The compiled kernels belong to these sources, or are not used.

Planted faults seen red: a source changed, either number left behind, any version taken, a
source that nobody compiles, the setting passed over, one identification for all entries.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import xxhash

from compute_node.native import binding

NATIVE = Path(binding.__file__).parent


def test_the_version_is_that_of_the_sources() -> None:
    """Arguments changed under a function's old name would be read as something else."""
    sources = sorted(path for path in NATIVE.rglob("*.[ch]") if path.name != "version.h")
    digest = xxhash.xxh3_64(b"".join(path.read_bytes() for path in sources)).intdigest()
    version = f"{digest >> 1:#x}"  # positive as int64
    assert f"#define KERNELS_VERSION {version}\n" in (NATIVE / "version.h").read_text()
    assert hex(binding._VERSION) == version


@pytest.mark.skipif(binding.obstacle() != "", reason=binding.obstacle())
def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_VERSION", binding._VERSION + 1)
    binding.load.cache_clear()
    try:
        assert binding.load() is None
        assert binding.obstacle() == binding.OUTDATED
    finally:
        binding.load.cache_clear()


def test_every_source_is_compiled_and_watched() -> None:
    """A change of any of them compiles the library again, by setuptools and by the Makefile."""
    root = NATIVE.parents[1]
    extensions = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    named = [
        root / name
        for extension in extensions["ext-modules"]
        for name in extension["sources"] + extension["depends"]
    ]
    folders = [NATIVE, root / "expert_store/native"]
    sources = {path for folder in folders for path in folder.rglob("*.[ch]")}
    assert sorted(named) == sorted(sources)
    watched = re.search(r"^NATIVE := (.+)$", (root / "Makefile").read_text(), re.M)
    assert watched and {root / name for name in watched[1].split()} == {p.parent for p in sources}


@pytest.mark.skipif(binding.obstacle() != "", reason=binding.obstacle())
def test_the_setting_says_who_is_in_charge() -> None:
    before = binding.setting()
    ids = set()
    try:
        for setting in get_args(binding.Setting):
            binding.use(setting)
            ids.add(binding.build_id())
            has_instructions = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
            own = "avx512_bf16" if has_instructions else binding.PORTABLE
            expected = {"auto": own, "portable": binding.PORTABLE, "off": None}[setting]
            assert binding.isa() == expected
            assert binding.obstacle() == (binding.TURNED_OFF if setting == "off" else "")
            assert (expected or binding.TURNED_OFF) in binding.in_charge()
        assert len(ids) == (3 if has_instructions else 2)
    finally:
        binding.use(before)
