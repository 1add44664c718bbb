"""Long imports, without garbage collection: imports make no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Collect no garbage within the block, and never look at what it imported afterwards. This
    saves a tenth to a seventh of an import of torch.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def importing_torch() -> Iterator[None]:
    """The same for imports that bring torch and transformers, which are halved first."""
    with importing():
        from compute_node.model import lean_imports  # noqa: F401  before torch

        yield
