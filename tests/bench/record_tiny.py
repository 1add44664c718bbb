"""`make trace`: the shipped model over eleven domains, as traces to train and to judge with.

Each domain's text is cut into passages; generations go on from every other one for training, from
the rest for testing, with other seeds. In the training trace the generations are shuffled; in the
testing trace one domain follows another, so that it has shifts of domain.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from deploy.lab.recorder import Sampling
from deploy.lab.recording import StackChoice, record_trace
from deploy.terminal.output_file import publishing
from deploy.terminal.prompts import Prompt

PROMPTS = Path(__file__).parent / "prompts"
PASSAGES = 6
TRAIN_SEED, TEST_SEED = 1_000, 2_000

# Tiny matrices gain nothing from a second thread, and lose a lot when the machine is busy.
SETTINGS = "[compute_node]\nthreads = 1\n"


def passages(text: str, count: int) -> list[str]:
    """`text` in `count` pieces of whole lines, none of them empty, about equally long."""
    pieces = [""] * count
    at = 0
    for line in text.splitlines(keepends=True):
        middle = at + len(line) // 2
        pieces[middle * count // len(text)] += line
        at += len(line)
    if not all(piece.strip() for piece in pieces):
        raise ValueError(f"the lines of {text[:40]!r}... are too long for {count} passages")
    return pieces


def split() -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train with, shuffled, and prompts to test with, domain after domain."""
    train: list[Prompt] = []
    test: list[Prompt] = []
    for file in sorted(PROMPTS.glob("*.txt")):
        found = [Prompt(file.stem, text) for text in passages(file.read_text(), PASSAGES)]
        train += found[::2]
        test += found[1::2]
    random.Random(0).shuffle(train)
    return train, test


def write(store: Path, out: Path, prompts: list[Prompt], seed: int) -> None:
    """Nothing is evicted, which is fastest and draws the same tokens."""
    flags = {"model": store, "memory": "1GiB", "experts_memory": "100%"}
    sampling = Sampling(220, 0.9, 1.0, seed, ignore_eos=True, prompt_tokens=64)
    with publishing(out) as partial, tempfile.NamedTemporaryFile(suffix=".toml") as settings:
        config = Path(settings.name)
        config.write_text(SETTINGS)
        trace = record_trace(out.stem, prompts, sampling, StackChoice(config, None, flags))
        trace.save(partial)


def main() -> None:
    parser = argparse.ArgumentParser(description="Records the shipped model.")
    parser.add_argument("store", type=Path, help="made by `flashmoe index` of the shipped model")
    parser.add_argument("out", type=Path, help="folder for tiny-moe-train.npz, tiny-moe-test.npz")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, test = split()
    write(arguments.store, arguments.out / "tiny-moe-train.npz", train, TRAIN_SEED)
    write(arguments.store, arguments.out / "tiny-moe-test.npz", test, TEST_SEED)


if __name__ == "__main__":
    main()
