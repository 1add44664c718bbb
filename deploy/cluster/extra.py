"""What the cluster verbs need beside the base install."""

from __future__ import annotations

from importlib.util import find_spec

from proto import errors


def check_extra(*packages: str) -> None:
    """Raises ConfigInvalid with the command that installs what is missing of them."""
    for name in packages:
        if find_spec(name) is None:
            raise errors.ConfigInvalid(
                f'{name} is not installed here: run `pip install "flashmoe[cluster]"`'
            )
