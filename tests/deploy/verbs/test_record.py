"""What `flashmoe record` reads, draws and writes, on a fake node; its refusals as a user sees them.

Planted faults seen red: one seed for all, a generation without steps kept, a cancel between two
generations not heard, lines split at U+2028, files named and not read, writing in place, a place
that cannot be written noticed late, --memory without --model taken silently.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compute_node.client.result import Phase, Result
from deploy.lab.recorder import Recorder, Sampling, Wanted, to_trace
from deploy.terminal.output_file import publishing
from deploy.terminal.prompts import Prompt, read_prompts
from proto import errors
from proto.access import RecordedStep
from proto.foretold import Foretold
from scheduler.simulate.trace import AccessTrace
from tests.deploy.test_cli import assert_one_sentence
from tests.stack import flashmoe

SAMPLING = Sampling(
    max_tokens=9, temperature=0.8, top_p=0.9, seed=40, ignore_eos=True, prompt_tokens=5
)
L, K, E = 2, 1, 3


def result(num_steps: int, *, scores: bool = False, first: int = 0) -> Result:
    steps = [
        RecordedStep(
            num_experts=E,
            topk_ids=np.full((L, K), (first + n) % E, np.uint16),
            topk_weights=np.full((L, K), 0.5, np.float16),
            router_scores=np.full((L, E), n, np.float16) if scores else None,
        )
        for n in range(num_steps)
    ]
    nothing = Phase(0, 0, 0, 0, 0.0, 0.0)
    return Result("", [0], [0], "stop", 0.0, 0.0, 0.0, nothing, nothing, steps=steps)


class FakeGeneration:
    def __init__(self, run: Callable[[], Result]) -> None:
        self.is_cancelled = False
        self._run = run

    def cancel(self) -> None:
        self.is_cancelled = True

    def run(self) -> Result:
        if self.is_cancelled:
            raise errors.Cancelled("the caller went away")
        return self._run()


class FakeNode:
    """Answers every request with as many steps as its text has letters."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []

    def generate(self, prompt: str, **options: Any) -> FakeGeneration:
        self.requests.append((prompt, options))
        return FakeGeneration(lambda: result(len(prompt), scores=options["router_scores"]))


def recorder(node: FakeNode, *, router_scores: bool = False) -> Recorder:
    return Recorder(node, SAMPLING, Wanted(router_scores))  # type: ignore[arg-type]


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text.upper(), text) for text in texts]


def test_each_prompt_is_drawn_with_the_next_seed() -> None:
    node, heard = FakeNode(), []
    recorder(node).run(
        prompts("abc", "de"), lambda n, prompt, found: heard.append((n, prompt.name, found))
    )
    assert [text for text, _ in node.requests] == ["abc", "de"]
    assert [options["seed"] for _, options in node.requests] == [40, 41]
    assert [(n, name, len(found.steps)) for n, name, found in heard] == [
        (0, "ABC", 3),
        (1, "DE", 2),
    ]
    options = node.requests[0][1]
    assert options == {
        "max_tokens": 9,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 40,
        "ignore_eos": True,
        "max_prompt_tokens": 5,
        "record": True,
        "router_scores": False,
        "predictions": False,
        "inputs": False,
    }


def test_cancelled_between_two_generations_it_begins_no_other() -> None:
    node = FakeNode()
    working = recorder(node)
    with pytest.raises(errors.Cancelled):
        working.run(prompts("abc", "de", "f"), lambda *_: working.cancel())
    assert [text for text, _ in node.requests] in (["abc"], ["abc", "de"])


def test_trace_has_a_generation_a_prompt(tmp_path: Path) -> None:
    wanted = prompts("abc", "de")
    results = [result(3), result(2, first=2)]
    trace = to_trace("t", wanted, results, SAMPLING.as_text())
    trace.save(tmp_path / "t.npz")
    found = AccessTrace.load(tmp_path / "t.npz")
    assert found.seq_names == ("ABC", "DE")
    assert found.seq_offsets.tolist() == [0, 3, 5]
    assert found.topk_ids[:, 0, 0].tolist() == [0, 1, 2, 2, 0]
    assert (found.num_experts, found.num_layers, found.top_k) == (E, L, K)
    assert found.topk_weights.tolist() == [[[0.5]] * L] * 5
    assert found.router_scores is None
    assert json.loads(found.sampling) == {
        "max_tokens": 9,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 40,
        "ignore_eos": True,
        "prompt_tokens": 5,
    }


def test_scores_are_kept_when_they_came() -> None:
    trace = to_trace("t", prompts("ab", "c"), [result(2, scores=True)] * 2, "")
    assert trace.router_scores is not None and trace.router_scores.shape == (4, L, E)
    assert trace.router_scores[:, 0, 0].tolist() == [0, 1, 0, 1]


