"""The files that a browser loads: they come with the package, as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "assets"
_NO_KEY, _KEY = b'data-key="not needed"', b'data-key="needed"'
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


def load_assets(*, needs_key: bool) -> Mapping[str, Asset]:
    """By file name; a few kilobytes, read once. needs_key: the page asks for it at once"""
    files = {path: path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.is_file()}
    if needs_key:
        page = _FOLDER / "index.html"
        files[page] = files[page].replace(_NO_KEY, _KEY)
    return {path.name: _asset(path, data) for path, data in files.items()}


def _asset(path: Path, data: bytes) -> Asset:
    return Asset(data, _MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:16]}"')
