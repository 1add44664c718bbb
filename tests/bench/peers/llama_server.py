"""llama.cpp's own server on a GGUF file, memory-mapped, until its standard input closes.

Run by the peers' own environment: `python -m tests.bench.peers.llama_server FILE THREADS [SLOTS]`.
Its first line is the address that it listens on. SLOTS: sequences that it computes at once
"""

from __future__ import annotations

import sys

import xllamacpp

CONTEXT_TOKENS = 2048  # as the compute node's default


def main() -> None:
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    slots = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    params.n_ctx = CONTEXT_TOKENS * slots  # shared by them
    params.n_parallel = slots
    params.cpuparams.n_threads = int(sys.argv[2])
    params.cpuparams_batch.n_threads = int(sys.argv[2])
    params.warmup = False  # it would read every expert
    params.fit_params = False
    params.cache_ram_mib = 0  # no copies of earlier prompts
    params.verbosity = 2
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
