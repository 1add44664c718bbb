"""The files that a browser loads: they come with the package, as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "assets"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Asset:
    """tag: changes with its bytes, so that a browser asks whether its copy is the latest"""

    data: bytes
    media_type: str
    tag: str


def load_assets() -> Mapping[str, Asset]:
    """By file name; a few kilobytes, read once."""
    return {path.name: _load(path) for path in sorted(_FOLDER.iterdir()) if path.is_file()}


def _load(path: Path) -> Asset:
    data = path.read_bytes()
    return Asset(data, _MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:16]}"')
