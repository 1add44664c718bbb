"""The verb that talks with a running stack in the terminal, and keeps the conversation."""

from __future__ import annotations

import readline  # noqa: F401  gives input() editing and a history
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from compute_node.client.node_client import NodeClient
from compute_node.client.result import Generation, Result
from deploy.settings import ServeSettings
from deploy.stack.connection import connected
from deploy.stack.run_dir import RunDir
from deploy.terminal import console, options
from proto import errors

SYSTEM = typer.Option(metavar="TEXT", help="What the model is to be or do, said first.")
_PROMPT = "> "
_HELP = "/reset begins anew, /quit leaves; Ctrl-C stops an answer"


def chat(
    run_dir: Annotated[Path | None, options.RUN_DIR] = None,
    system: Annotated[str | None, SYSTEM] = None,
    max_tokens: Annotated[int | None, options.MAX_TOKENS] = None,
    temperature: Annotated[float, options.TEMPERATURE] = 0.7,
    seed: Annotated[int | None, options.SEED] = None,
    quality: Annotated[str, options.QUALITY] = "",
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Talk with a running stack; it remembers what was said.

    Example: flashmoe chat --system "Answer in one sentence."
    """
    settings = ServeSettings.load(config).with_flags(run_dir=run_dir)
    how = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "quality": quality}
    with connected(RunDir(settings.run_dir.resolve())) as node:
        description = node.describe()
        if not description.chat_template:
            raise errors.InvalidRequest(
                f"{description.model} has no chat template: use `flashmoe generate`"
            )
        console.say(f"{description.model}: {_HELP}")
        Conversation(node, system, how).go_on(_lines())


class Conversation:
    """What was said so far. how: options of every answer"""

    def __init__(self, node: NodeClient, system: str | None, how: dict[str, Any]) -> None:
        self._node, self._how = node, how
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)

    def go_on(self, lines: Iterable[str]) -> None:
        """Answer each line until /quit, or the last. Raises Unavailable when the node is away."""
        for line in lines:
            match line.strip():
                case "":
                    continue
                case "/quit" | "/exit":
                    return
                case "/reset":
                    self.messages = list(self._start)
                    console.say("begun anew")
                case said if said.startswith("/"):
                    console.say(f"{said}: {_HELP}")
                case said:
                    self._answer(said)

    def _answer(self, said: str) -> None:
        """What was refused or stopped before its first word is as if it had not been said."""
        asked = [*self.messages, {"role": "user", "content": said}]
        generation = self._node.generate(asked, **self._how)
        texts: list[str] = []
        try:
            result = _write(generation, texts.append)
        except KeyboardInterrupt:
            generation.cancel()
            console.say("stopped")
        except errors.Unavailable:
            raise
        except errors.FlashMoEError as error:
            console.warn(str(error))
        else:
            for warning in result.warnings:
                console.warn(warning)
        if texts:
            self.messages = [*asked, {"role": "assistant", "content": "".join(texts)}]


def _write(generation: Generation, keep: Callable[[str], None]) -> Result:
    def texts() -> Iterable[str]:
        for piece in generation:
            keep(piece.text)
            yield piece.text

    console.write_all(texts())
    return generation.run()


def _lines() -> Iterable[str]:
    """What is typed. Ctrl-C drops a line, Ctrl-D ends."""
    while True:
        try:
            yield input(_PROMPT)
        except KeyboardInterrupt:
            console.write("\n")
        except EOFError:
            console.write("\n")
            return
