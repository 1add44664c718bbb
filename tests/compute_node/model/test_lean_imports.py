"""What a node sets for the libraries below it has to be there before they are loaded, and what it
keeps out of its memory stays out, until somebody needs it.

Planted faults seen red: torch imported before the settings are made; no stand-in for the compiler;
one whose `disable` returns nothing; one that is not replaced by the compiler; scipy not kept out.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch._dynamo
import torch.distributed
import transformers.utils
import transformers.utils.import_utils

from compute_node.model import lean_imports

LEFT_OUT = ("torch._dynamo.convert_frame", "torch._inductor", "scipy", "sympy", "sklearn")
LOADS = """
import sys
import compute_node.__main__
from transformers import MixtralConfig, MixtralForCausalLM
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
sizes |= dict(num_key_value_heads=2, num_local_experts=4, vocab_size=32)
model = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
import torch
model(torch.tensor([[1, 2]]))
"""
COMPILES = """
import compute_node.model.lean_imports
import torch
import torch._dynamo
assert torch._dynamo.disable(len) is len and torch._dynamo.disable(recursive=False)(len) is len
doubled = torch.compile(lambda x: 2 * x, backend="eager")
assert doubled(torch.ones(1)).item() == 2
assert torch._dynamo.utils.counters["frames"]["total"] == 1, "nothing was compiled"
"""


def run(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_openmp_hears_of_its_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its runtime itself displays it."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    done = run("import compute_node.model.lean_imports", OMP_DISPLAY_ENV="VERBOSE")
    assert done.returncode == 0, done.stderr
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr


def test_a_node_that_computes_has_not_loaded_what_it_does_not_need() -> None:
    done = run(f"{LOADS}\nprint(*[name for name in {LEFT_OUT} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_compiler_comes_when_it_is_asked_for() -> None:
    done = run(COMPILES)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["assume_constant_result", "allow_in_graph", "disable"])
def test_the_stand_in_has_what_the_compiler_has(name: str) -> None:
    """A decorator that torch renames would be looked up in the whole compiler, and load it."""
    assert name in vars(lean_imports._CompilerLater)
    assert inspect.isfunction(getattr(torch._dynamo, name))


@pytest.mark.parametrize(
    "function",
    [
        torch.distributed.is_available,
        transformers.utils.is_scipy_available,
        transformers.utils.import_utils.is_scipy_available,
    ],
)
def test_what_is_answered_with_no_is_asked_without_arguments(function: object) -> None:
    """They are replaced by name: one that a library renames would be a new attribute, unread."""
    assert callable(function)
    assert not inspect.signature(function).parameters
