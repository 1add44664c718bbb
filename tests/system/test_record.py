"""Traces of real stacks: one that runs, one of the verb's own, one that is interrupted.

Planted faults seen red: scores not asked for, prompts not cut, an interruption told as the node's
error, a recording that is not waited for.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from scheduler.simulate.trace import AccessTrace
from tests.scheduler.replays import PATH as TRACE
from tests.stack import FLASHMOE, ROOT, ServedStack, flashmoe, served, wait_for

pytestmark = pytest.mark.system
LINES = (
    {"text": "In the beginning God created the heaven and the earth", "domain": "bible"},
    {"text": "def __init__(self, name):\n", "domain": "python"},
)
DRAWN = ["--max-tokens", "13", "--temperature", "0.9", "--seed", "5", "--ignore-eos"]
DRAWN += ["--prompt-tokens", "6"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


@pytest.fixture
def stack(tiny_store: Path, run_dir: Path) -> Iterator[ServedStack]:
    with served(tiny_store, run_dir) as started:
        yield started


def test_trace_of_a_running_stack_is_what_its_node_tells(
    stack: ServedStack, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "trace.npz"
    out.parent.mkdir()
    flags = ["--prompts", str(prompts), *DRAWN, "--scores", "--run-dir", str(stack.run.path)]
    done = flashmoe("record", str(out), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: 2 generations, 24 steps of 8 layers x 32 experts, top 4")
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["1/2 bible", "2/2 python"]
    assert list(out.parent.iterdir()) == [out]
    trace = AccessTrace.load(out)
    assert trace.seq_names == ("bible", "python")
    assert trace.seq_offsets.tolist() == [0, 12, 24]
    assert trace.router_scores is not None and trace.router_scores.shape == (24, 8, 32)
    assert json.loads(trace.sampling)["seed"] == 5
    steps = []
    for number, line in enumerate(LINES):
        drawn = {"max_tokens": 13, "temperature": 0.9, "seed": 5 + number, "ignore_eos": True}
        with stack.client() as node:
            steps += (
                node.generate(
                    line["text"], max_prompt_tokens=6, record=True, router_scores=True, **drawn
                )  # type: ignore[arg-type]
                .run()
                .steps
            )
    assert np.array_equal(trace.topk_ids, [step.topk_ids for step in steps])
    assert np.array_equal(trace.topk_weights, [step.topk_weights for step in steps])
    assert np.array_equal(trace.router_scores, [step.router_scores for step in steps])


def test_stack_of_its_own_records_the_same_and_leaves_nothing(
    stack: ServedStack, tiny_store: Path, prompts: Path, tmp_path: Path
) -> None:
    """With other slots: what is resident has no say in what is chosen."""
    before = set(Path("/dev/shm").iterdir())
    own = ["--model", str(tiny_store), "--memory", "1GiB", "--experts-memory", "25%"]
    running = ["--run-dir", str(stack.run.path)]
    for name, where in (("own", own), ("running", running)):
        out = tmp_path / f"{name}.npz"
        done = flashmoe("record", str(out), "--prompts", str(prompts), *DRAWN, *where)
        assert done.returncode == 0, done.stderr
    one, other = (AccessTrace.load(tmp_path / f"{name}.npz") for name in ("own", "running"))
    assert np.array_equal(one.topk_ids, other.topk_ids)
    assert np.array_equal(one.topk_weights, other.topk_weights)
    assert one.router_scores is None
    assert set(Path("/dev/shm").iterdir()) == before


def test_predictions_are_recorded_and_replayed(
    tiny_store: Path, prompts: Path, tmp_path: Path
) -> None:
    """Red when the flag is not handed on: replay refuses the trace then."""
    out = tmp_path / "said.npz"
    own = ["--model", str(tiny_store), "--memory", "1GiB", "--experts-memory", "37.5%"]
    done = flashmoe("record", str(out), "--prompts", str(prompts), *DRAWN, "--predictions", *own)
    assert done.returncode == 0, done.stderr
    assert "by next_router takes 2,048 bytes a token" in done.stderr
    flags = ["--slots", "12", "--warmup", "4", "--predict"]
    replayed = flashmoe("replay", str(out), *flags, "--json")
    assert replayed.returncode == 0, replayed.stderr
    found = json.loads(replayed.stdout)
    assert found["policy"] == "decayed" and found["slots"] == 12
    recalls = {
        (each["predictor"], each["layers_ahead"]): each["recall"]
        for each in found["predictors"]
        if each["is_corrected"]
    }
    assert recalls.keys() == {("next_router", ahead) for ahead in (1, 2, 3)}
    assert recalls["next_router", 1] > 0.5
    table = flashmoe("replay", str(out), *flags).stdout
    assert "recall / precision of misses" in table and "next_router" in table
    bare = flashmoe("replay", str(TRACE), *flags)
    assert bare.returncode == 2 and "flashmoe record --predictions" in bare.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_writes_nothing_and_the_node_is_free(
    stack: ServedStack, prompts: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out" / "trace.npz"
    out.parent.mkdir()
    flags = ["--prompts", str(prompts), "--max-tokens", "1900", "--ignore-eos"]
    process = subprocess.Popen(
        [*FLASHMOE, "record", str(out), *flags, "--run-dir", str(stack.run.path)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with stack.client() as node:
            wait_for(lambda: node.stats().requests > 0, 60, "the recording to begin")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert stderr == "interrupted: nothing was written\n"
    assert list(out.parent.iterdir()) == []
    assert len(stack.generate(max_tokens=4)) == 4
