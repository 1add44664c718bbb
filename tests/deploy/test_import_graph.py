"""The import graph of the whole program has no circle. The layers in pyproject.toml say which way
imports go.

Seen red before: a policy imported the trainer that imports the policy, inside a function.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

PARTS = ("proto", "expert_store", "compute_node", "scheduler", "deploy")


def check(imports: dict[str, set[str]]) -> None:
    """Raises CycleError naming the modules of a circle."""
    TopologicalSorter(imports).prepare()


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = grimp.build_graph(PARTS[0], *PARTS[1:], cache_dir=None)
    found = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(found) > 200
    check(found)


def test_a_circle_is_named() -> None:
    with pytest.raises(CycleError, match=r"scheduler\.lab\.b"):
        check(
            {"scheduler.policy.a": {"scheduler.lab.b"}, "scheduler.lab.b": {"scheduler.policy.a"}}
        )
