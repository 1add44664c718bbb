"""The comparison itself: every contender under every limit, and whether all compute the same."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from tests.bench.peers.agreement import agreement, likeliest_of_llama, likeliest_of_ours
from tests.bench.peers.cgroup import memory_group
from tests.bench.peers.contenders import CONTENDERS
from tests.bench.peers.disk import own_read_ahead_bytes
from tests.bench.peers.engine import Setup
from tests.bench.peers.laboratory import FOLDER, Laboratory, present_commit, read_prompts
from tests.bench.peers.models import PeerModel
from tests.bench.peers.plan import SHARES, cases
from tests.bench.peers.report import print_sameness, print_table
from tests.bench.peers.run import Prompt
from tests.bench.widen import MIB

NAME = "compare"
RECORD_BYTES = 24 * MIB
PROMPT_TOKENS, TEXT_TOKENS = 48, 96
QUICK_PROMPTS = 4
OURS = ("FlashMoE", "FlashMoE lossless", "FlashMoE on mmap")


def compare(chosen: argparse.Namespace) -> None:
    """Print the tables of `chosen` engines, shares and rounds."""
    laboratory = Laboratory(NAME, PeerModel(RECORD_BYTES), chosen.python, present_commit())
    if chosen.fresh:
        laboratory.forget()
    size = laboratory.prepare()
    prompts = read_prompts(PROMPT_TOKENS)[: QUICK_PROMPTS if chosen.quick else None]
    contenders = {name: one for name, one in CONTENDERS.items() if one.by_default}
    if chosen.engines:
        contenders = {name: CONTENDERS[name] for name in chosen.engines.split(",")}
    shares: Sequence[float | None] = SHARES
    if chosen.shares:
        shares = [None if s == "none" else float(s) for s in chosen.shares.split(",")]
    rounds = 1 if chosen.quick else chosen.rounds
    own = None if chosen.only_128 else own_read_ahead_bytes(FOLDER)
    wanted = list(cases(contenders, shares, size, own, len(prompts), rounds))
    runs = laboratory.run(wanted, prompts)
    print(f"\nmodel file {size / MIB:,.0f} MiB, experts of {RECORD_BYTES // MIB} MiB\n")
    print_table(runs)
    print_sameness(runs, OURS)


def agree(chosen: argparse.Namespace) -> None:
    """Print how often llama.cpp and we choose the same next token; measured once a commit."""
    laboratory = Laboratory(NAME, PeerModel(RECORD_BYTES), chosen.python, present_commit())
    file = FOLDER / "agreement.json"
    found = json.loads(file.read_text()) if file.exists() and not chosen.fresh else {}
    if laboratory.commit not in found:
        laboratory.prepare()
        print("comparing next tokens, about four minutes ...", flush=True)
        found[laboratory.commit] = _agreement(laboratory, read_prompts(TEXT_TOKENS))
        file.write_text(json.dumps(found))
    same, places = found[laboratory.commit]
    print(
        f"Teacher-forced over {places} places of eleven texts, llama.cpp and FlashMoE choose the "
        f"same next token at {same} = {same / places:.1%}\n"
    )


def _agreement(laboratory: Laboratory, texts: Sequence[Prompt]) -> tuple[int, int]:
    mounted = laboratory.disk.mounted(own_read_ahead_bytes(FOLDER))
    with mounted as folder, memory_group(None) as group:
        setup = Setup(laboratory.python, folder, group, None, laboratory.log("agreement"))
        theirs = list(likeliest_of_llama(setup, texts))
        ours = list(likeliest_of_ours(setup, texts))
    return agreement(ours, theirs)
