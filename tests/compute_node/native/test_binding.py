"""The compiled kernels belong to these sources, or are not used.

Planted faults seen red: a source changed, either number left behind, any version taken.
"""

from __future__ import annotations

from pathlib import Path

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
