"""The disks of the boxes: the shipped model, and the same with experts of 24 MiB, made once."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.widen import MIB, widen
from tests.boxlab.disk import make_image
from tests.stack import FLASHMOE, MODEL, ROOT

FOLDER = ROOT / ".flashmoe/boxes"
RECORD_BYTES = 24 * MIB
NUM_EXPERTS, NUM_LAYERS = 256, 8


def shipped_image() -> Path:
    """Raises OSError, CalledProcessError; the same for the other."""
    return _once(FOLDER / "shipped.image", lambda: MODEL)


def widened_image() -> Path:
    """Takes 20 GB meanwhile, and 6.6 GB afterwards."""
    return _once(FOLDER / "widened.image", _widened)


def widened_int4_image() -> Path:
    """The same in int4, for a shadow. Takes 10 GB meanwhile, and 2 GB afterwards."""
    return _once(FOLDER / "widened-int4.image", _widened, "int4")


def _widened() -> Path:
    checkpoint = FOLDER / "checkpoint"
    if not checkpoint.exists():
        widen(MODEL, checkpoint, RECORD_BYTES)
    return checkpoint


def _once(image: Path, checkpoint: Callable[[], Path], format_name: str = "exact") -> Path:
    if image.exists():
        return image
    content = FOLDER / "content"
    shutil.rmtree(content, ignore_errors=True)
    content.mkdir(parents=True)
    _flashmoe("pack", str(checkpoint()), "--out", str(content / "store"), "--format", format_name)
    make_image(content, image)
    shutil.rmtree(content)
    shutil.rmtree(FOLDER / "checkpoint", ignore_errors=True)
    return image


def _flashmoe(*arguments: str) -> None:
    command: Sequence[str] = [*FLASHMOE, *arguments]
    subprocess.run(command, cwd=ROOT, check=True)
