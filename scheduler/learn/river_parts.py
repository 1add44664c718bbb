"""The four parts of River that we use, without the rest of it.

`from river import linear_model, preprocessing, drift` loads every learner of River and all of
scipy.stats: some 50 MB of resident memory that a machine could hold experts in. So these three
packages stand empty while their one module is imported, and are then forgotten: a later
import gets them in full.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PACKAGES = ("river.linear_model", "river.preprocessing", "river.drift")


@contextmanager
def _standing_empty(names: tuple[str, ...]) -> Iterator[None]:
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"River has no package {name}", name=name)
        sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


with _standing_empty(PACKAGES):
    importlib.import_module("river.linear_model.base")  # log_reg reads it from the package
    _logistic: Any = importlib.import_module("river.linear_model.log_reg")
    _scale: Any = importlib.import_module("river.preprocessing.scale")
    _adwin: Any = importlib.import_module("river.drift.adwin")

LogisticRegression = _logistic.LogisticRegression
StandardScaler = _scale.StandardScaler
ADWIN = _adwin.ADWIN
