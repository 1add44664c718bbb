"""The node's model code on mapped experts, without daemons.

`python -m tests.bench.peers.mapped_worker STORE THREADS sample|force`
"""

from __future__ import annotations

import compute_node.model.lean_imports  # noqa: F401  isort: skip  before transformers

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from compute_node.client.sampling_options import SamplingOptions
from compute_node.engine.engine import Engine
from compute_node.engine.request import Request
from compute_node.engine.sequence import SequenceState
from compute_node.engine.writer import Token
from compute_node.kernels.prober import Prober
from compute_node.model.loaded import load_model
from expert_store.manifest.manifest import Manifest
from tests.bench.peers.mapped_experts import MappedExperts
from tests.bench.peers.prompt_lines import TEMPERATURE, serve

CONTEXT_TOKENS, CHUNK_TOKENS = 2048, 256  # the node's defaults


def engine(store_dir: Path) -> Engine:
    """On every expert of a packed store."""
    manifest = Manifest.load(store_dir)
    cache = cast(Any, MappedExperts(store_dir, manifest))
    loaded = load_model(store_dir, manifest.spec, cache, Prober(times=True))
    return Engine(loaded, cache, store_dir, CONTEXT_TOKENS, CHUNK_TOKENS)


def sample(running: Engine, prompt: list[int], max_tokens: int, seed: int) -> Iterator[int]:
    """As the node does."""
    sampling = SamplingOptions(temperature=TEMPERATURE, seed=seed)
    request = Request(tuple(prompt), max_tokens, sampling, ignore_eos=True)
    for event in running.generate(request):
        if isinstance(event, Token):
            yield event.token_id


def force(running: Engine, text: list[int], max_tokens: int, seed: int) -> Iterator[int]:
    """The likeliest token after each of `text`, decoded one by one whatever was chosen."""
    sequence = SequenceState("text", text[:1])
    yield int(running.prefill(sequence).argmax())
    for token in text[1:]:
        sequence.token_ids.append(token)
        [logits] = running.decode([sequence])
        yield int(logits.argmax())


WAYS = {"sample": sample, "force": force}


def main() -> None:
    store_dir, threads, way = sys.argv[1:]
    torch.set_num_threads(int(threads))
    serve(partial(WAYS[way], engine(Path(store_dir))))


if __name__ == "__main__":
    main()
