"""A worker without a store: its experts come as chunks from another box's, and the tokens are those
of one box, also when that store is killed.

Planted faults seen red: a worker that shows the store no certificate, a status that asks a worker's
box for a store.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w

from deploy.report.status import collect_status
from deploy.stack.run_dir import RunDir
from tests.certificates import files, issued
from tests.ports import free_port
from tests.stack import FLASHMOE, ROOT, ServedStack, flashmoe, served, stop_hard, wait_for
from tests.system.test_boxes import PROMPT, TOKENS, alone

pytestmark = pytest.mark.system
__all__ = ["alone"]
MEMORY = "420MiB"


def configuration(path: Path, **tables: dict[str, object]) -> str:
    path.write_text(tomli_w.dumps(tables))
    return str(path)


@contextmanager
def both(store: Path, run_dir: Path, main: list[str], worker: list[str]) -> Iterator[ServedStack]:
    """A main node that lends, and a worker that borrows; ready, for the block."""
    command = [*FLASHMOE, "worker", "--memory", MEMORY, "--run-dir", str(run_dir / "w"), *worker]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        with served(store, run_dir / "m", "--experts-memory", "25%", *main) as stack:
            assert process.stdout
            assert process.stdout.readline().startswith("ready: ")
            yield stack
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            stop_hard(process)
        assert process.stdout
        process.stdout.close()


def test_by_their_commands_with_certificates(
    alone: dict[str, list[int]], tiny_store: Path, run_dir: Path
) -> None:
    """Also when the lending store is killed amid a generation."""
    certs, store, port = run_dir / "certs", f"127.0.0.1:{free_port()}", free_port()
    issued(certs, "main", "w")
    of_main, of_worker = (
        {role: str(path) for role, path in files(certs, box)} for box in ("main", "w")
    )
    main = configuration(
        run_dir / "m.toml", expert_store={"tls": of_main}, compute_node={"worker_tls": of_main}
    )
    lent = configuration(run_dir / "w.toml", worker={"tls": of_worker, "store_tls": of_worker})
    with both(
        tiny_store,
        run_dir,
        ["--lend", store, "--worker", f"127.0.0.1:{port}", "--config", main],
        ["--store", store, "--listen", f"127.0.0.1:{port}", "--config", lent],
    ) as stack:

        def answered() -> int:
            [box] = stack.status()["compute_node"]["boxes"].values()
            return int(box["answered"]) if box["up"] else 0

        wait_for(
            lambda: answered() or (stack.generate(max_tokens=4) and None), 60, "its first work"
        )
        before = answered()
        assert stack.generate(PROMPT, max_tokens=TOKENS) == alone[PROMPT]
        assert answered() > before + TOKENS
        with stack.client() as client:
            tokens = []
            for piece in client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True):
                tokens.append(piece.token_id)
                if len(tokens) == 8:
                    stack.kill("expert_store")
        assert tokens == alone[PROMPT]
        wait_for(lambda: stack.generate(PROMPT, max_tokens=8) and answered(), 60, "it to be back")
        assert stack.generate(PROMPT, max_tokens=TOKENS) == alone[PROMPT]
        run = RunDir((run_dir / "w").resolve())
        assert flashmoe("status", "--run-dir", str(run.path)).returncode == 0
        status = collect_status(run)
        assert set(status) == {"worker", "memory"} and not run.segment.exists()
        assert status["memory"]["peak_bytes"] <= 420 * 2**20
        assert answered() <= status["worker"]["answered"]
        assert status["worker"]["experts_held"] == status["worker"]["experts_total"] == 256
        assert status["worker"]["store_reconnects"] >= 1
