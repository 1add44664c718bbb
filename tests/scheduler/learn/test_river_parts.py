from __future__ import annotations

import subprocess
import sys

from river import drift, linear_model, preprocessing

from scheduler.learn import river_parts

PROGRAM = """
import sys
import scheduler.__main__
heavy = {"scipy.stats", "pandas", "torch", "transformers", "sklearn"} & set(sys.modules)
sys.exit(f"loaded {sorted(heavy)}" if heavy else 0)
"""


def test_the_daemon_loads_nothing_heavy() -> None:
    """Red with `from river import linear_model` anywhere in the scheduler."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_parts_are_rivers_own() -> None:
    """Red when the packages stay empty for those who import them later."""
    assert river_parts.LogisticRegression is linear_model.LogisticRegression
    assert river_parts.StandardScaler is preprocessing.StandardScaler
    assert river_parts.ADWIN is drift.ADWIN
    assert linear_model.LinearRegression
