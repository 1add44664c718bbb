"""The compiled reads belong to these sources.

Planted faults seen red: a source changed, either number left behind.
"""

from __future__ import annotations

from pathlib import Path

import xxhash

from expert_store.native import binding

NATIVE = Path(binding.__file__).parent


def test_the_version_is_that_of_the_source() -> None:
    """Arguments changed under a function's old name would be read as something else."""
    digest = xxhash.xxh3_64((NATIVE / "reads.c").read_bytes()).intdigest()
    version = f"{digest >> 1:#x}"  # positive as int64
    assert f"#define READS_VERSION {version}\n" in (NATIVE / "version.h").read_text()
    assert hex(binding._VERSION) == version
