"""JSON schemas from files, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.terminal.schema_file import read_schema
from proto import errors


def test_a_schema_is_an_object(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "title": "é"}')
    assert read_schema(path) == {"type": "object", "title": "é"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[]", "no JSON object"),
        (b"{", "is no JSON"),
        (b"\xff\xfe\xfd", "is no JSON"),
        (b"", "is no JSON"),
    ],
)
def test_what_is_none_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "schema.json"
    path.write_bytes(data)
    with pytest.raises(errors.InvalidRequest, match=said):
        read_schema(path)
    with pytest.raises(errors.InvalidRequest, match="No such file"):
        read_schema(tmp_path / "missing.json")
