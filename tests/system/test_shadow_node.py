"""A shadow node, a store and a process of its own, beside a main node: the same tokens, whatever
becomes of it, and its names are right.

Planted fault seen red: the names of the token before taken for this one's.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from compute_node.client.node_client import NodeClient
from expert_store.manifest.manifest import Manifest
from expert_store.offline.pack import pack
from tests.daemons import DaemonProcess, daemon, node_table
from tests.ports import free_port
from tests.stack import MODEL, flashmoe, served, wait_for
from tests.system.test_boxes import PROMPT, TOKENS, running, segment

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "int8"
    pack(MODEL, folder, weight_format="int8")
    return folder


@contextmanager
def shadow_store(store_dir: Path, folder: Path) -> Iterator[dict[str, object]]:
    """The table of a shadow on a store of its own, for the block."""
    folder.mkdir()
    slots = Manifest.load(store_dir).spec.num_experts_total
    with daemon("expert_store", folder, segment(store_dir, folder, slots + 4)):
        yield {
            "address": f"unix:{folder}/shadow.sock",
            "store_address": f"unix:{folder}/store.sock",
            "session_dir": str(folder / "sessions"),
            "slots": slots,
        }


def shadow_node(folder: Path, table: dict[str, object]) -> AbstractContextManager[DaemonProcess]:
    return daemon("shadow", folder, table, module="compute_node.shadow")


@contextmanager
def main_node(store_dir: Path, folder: Path, shadow: str | None = None) -> Iterator[NodeClient]:
    folder.mkdir()
    slots = Manifest.load(store_dir).spec.num_experts_total // 4
    more = {} if shadow is None else {"shadow_address": shadow}
    with (
        daemon("expert_store", folder, segment(store_dir, folder, slots + 8)),
        daemon("compute_node", folder, node_table(folder, "main", slots, **more)) as node,
        NodeClient(node.address) as client,
    ):
        yield client


def tokens(node: NodeClient) -> list[int]:
    return node.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, timeout_s=120).run().token_ids


def test_it_names_experts_and_the_tokens_are_the_same_when_it_dies(
    tiny_store: Path, small_store: Path, run_dir: Path
) -> None:
    with main_node(tiny_store, run_dir / "alone") as node:
        expected = tokens(node)
    folder = run_dir / "shadow"
    with shadow_store(small_store, folder) as table:
        address = str(table["address"])
        with (
            shadow_node(folder, table) as shadow,
            main_node(tiny_store, run_dir / "main", address) as node,
        ):
            stats = lambda: node.stats().of(shadow=address)  # noqa: E731
            num_named = lambda: stats().named + stats().named_late  # noqa: E731
            assert tokens(node) == expected
            wait_for(lambda: num_named() > TOKENS, 20, "names to come")
            assert stats().recall > 0.97
            shadow.stop(signal.SIGKILL)
            assert tokens(node) == expected
            wait_for(lambda: stats().up == 0, 20, "the node to notice")
            before = num_named()
            with shadow_node(folder, table):
                wait_for(lambda: stats().up == 1, 30, "the shadow to follow again")
                assert tokens(node) == expected
                wait_for(lambda: num_named() > before, 20, "names to come")
                assert stats().recall > 0.97


def test_both_by_their_commands(tiny_store: Path, small_store: Path, run_dir: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    flags = ["--listen", address, "--experts-memory", "100%", "--run-dir", str(run_dir / "s")]
    main_flags = ["--shadow", address, "--experts-memory=25%"]
    with (
        running("shadow", "--model", str(small_store), *flags),
        served(tiny_store, run_dir / "m", *main_flags) as main,
    ):
        main.generate(PROMPT, max_tokens=TOKENS)
        [node] = main.status()["compute_node"]["shadow_nodes"].values()
        assert node["up"] and node["named"] + node["named_late"] + node["unheard"] > TOKENS
        page = flashmoe("status", "--run-dir", str(run_dir / "m")).stdout
        assert f"shadow {address}" in page.replace("  ", " "), page
        page = flashmoe("status", "--run-dir", str(run_dir / "s")).stdout
        assert "followed" in page and "in memory" in page


def test_a_shadow_holds_all_experts(small_store: Path, run_dir: Path) -> None:
    flags = ["--listen", "127.0.0.1:1", "--experts-memory", "50%", "--run-dir", str(run_dir)]
    found = flashmoe("shadow", "--model", str(small_store), *flags)
    assert found.returncode == 3 and "a shadow holds all" in found.stderr, found.stderr
