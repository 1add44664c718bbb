"""Sets run-ahead up for a loaded model."""

from __future__ import annotations

from compute_node.cache.expert_cache import ExpertCache
from compute_node.config import RunAheadSetting
from compute_node.model.loaded import LoadedModel
from compute_node.run_ahead.layers import DecoderLayers
from compute_node.run_ahead.run_ahead import ON, RunAhead


def new_run_ahead(
    loaded: LoadedModel, cache: ExpertCache, setting: RunAheadSetting = "auto"
) -> RunAhead:
    """Off where the model's layers cannot be found; its status says so."""
    layers, status = DecoderLayers(), ON
    layers.watch(loaded.model, loaded.experts_modules)
    if setting == "off":
        status = "off: by configuration"
    elif not layers.are_found:
        status = "off: the model's layers are not in one list"
    return RunAhead(
        layers,
        loaded.forward,
        cache,
        loaded.prefetcher.foresight,
        loaded.spec.moe_layers,
        status,
        setting == "always",
    )
