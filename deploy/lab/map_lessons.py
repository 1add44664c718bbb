"""What generations teach a router map: what was seen at each layer, and what routers gave then.
Kept on disk, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compute_node.predict.next_router import NextRouters
from proto.access import RecordedStep

MOST_BYTES = 1 << 30  # on disk; steps beyond are left out

Halves = NDArray[np.float16]


@dataclass
class MapLessons:
    """Of decode steps, in the order in which they came. L layers, N layers ahead.

    folder:      for its files; who makes it removes it
    seq_offsets: where each generation starts, and where the last ends
    """

    folder: Path
    most_bytes: int = MOST_BYTES
    seq_offsets: list[int] = field(default_factory=lambda: [0])
    num_left_out: int = 0
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _num_bytes: int = 0

    @property
    def num_steps(self) -> int:
        return self.seq_offsets[-1]

    @property
    def num_generations(self) -> int:
        return len(self.seq_offsets) - 1

    def add(self, steps: Sequence[RecordedStep]) -> None:
        """One generation's. Raises OSError."""
        taken = 0
        for step in steps:
            if step.foretold is None or step.foretold.inputs is None:
                continue
            arrays = {
                "inputs": step.foretold.inputs,
                "truth": step.foretold.truth,
                "said": step.foretold.scores[NextRouters.name],
            }
            size = sum(array.nbytes for array in arrays.values())
            if self._num_bytes + size > self.most_bytes:
                self.num_left_out += 1
                continue
            self._num_bytes += size
            self._append(arrays)
            taken += 1
        if taken:
            self.seq_offsets.append(self.num_steps + taken)

    def inputs(self) -> Halves:
        """[T, L + 1, D]; see `Foretold`."""
        return self._mapped("inputs")

    def truth(self) -> Halves:
        """[T, L, E]"""
        return self._mapped("truth")

    def said(self) -> Halves:
        """[T, L, N, E], by next routers."""
        return self._mapped("said")

    def _append(self, arrays: Mapping[str, Halves]) -> None:
        for name, array in arrays.items():
            self._shapes[name] = array.shape
            with self._file(name).open("ab") as file:
                file.write(array.tobytes())

    def _mapped(self, name: str) -> Halves:
        shape = (self.num_steps, *self._shapes[name])
        return np.memmap(self._file(name), np.float16, "r", shape=shape)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.f16"
