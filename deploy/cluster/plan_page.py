"""What `flashmoe plan --cluster` shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.table import Table

from deploy.cluster.planned import PlannedBox, PlannedCluster
from deploy.terminal import console

_COLUMNS = ("memory", "slots", "owns", "a layer", "fit", "twice")


def document(planned: PlannedCluster) -> dict[str, Any]:
    boxes = [
        {**_facts(box), **owned.as_document()}
        for box, owned in zip(planned.boxes, planned.map.boxes, strict=True)
    ]
    return {
        "placement": planned.placement,
        "groups": planned.num_groups if planned.placement == "rotation" else None,
        "boxes": boxes,
        "lacking": [str(key) for key in planned.map.lacking],
        "shadow": _facts(planned.shadow) if planned.shadow is not None else None,
    }


def boxes_table(planned: PlannedCluster) -> Table:
    """Slots, experts that a box owns, in all and of a layer, how many of them fit its slots, and of
    how many more it may be the second owner.
    """
    title = f"Who owns which experts, by {planned.placement}; twice: as second owner, at most"
    grid = _grid(title, ("box", "its store has"), _COLUMNS)
    for box, owned in zip(planned.boxes, planned.map.boxes, strict=True):
        grid.add_row(
            box.name,
            box.store,
            *_memory(box),
            f"{owned.experts:,}",
            owned.a_layer,
            f"{owned.fitting:,}",
            f"{owned.doubled:,}",
        )
    if (shadow := planned.shadow) is not None:
        grid.add_row(shadow.name, shadow.store, *_memory(shadow), *["-"] * 4)
    return grid


def layers_table(planned: PlannedCluster, layers: Sequence[int]) -> Table:
    """Experts of each layer by their owner; layers that are alike in one line. layers: those with
    experts, by their place in the map
    """
    boxes = planned.map.boxes
    grid = _grid("Experts of each layer", ("layer",), [one.box for one in boxes])
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, layer in enumerate(layers):
        alike.setdefault(tuple(one.by_layer[place] for one in boxes), []).append(layer)
    for counts, numbers in alike.items():
        grid.add_row(ranges(numbers), *map(str, counts))
    return grid


def ranges(numbers: Sequence[int]) -> str:
    """Ascending ones: `0-3, 7`."""
    runs = []
    for _, run in groupby(enumerate(numbers), lambda one: one[1] - one[0]):
        found = [number for _, number in run]
        runs.append(f"{found[0]}-{found[-1]}" if len(found) > 1 else f"{found[0]}")
    return ", ".join(runs)


def _grid(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in left:
        grid.add_column(heading, no_wrap=True)
    for heading in right:
        grid.add_column(heading, justify="right", no_wrap=True)
    return grid


def _facts(box: PlannedBox) -> dict[str, Any]:
    return {
        "box": box.name,
        "store": box.store,
        "ceiling_bytes": box.memory.ceiling_bytes,
        "total_bytes": box.memory.total_bytes,
        "held": box.memory.num_experts,
        "slots": box.slots,
    }


def _memory(box: PlannedBox) -> tuple[str, str]:
    """Of its daemons, and experts that it holds."""
    return console.size(box.memory.ceiling_bytes), f"{box.slots:,}"
