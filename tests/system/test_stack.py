"""The whole stack through the command a newcomer uses.

Each test names the fault it is there for.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.stack import leftovers
from tests.contract.test_exactness import align
from tests.stack import MODEL, assert_nothing_left, flashmoe, served, wait_for

pytestmark = pytest.mark.system
MIB = 1024 * 1024
SUMMARY = (
    "tokens/s",
    "time to first token",
    "hit ratio",
    "read per token",
    "stall share",
    "peak memory",
)
PROMPT = "In the beginning God created the heaven"


def eager_tokens(prompt: str, count: int) -> list[int]:
    """What plain transformers generates, greedily."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    model.set_experts_implementation("eager")
    align(model)
    ids = AutoTokenizer.from_pretrained(MODEL)(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return output[0, ids["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


def test_serve_generate_status_stop(tiny_store: Path, run_dir: Path) -> None:
    with served(tiny_store, run_dir, "--memory", "1GiB") as stack:
        text = flashmoe("generate", PROMPT, "--run-dir", str(run_dir), "--max-tokens", "24")
        assert text.returncode == 0, text.stderr
        assert "tokens/s" in text.stderr and "tokens/s" not in text.stdout
        flags = ["--max-tokens", "48", "--ignore-eos", "--json"]
        answer = flashmoe("generate", PROMPT, "--run-dir", str(run_dir), *flags)
        found = json.loads(answer.stdout)
        assert found["token_ids"] == eager_tokens(PROMPT, 48)
        assert text.stdout.strip() == found["text"][: len(text.stdout.strip())]
        assert found["finish_reason"] == "length"
        schema = run_dir / "schema.json"
        schema.write_text('{"enum": ["light", "dark"]}')
        held = ["generate", PROMPT, "--run-dir", str(run_dir), "--json-schema", str(schema)]
        assert flashmoe(*held).stdout.strip() in ('"light"', '"dark"')
        assert 0 < found["hit_ratio"]["decode"] < 1
        assert found["bytes_read"]["decode"] > 0
        assert found["ttft_s"] > 0 and found["tokens_per_s"] > 0
        assert 0 < found["peak_memory_bytes"] <= found["ceiling_bytes"] == 1024 * MIB
        assert_overhead_small(found["memory_bytes_by_part"])
        status = flashmoe("status", "--run-dir", str(run_dir), "--json")
        assert status.returncode == 0
        facts = json.loads(status.stdout)
        assert {facts[n]["health"] for n in ("expert_store", "compute_node", "scheduler")} == {
            "SERVING"
        }
        assert facts["expert_store"]["slots_filling"] == 0
        assert facts["compute_node"]["evidence_dropped"] == 0
        wait_for(lambda: stack.status()["scheduler"]["events_seen"] > 0, 20, "evidence to arrive")
        wait_for(lambda: stack.status()["compute_node"]["advice_age_s"] is not None, 20, "advice")


def assert_overhead_small(parts: dict[str, int]) -> None:
    """Interpreters, libraries and buffers of all processes: 800 MiB at most; the store 100 MB."""
    overhead = sum(size for name, size in parts.items() if name not in ("segment", "dense_weights"))
    assert overhead <= 800 * MIB, parts
    assert parts["expert_store"] <= 100e6, parts


def test_two_stacks_live_side_by_side(
    tiny_store: Path, run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with served(tiny_store, run_dir) as first, served(tiny_store, run_dir / "second") as second:
        assert first.generate(max_tokens=8) == second.generate(max_tokens=8)
        flags = ["--experts-memory", "50%", "--run-dir", str(run_dir)]
        refused = flashmoe("serve", "--model", str(tiny_store), *flags)
        assert refused.returncode == 2
        assert "runs in" in refused.stderr and "--run-dir" in refused.stderr


def test_launcher_killed_takes_everything_with_it(tiny_store: Path, run_dir: Path) -> None:
    """Fault: without PR_SET_PDEATHSIG the daemons stay."""
    with served(tiny_store, run_dir) as stack:
        children = stack.children()
        os.kill(stack.process.pid, signal.SIGKILL)
        stack.process.wait(10)
        assert len(children) == 4
        assert_nothing_left(stack.run, children)


def test_daemon_that_keeps_dying_ends_the_stack(tiny_store: Path, run_dir: Path) -> None:
    """Five restarts a minute are allowed; then the launcher gives up with a status. Fault: no
    limit.
    """
    with served(tiny_store, run_dir) as stack:
        killed: set[int] = set()

        def kill_again() -> bool:
            try:
                pid = stack.pid("scheduler")
            except (LookupError, psutil.NoSuchProcess):
                return stack.process.poll() is not None
            if pid not in killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
            return stack.process.poll() is not None

        wait_for(kill_again, 60, "the launcher to give up")
        assert len(killed) == 6
        assert stack.process.returncode == 4
        assert stack.process.stderr is not None
        assert "scheduler died 6 times in a minute" in stack.process.stderr.read()


def test_run_verb_prints_a_summary_and_leaves_nothing(tiny_store: Path) -> None:
    """Segments and folders that nobody alive holds; other stacks of this machine have theirs."""
    done = flashmoe(
        "run",
        PROMPT,
        "--model",
        str(tiny_store),
        "--memory",
        "1GiB",
        "--experts-memory",
        "37.5%",
        "--max-tokens",
        "16",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT)
    for fact in SUMMARY:
        assert fact in done.stderr
    assert leftovers.find() == []
