"""Reads a JSON schema from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from proto import errors

_MOST_BYTES = 1 << 20


def read_schema(path: Path) -> dict[str, Any]:
    """Raises InvalidRequest for what is no JSON object."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_MOST_BYTES))
    except OSError as error:
        raise errors.InvalidRequest(f"--json-schema {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise errors.InvalidRequest(f"--json-schema {path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise errors.InvalidRequest(f"--json-schema {path} holds no JSON object")
    return found
