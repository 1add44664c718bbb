"""Keeps out of a node's memory what it does not need: the compiler, distributed tensors, scipy and
sympy that transformers imports (110 MiB of 350, measured; a second and a half of start), and
kernels that oneDNN generated for shapes of long ago (250 MiB after six prompts); and OpenMP's idle
threads off the cores.

Imported before torch, by the daemon alone. Nothing is taken away: the compiler is loaded when
somebody asks for more of it than its decorators; a kernel is generated again.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

# Read at torch's import. Two caches of generated kernels, 1,024 shapes each by default.
# And how often OpenMP's threads look out for work before they sleep, a hundred times a microsecond:
# by default for 3 ms, on cores that others need (tests/bench/LOG.md).
_SETTINGS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "24", "LRU_CACHE_CAPACITY": "24"}
if "OMP_WAIT_POLICY" not in os.environ:
    _SETTINGS["GOMP_SPINCOUNT"] = "1000"
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

import torch.distributed  # noqa: E402
import transformers.utils  # noqa: E402
import transformers.utils.import_utils  # noqa: E402

_COMPILER = "torch._dynamo"
_OF_MASKS = "torch._dynamo._trace_wrapped_higher_order_op"  # needs nothing else of it


class _CompilerLater(types.ModuleType):
    """Stands for the compiler until it is needed: its decorators leave a function as it is."""

    def __init__(self) -> None:
        super().__init__(_COMPILER)
        spec = importlib.util.find_spec("torch")
        assert spec is not None and spec.submodule_search_locations is not None
        self.__path__ = [f"{place}/_dynamo" for place in spec.submodule_search_locations]

    assume_constant_result = allow_in_graph = disable = staticmethod(
        lambda function=None, *_, **__: _unchanged if function is None else function
    )

    @staticmethod
    def is_compiling() -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_load_compiler(), name)


class _CompilerNow(MetaPathFinder):
    """Who imports a module of the compiler, but for the one that transformers' masks import, gets
    the whole compiler, and then that module.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        stands = isinstance(sys.modules.get(_COMPILER), _CompilerLater)
        if not stands or not name.startswith(f"{_COMPILER}.") or name == _OF_MASKS:
            return None
        _load_compiler()
        return ModuleSpec(name, _Loaded(importlib.import_module(name)))


class _Loaded(Loader):
    """Hands out a module that is there already."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return self._module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self._spec


def _load_compiler() -> types.ModuleType:
    if isinstance(sys.modules.get(_COMPILER), _CompilerLater):
        del sys.modules[_COMPILER]
    return importlib.import_module(_COMPILER)


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _no() -> bool:
    return False


def _apply() -> None:
    if _COMPILER not in sys.modules:
        sys.modules[_COMPILER] = _CompilerLater()
        sys.meta_path.insert(0, _CompilerNow())
    torch.distributed.is_available = _no  # one process computes
    # Losses of training want it.
    transformers.utils.is_scipy_available = _no
    transformers.utils.import_utils.is_scipy_available = _no


_apply()
