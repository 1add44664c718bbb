"""What a node sets for the libraries below it has to be there before they are loaded.

Planted fault seen red: torch imported before the settings are made.
"""

from __future__ import annotations

import os
import subprocess
import sys


def test_openmp_hears_of_its_spinning() -> None:
    """As its runtime itself displays it."""
    chosen = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environ = {name: value for name, value in os.environ.items() if name not in chosen}
    shown = subprocess.run(
        [sys.executable, "-c", "import compute_node.model.lean_imports"],
        env=environ | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "GOMP_SPINCOUNT = '1000'" in shown
