"""A router map as part of a calibration: what generations say of the routers is kept while they
run, then the map is trained and written beside the forecaster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

from compute_node.client.result import Result
from deploy.lab.map_lessons import MapLessons
from deploy.lab.map_training import MIN_STEPS, MapTraining
from deploy.lab.recorder import Wanted
from deploy.terminal import console
from deploy.terminal.output_file import publishing
from proto import errors
from proto.expert import ModelSpec

WANTED = Wanted(predictions=True, inputs=True)


@dataclass
class MapCalibration:
    """Of one store. A context manager: lessons are kept in a folder that is removed with it.

    out: where the map goes; the lessons lie beside it meanwhile
    say: hears of progress
    """

    spec: ModelSpec
    out: Path
    say: Callable[[str], None]
    wanted: Wanted = WANTED
    _stack: ExitStack = field(default_factory=ExitStack)
    _failure: OSError | None = None

    def __enter__(self) -> MapCalibration:
        scratch = tempfile.TemporaryDirectory(prefix=".router_map-", dir=self.out.parent)
        self._lessons = MapLessons(Path(self._stack.enter_context(scratch)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def take(self, result: Result) -> Result:
        """Keep what a generation says of the routers; the result without it."""
        if self._failure is None:
            try:
                self._lessons.add(result.steps)
            except OSError as error:
                self._failure = error
                self._stack.close()  # the forecaster needs the room
        return replace(result, steps=[replace(step, foretold=None) for step in result.steps])

    def train(self) -> None:
        """Write the map, if there is something to learn from and it is better somewhere; else
        remove an older one.

        Raises InvalidRequest when what it learns from could not be kept, or the map not be written.
        """
        try:
            if self._failure is not None:
                raise self._failure
            self._train(self._lessons)
        except (OSError, SafetensorError) as error:
            raise errors.InvalidRequest(
                f"no new router map: {self.out.parent} cannot take what belongs to it ({error}): "
                "make room there and calibrate again; the forecaster is written"
            ) from error

    def _train(self, lessons: MapLessons) -> None:
        if not lessons.num_steps:
            self._go_without("a trace does not hold what it learns from, --text does")
            return
        if lessons.num_left_out:
            self.say(
                f"router map: {lessons.num_left_out} steps did not fit on disk, and are left out"
            )
        training = MapTraining(self.spec, lessons)
        router_map = training.run()
        for line in training.report():
            self.say(f"router map, chosen experts named, held out, {line}")
        if router_map is None:
            self._go_without(f"it is nowhere better, or there are fewer than {MIN_STEPS} steps")
            return
        with publishing(self.out) as partial:
            router_map.save(partial)
        size = console.size(self.out.stat().st_size)
        self.say(
            f"{self.out}: {size}, trained on {router_map.trained_steps} steps; the node uses it "
            "with the forecaster"
        )

    def _go_without(self, why: str) -> None:
        """A node must not use an older map with the new forecaster: nothing says it is better."""
        self.say(f"no router map: {why}")
        if self.out.is_file():
            self.out.unlink()
            self.say(f"{self.out}: removed, it is of an earlier calibration")
