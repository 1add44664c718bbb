"""`flashmoe chat`: keeps its conversation, begins anew, and outlives a stopped answer.

Planted faults seen red: the answer left out of the next turn, /reset that drops the system's words,
Ctrl-C that ends the program.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.verbs.chat import Conversation
from proto import errors
from tests.stack import FLASHMOE, ROOT, served


class FakeGeneration:
    """Says `text` by words; `end` is raised behind them."""

    def __init__(self, text: str, end: BaseException | None) -> None:
        self.text, self.end, self.cancelled = text, end, False

    def __iter__(self) -> Iterator[Any]:
        for word in self.text.split():
            yield type("Piece", (), {"text": word})
        if self.end is not None:
            raise self.end

    def run(self) -> Any:
        return type("Result", (), {"warnings": ()})

    def cancel(self) -> None:
        self.cancelled = True


class FakeNode:
    def __init__(self, *answers: FakeGeneration) -> None:
        self.answers, self.asked = list(answers), list[Any]()

    def generate(self, messages: Any, **options: Any) -> FakeGeneration:
        self.asked.append([message["content"] for message in messages])
        return self.answers[len(self.asked) - 1]


def talk(node: FakeNode, *lines: str) -> list[Any]:
    Conversation(node, "Be brief.", {}).go_on(lines)  # type: ignore[arg-type]
    return node.asked


def test_a_conversation_is_kept_until_it_is_reset() -> None:
    node = FakeNode(*(FakeGeneration(text, None) for text in ("one", "two", "three")))
    assert talk(node, "a", " ", "b", "/reset", "/what", "c", "/quit", "d") == [
        ["Be brief.", "a"],
        ["Be brief.", "a", "one", "b"],
        ["Be brief.", "c"],
    ]


def test_a_stopped_answer_is_kept_and_a_refused_one_is_not() -> None:
    stopped = FakeGeneration("half", KeyboardInterrupt())
    refused = FakeGeneration("", errors.ContextExceeded("too long"))
    node = FakeNode(stopped, refused, FakeGeneration("whole", None))
    assert talk(node, "a", "b", "c")[2] == ["Be brief.", "a", "half", "c"]
    assert stopped.cancelled


@pytest.mark.system
def test_in_a_real_stack(chat_store: Path, run_dir: Path) -> None:
    with served(chat_store, run_dir, "--experts-memory=100%"):
        command = [*FLASHMOE, "chat", "--run-dir", str(run_dir), "--temperature", "0"]
        process = subprocess.Popen(
            [*command, "--max-tokens", "8"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        out, err = process.communicate("In the beginning\nIn the beginning\n", timeout=60)
        assert process.returncode == 0, err
        assert out.count("> ") == 3
        assert "tiny-chat" in err


@pytest.mark.system
def test_ctrl_c_stops_the_answer_and_not_the_program(chat_store: Path, run_dir: Path) -> None:
    with served(chat_store, run_dir, "--experts-memory=100%"):
        process = subprocess.Popen(
            [*FLASHMOE, "chat", "--run-dir", str(run_dir), "--max-tokens", "1500"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin and process.stdout
        process.stdin.write("In the beginning\n")
        process.stdin.flush()
        assert process.stdout.read(6)  # the prompt and the first letters
        process.send_signal(signal.SIGINT)
        _, err = process.communicate("/quit\n", timeout=120)
        assert process.returncode == 0, err
        assert "stopped" in err
