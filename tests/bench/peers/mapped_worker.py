"""The node's model code on mapped experts, without daemons.

`python -m tests.bench.peers.mapped_worker STORE THREADS`
"""

from __future__ import annotations

import compute_node.lean_imports  # noqa: F401  isort: skip  before transformers

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from compute_node.engine import Engine, Request, Token
from compute_node.model import load_model
from compute_node.sampling import SamplingOptions
from expert_store.manifest import Manifest
from tests.bench.peers.mapped_experts import MappedExperts
from tests.bench.peers.prompt_lines import TEMPERATURE, serve

CONTEXT_TOKENS, CHUNK_TOKENS = 2048, 256  # the node's defaults


def engine(store_dir: Path) -> Engine:
    """On every expert of a packed store."""
    manifest = Manifest.load(store_dir)
    cache = cast(Any, MappedExperts(store_dir, manifest))
    loaded = load_model(store_dir, manifest.spec, cache)
    return Engine(loaded, cache, store_dir, CONTEXT_TOKENS, CHUNK_TOKENS)


def main() -> None:
    store_dir, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    running = engine(store_dir)

    def generate(prompt: list[int], max_tokens: int, seed: int) -> Iterator[int]:
        sampling = SamplingOptions(temperature=TEMPERATURE, seed=seed)
        request = Request(tuple(prompt), max_tokens, sampling, ignore_eos=True)
        for event in running.generate(request):
            if isinstance(event, Token):
                yield event.token_id

    serve(generate)


if __name__ == "__main__":
    main()
