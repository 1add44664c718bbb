"""How many of a decode step's experts are named before its routers speak: by a shadow node, aligned
with every token, in int8 and int4, with keys and values aligned every N tokens; and by run-ahead.

    python -m tests.bench.shadow [SLOTS_SHARE]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from compute_node.client.node_client import NodeClient
from expert_store.manifest.manifest import Manifest
from expert_store.offline.index import index
from expert_store.offline.pack import pack
from tests.bench.table import machine, show
from tests.daemons import daemon, node_table, store_table
from tests.stack import MODEL

PROMPTS = Path(__file__).parent / "prompts"
TOKENS = 48
ALIGNED = (1, 4, 16, 0)


@contextmanager
def shadow_node(store_dir: Path, folder: Path) -> Iterator[str]:
    """Where it listens, for the block."""
    folder.mkdir()
    slots = Manifest.load(store_dir).spec.num_experts_total
    segment = f"/dev/shm/flashmoe-bench-{folder.parent.name}-{folder.name}"
    table = {
        "address": f"unix:{folder}/shadow.sock",
        "store_address": f"unix:{folder}/store.sock",
        "session_dir": str(folder / "sessions"),
        "slots": slots,
    }
    store = store_table(store_dir, folder, slots + 4, segment_path=segment)
    with (
        daemon("expert_store", folder, store),
        daemon("shadow", folder, table, module="compute_node.shadow") as started,
    ):
        yield started.address


@contextmanager
def main_node(store_dir: Path, folder: Path, share: float, **more: object) -> Iterator[NodeClient]:
    folder.mkdir()
    slots = int(Manifest.load(store_dir).spec.num_experts_total * share)
    segment = f"/dev/shm/flashmoe-bench-{folder.parent.name}-{folder.name}"
    store = store_table(store_dir, folder, slots + 16, segment_path=segment)
    with (
        daemon("expert_store", folder, store),
        daemon("compute_node", folder, node_table(folder, "main", slots, **more)) as node,
        NodeClient(node.address) as client,
    ):
        yield client


def answers(node: NodeClient) -> list[list[int]]:
    """Of a prompt of each domain."""
    return [
        node.generate(
            file.read_text()[:400],
            max_tokens=TOKENS,
            ignore_eos=True,
            temperature=0.8,
            seed=1,
            timeout_s=600,
        )
        .run()
        .token_ids
        for file in sorted(PROMPTS.glob("*.txt"))
    ]


def row(node: NodeClient, who: str) -> tuple[list[str], list[list[int]]]:
    tokens, stats = answers(node), node.stats()
    misses, foreseen = stats.decode_misses, stats.foreseen_misses
    found = [who, f"{foreseen / max(1, misses):.3f}"]
    return found, tokens


def main(share: float = 0.375) -> None:
    rows, expected = [], None
    with tempfile.TemporaryDirectory(prefix="fm-") as name, ExitStack() as stack:
        folder = Path(name)
        store = folder / "exact"
        index(MODEL, store)
        with main_node(store, folder / "ahead", share) as node:
            found, expected = row(node, "run-ahead and next routers")
            print(found, flush=True)
        rows.append([*found, "", ""])
        for weights in ("int8", "int4"):
            pack(MODEL, folder / weights, weight_format=weights)
            address = stack.enter_context(shadow_node(folder / weights, folder / f"s-{weights}"))
            for aligned in ALIGNED:
                label = f"{weights}-{aligned}"
                more = {"shadow_address": address, "shadow_align_tokens": aligned}
                with main_node(store, folder / label, share, **more) as node:
                    found, tokens = row(node, f"{weights}, keys and values every {aligned or 'no'}")
                    [shadow] = [node.stats().of(shadow=address)]
                    total = shadow.named + shadow.unnamed + shadow.named_late
                    in_time = shadow.named / max(1, total)
                    rows.append([*found, f"{shadow.recall:.4f}", f"{in_time:.3f}"])
                    print(rows[-1], flush=True)
                    assert tokens == expected, "other tokens"
    show(
        f"Experts named before they are wanted; {share:.1%} of experts resident; {machine()}",
        ["predictor", "misses foreseen", "recall of all", "named in time"],
        rows,
    )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