def test_what_predictors_said_is_kept_in_their_order() -> None:
    """Also what was taken on the way: a result may leave it out, as calibration does."""
    said = {name: np.ones((L, 3, E), np.float16) for name in ("map", "next_router")}
    foretold = Foretold(said, np.zeros((L, E), np.float16))
    with_it = result(2)
    with_it = replace(with_it, steps=[replace(step, foretold=foretold) for step in with_it.steps])
    trace = to_trace("t", prompts("ab", "cd"), [with_it, with_it], "")
    assert list(trace.said) == ["map", "next_router"]
    assert trace.said["map"].shape == (4, L, 3, E)
    assert trace.truth is not None and trace.truth.shape == (4, L, E)
    assert to_trace("t", prompts("ab"), [result(2)], "").said == {}
    second = trace.take(np.array([1]), "second")
    assert second.truth is not None and len(second.truth) == len(second.said["map"]) == 2


def test_a_generation_without_decode_steps_is_left_out() -> None:
    trace = to_trace("t", prompts("a", "b", "c"), [result(1), result(0), result(2)], "")
    assert trace.seq_names == ("A", "C")
    assert trace.seq_offsets.tolist() == [0, 1, 3]
    with pytest.raises(errors.InvalidRequest, match="--ignore-eos"):
        to_trace("t", prompts("a"), [result(0)], "")


def test_prompts_of_texts_lines_and_folders(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("not a prompt")
    (tmp_path / "b.txt").write_text("  two\nlines\n")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "x\u2028y", "domain": "bible"}\n\n{"text": "Gr\\u00fc\\u00dfe"}\n'
    )
    (tmp_path / "notes.md").write_text("named, so taken")
    in_folder = [Prompt("bible", "x\u2028y"), Prompt("a", "Grüße"), Prompt("b", "  two\nlines")]
    assert read_prompts([tmp_path]) == in_folder
    named = [tmp_path / "notes.md", tmp_path / "b.txt"]
    assert read_prompts(named) == [Prompt("notes", "named, so taken"), in_folder[2]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "empty.txt is empty"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("bad.txt", b"\xff\xfe", "bad.txt is no UTF-8 from byte 1"),
        ("bad.jsonl", b'{"text": "a"}\nnonsense\n', "bad.jsonl, line 2"),
        ("list.jsonl", b'["a"]\n', "list.jsonl, line 1"),
        ("blank.jsonl", b'{"text": " "}\n', "blank.jsonl, line 1"),
        ("none.jsonl", b'{"domain": "a"}\n', "none.jsonl, line 1"),
        ("number.jsonl", b'{"text": 7}\n', "number.jsonl, line 1"),
    ],
)
def test_what_is_no_prompt_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.InvalidRequest, match=message):
        read_prompts([tmp_path / name])


def test_a_folder_without_prompts_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"no \.txt or \.jsonl"):
        read_prompts([tmp_path])
    with pytest.raises(errors.InvalidRequest, match=r"nowhere\.txt"):
        read_prompts([tmp_path / "nowhere.txt"])


def test_what_is_published_is_whole_or_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "t.npz"
    out.write_text("before")
    with pytest.raises(KeyboardInterrupt), publishing(out) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert out.read_text() == "before"
    with publishing(out) as partial:
        partial.write_text("after")
        assert out.read_text() == "before"
    assert out.read_text() == "after"
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "prompt.txt").write_text("In the beginning")
    return str(tmp_path / "prompt.txt")


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        ([], 2, ["--prompts"]),
        (["--prompts", "TEXT"], 4, ["no stack runs", "flashmoe serve"]),
        (["--prompts", "TEXT", "nowhere.txt"], 2, ["nowhere.txt"]),
        (["--prompts", "TEXT", "--memory", "1GiB"], 2, ["--memory", "--model"]),
        (["--prompts", "TEXT", "--experts-memory", "96"], 2, ["--experts-memory", "--model"]),
        (["--prompts", "TEXT", "--model", "nowhere"], 2, ["--run-dir", "--model"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_are_one_sentence_and_leave_nothing(
    flags: list[str], code: int, parts: list[str], text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "t.npz"
    out.parent.mkdir()
    given = [text if flag == "TEXT" else flag for flag in flags]
    done = flashmoe("record", str(out), *given, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == code, done.stderr
    assert_one_sentence(done.stderr, *parts)
    assert list(out.parent.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named_before_anything_starts(
    text: str, tmp_path: Path
) -> None:
    for out in (tmp_path / "nowhere" / "t.npz", tmp_path):
        done = flashmoe("record", str(out), "--prompts", text, "--run-dir", str(tmp_path / "run"))
        assert done.returncode == 2, done.stderr
        assert_one_sentence(done.stderr, f"{out} cannot be written", "name a file")
