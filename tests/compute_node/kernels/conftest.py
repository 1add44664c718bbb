"""Kernels are tested with every entry that this CPU can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from compute_node.native import binding


@pytest.fixture(scope="package", autouse=True)
def every_entry() -> Iterator[None]:
    """Left to themselves, portable entries do not compute prompts."""
    before = binding.setting()
    if before == "auto" and binding.isa() == binding.PORTABLE:
        binding.use("portable")
    yield
    binding.use(before)
