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
from compute_node.config import ROUTER_MAP_NAME
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

    folder: where the map goes, and the lessons meanwhile
    say:    hears of progress
    """

    spec: ModelSpec
    folder: Path
    say: Callable[[str], None]
    wanted: Wanted = WANTED
    _stack: ExitStack = field(default_factory=ExitStack)
    _failure: OSError | None = None

    def __enter__(self) -> MapCalibration:
        scratch = tempfile.TemporaryDirectory(prefix=".router_map-", dir=self.folder)
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
        """Write the map, if there is something to learn from and it is better somewhere.

        Raises InvalidRequest when what it learns from could not be kept, or the map not be written.
        """
        if self._failure is not None:
            raise self._unwritable(self._failure) from self._failure
        lessons = self._lessons
        if not lessons.num_steps:
            self.say("no router map: a trace does not hold what it learns from, --text does")
            return
        if lessons.num_left_out:
            self.say(
                f"router map: {lessons.num_left_out} steps did not fit on disk, and are left out"
            )
        training = MapTraining(self.spec, lessons)
        router_map = training.run()
        for line in training.report():
            self.say(f"router map, chosen experts named, held out, {line}")
        out = self.folder / ROUTER_MAP_NAME
        if router_map is None:
            self.say(
                f"no router map: it is nowhere better, or there are fewer than {MIN_STEPS} steps"
            )
            return
        try:
            with publishing(out) as partial:
                router_map.save(partial)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error
        self.say(
            f"{out}: {console.size(out.stat().st_size)}, trained on {router_map.trained_steps} "
            "steps; the node uses it with the forecaster"
        )

    def _unwritable(self, error: Exception) -> errors.InvalidRequest:
        return errors.InvalidRequest(
            f"no router map: {self.folder} cannot take what belongs to it ({error}): make room "
            "there and calibrate again; the forecaster is written"
        )
