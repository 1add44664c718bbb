"""Who may pass.

Planted faults seen red: a key file without keys that lets everybody in, a key's beginning taken for
the key.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from compute_node.gateway.keys import Keys
from proto import errors


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    file = tmp_path / "keys"
    file.write_text("# of the office\n\n  secret-one  \nsecret-two\n")
    return Keys.load(file)


@pytest.mark.parametrize(
    ("headers", "admitted"),
    [
        ({"authorization": "Bearer secret-one"}, True),
        ({"authorization": "bearer secret-two"}, True),
        ({"x-api-key": "secret-two"}, True),
        ({"authorization": "Bearer secret"}, False),
        ({"authorization": "Bearer # of the office"}, False),
        ({"authorization": "Basic secret-one"}, False),
        ({"authorization": "Bearer "}, False),
        ({}, False),
    ],
)
def test_a_whole_key_is_admitted(keys: Keys, headers: dict[str, str], admitted: bool) -> None:
    assert (keys.admit(headers) is not None) == admitted


def test_clients_are_named_by_their_key_and_do_not_show_it(keys: Keys) -> None:
    one, two = (keys.admit({"x-api-key": key}) for key in ("secret-one", "secret-two"))
    assert one is not None
    assert one != two
    assert "secret" not in one


@pytest.mark.parametrize("text", ["", "# nothing\n\n", "short\n"])
def test_a_file_without_a_usable_key_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(errors.ConfigInvalid, match="key"):
        Keys.load(file)
    with pytest.raises(errors.ConfigInvalid, match="cannot be read"):
        Keys.load(tmp_path / "nothing")


def test_no_file_means_no_keys() -> None:
    assert not Keys.load(None).are_needed
