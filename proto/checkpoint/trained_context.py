"""Finds in a model's configuration the context that it was trained for. Plan and node warn by it
alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_SCALED_BY_FACTOR = ("linear", "dynamic", "yarn")  # the others' limit is the configured one


def trained_context_tokens(config: Any) -> int | None:
    """The longest context that the positions were trained or scaled for; None when the
    configuration sets no limit.

    config: a transformers configuration. Where rope scalings differ by layer, the shortest counts.
    """
    text = config.get_text_config()
    configured = getattr(text, "max_position_embeddings", None)
    if not isinstance(configured, int) or configured < 1:
        return None
    ropes = _ropes(getattr(text, "rope_parameters", None))
    return min((_scaled(rope, configured) for rope in ropes), default=configured)


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """The rope parameters of the model, or of each kind of its layers."""
    if not isinstance(parameters, Mapping):
        return
    nested = [part for part in parameters.values() if isinstance(part, Mapping)]
    yield from nested or [parameters]


def _scaled(rope: Mapping[str, Any], configured: int) -> int:
    """The length after scaling. Without an original length, the configured one is unscaled."""
    factor = rope.get("factor")
    if rope.get("rope_type", rope.get("type")) not in _SCALED_BY_FACTOR or not factor:
        return configured
    original = rope.get("original_max_position_embeddings") or configured
    return int(original * factor)
