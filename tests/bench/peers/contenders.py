"""Who takes part, and in what."""

from __future__ import annotations

from dataclasses import dataclass

from tests.bench.peers.engine import Start
from tests.bench.peers.flashmoe import (
    flashmoe,
    flashmoe_lossless,
    flashmoe_mapped,
    flashmoe_within_1_percent,
)
from tests.bench.peers.llama_cpp import llama_cpp, llama_cpp_one_thread
from tests.bench.peers.offloaded import accelerate, transformers


@dataclass(frozen=True)
class Contender:
    """start:         the engine
    by_default:       whether it takes part without being named
    needs_limit:      whether it has nothing to say when all fits
    maps_files:       whether the disk's read-ahead matters to it
    num_prompts:      the cold one included; None: all
    num_rounds:       at most; None: as many as are asked for
    max_tokens:       of each prompt
    """

    start: Start
    by_default: bool = True
    needs_limit: bool = False
    maps_files: bool = False
    num_prompts: int | None = None
    num_rounds: int | None = None
    max_tokens: int = 32


CONTENDERS: dict[str, Contender] = {
    "FlashMoE": Contender(flashmoe),
    "FlashMoE lossless": Contender(flashmoe_lossless),
    "FlashMoE within 1 %": Contender(flashmoe_within_1_percent),
    "FlashMoE on mmap": Contender(flashmoe_mapped, needs_limit=True, maps_files=True, num_rounds=2),
    "llama.cpp": Contender(llama_cpp, maps_files=True),
    "llama.cpp -t 1": Contender(llama_cpp_one_thread, by_default=False, maps_files=True),
    "transformers": Contender(transformers, num_rounds=2),
    # Seconds a token: it reads every expert for each.
    "accelerate": Contender(
        accelerate, needs_limit=True, num_prompts=3, num_rounds=1, max_tokens=8
    ),
}
