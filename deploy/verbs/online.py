"""Verbs that ask a running stack: generate, status, health; and the options that verbs share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from compute_node.client.node_client import NodeClient
from deploy.report.absence import Absence, explain_absence, find_absence
from deploy.report.status import check_health, collect_status
from deploy.report.status_page import status_rows
from deploy.report.summary import print_summary, result_document
from deploy.settings import ServeSettings
from deploy.stack.memory import MemoryReport
from deploy.stack.run_dir import RunDir, RunState
from deploy.terminal import console
from deploy.terminal.prompts import as_text, choose_prompt
from proto import errors

COUNT_MAX, SEED_MAX = 2**32 - 1, 2**63 - 1  # what the wire carries, a seed a generation more
_TIMEOUT_MAX_S = 1e9


def seconds(value: float | None) -> float | None:
    """A time to wait. Raises BadParameter for one that is none."""
    if value is not None and not 0 < value <= _TIMEOUT_MAX_S:
        raise typer.BadParameter(f"{value} is no time to wait: give seconds above 0")
    return value


MODEL = typer.Option(help="Store made by `flashmoe index` or `pack`.")
MEMORY = typer.Option(help="Ceiling over everything, e.g. 2GiB.")
EXPERTS_MEMORY = typer.Option(help="For experts: bytes (1GiB), percent (37.5%) or slots (96).")
RUN_DIR = typer.Option(help="Sockets and state of the stack. (default: ~/.flashmoe/run)")
REDIS = typer.Option(help="URL of a Redis or Valkey to use instead of the embedded one.")
CONFIG = typer.Option(help="Settings. (default: ./flashmoe.toml if there is one)")
SOURCE = typer.Option(help="Where the checkpoint's files are now, if they moved.")
POLICY = typer.Option(help="What decides which expert to give up. (default: auto)")
FORECASTER = typer.Option(
    metavar="FILE", help="What `flashmoe calibrate --out` wrote. (default: the store's)"
)
PROMPT = typer.Argument(
    metavar="PROMPT",
    help="Text to go on from; - reads it from standard input. One that begins with a dash goes "
    "behind --, after all options.",
    show_default=False,
)
PROMPT_FILE = typer.Option(
    metavar="FILE", help="Read the prompt from a file, in UTF-8, less its last line break."
)
MAX_TOKENS = typer.Option(metavar="N", min=1, max=COUNT_MAX, help="New tokens at most.")
TEMPERATURE = typer.Option(min=0, max=100, help="0: greedy.")
TOP_P = typer.Option(min=0, max=1, help="Nucleus sampling; 1: off.")
SEED = typer.Option(metavar="N", min=0, max=SEED_MAX, help="Of the sampling; none: random.")
STOP = typer.Option(help="Stop string; repeat for more.")
IGNORE_EOS = typer.Option("--ignore-eos", help="Go on past the end of text.")
TIMEOUT = typer.Option(callback=seconds, help="Deadline in seconds.")
SPECIAL_TOKENS = typer.Option(
    "--special-tokens", help="Show special tokens in the text, such as the end of text."
)
JSON = typer.Option("--json", help="One JSON object instead of text.")


def generate(
    prompt: Annotated[str | None, PROMPT] = None,
    prompt_file: Annotated[Path | None, PROMPT_FILE] = None,
    run_dir: Annotated[Path | None, RUN_DIR] = None,
    max_tokens: Annotated[int, MAX_TOKENS] = 128,
    temperature: Annotated[float, TEMPERATURE] = 0.0,
    top_p: Annotated[float, TOP_P] = 1.0,
    seed: Annotated[int | None, SEED] = None,
    stop: Annotated[list[str] | None, STOP] = None,
    ignore_eos: Annotated[bool, IGNORE_EOS] = False,
    special_tokens: Annotated[bool, SPECIAL_TOKENS] = False,
    timeout: Annotated[float | None, TIMEOUT] = None,
    as_json: Annotated[bool, JSON] = False,
    config: Annotated[Path | None, CONFIG] = None,
) -> None:
    """Stream text from a running stack.

    Example: flashmoe generate "Once upon a time" --max-tokens 64 --temperature 0.8 --seed 1
    """
    text, stops = choose_prompt(prompt, prompt_file), _stops(stop or ())
    settings = ServeSettings.load(config).with_flags(run_dir=run_dir)
    with connected(RunDir(settings.run_dir.resolve())) as node:
        generation = node.generate(
            text,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stops,
            ignore_eos=ignore_eos,
            skip_special_tokens=not special_tokens,
            timeout_s=timeout,
        )
        try:
            if not as_json:
                console.write_all(piece.text for piece in generation)
            result = generation.run()
        except errors.DeadlineExceeded as error:
            raise errors.DeadlineExceeded(
                f"the answer was not complete within --timeout {timeout} s"
            ) from error
    report = MemoryReport.read(settings.run_dir)
    if as_json:
        console.print_json(result_document(result, report))
    else:
        print_summary(result, report)


def _stops(stops: Sequence[str]) -> Sequence[str]:
    """Raises InvalidRequest for one that is empty or no text."""
    if "" in stops:
        raise errors.InvalidRequest("--stop is empty: give the text to stop at, or leave it out")
    return [as_text(stop, "--stop") for stop in stops]


def status(
    run_dir: Annotated[Path | None, RUN_DIR] = None,
    as_json: Annotated[bool, JSON] = False,
    config: Annotated[Path | None, CONFIG] = None,
) -> None:
    """Health, hit ratio, residents and advice age of a running stack; exit 4 when a daemon is away.

    Example: flashmoe status --run-dir ~/.flashmoe/run
    """
    settings = ServeSettings.load(config).with_flags(run_dir=run_dir)
    run = RunDir(settings.run_dir.resolve())
    found = collect_status(run)
    if as_json:
        console.print_json(found)
    else:
        absences = {
            name: find_absence(run, name).value
            for name, facts in found.items()
            if facts.get("health") == "away"
        }
        if run.state() is RunState.ABSENT:
            found.pop("memory", None)  # the last words of a launcher that is gone
        tables = [console.table(*page) for page in status_rows(found, absences).items()]
        console.out.print(*tables, sep="\n\n")
    if any(facts["health"] != "SERVING" for facts in found.values() if "health" in facts):
        raise typer.Exit(console.UNAVAILABLE)


def health(
    address: Annotated[str, typer.Argument(help="unix:PATH or HOST:PORT of a daemon.")],
) -> None:
    """Ask one daemon whether it serves: exit 0 or 4. What container health checks call.

    Example: flashmoe health unix:/run/flashmoe/expert_store.sock
    """
    state = check_health(as_text(address, "the address"))
    console.out.print(state)
    if state != "SERVING":
        raise typer.Exit(console.UNAVAILABLE)


@contextmanager
def connected(run: RunDir) -> Iterator[NodeClient]:
    """A client of the stack in `run`, for the block.

    Raises Unavailable with what became of the stack when it does not answer, or no more.
    """
    absence = find_absence(run, "compute_node")
    if absence is not Absence.SILENT:
        raise errors.Unavailable(explain_absence(run, absence))
    with NodeClient(run.address("compute_node")) as node:
        try:
            yield node
        except errors.Unavailable as error:
            absence = find_absence(run, "compute_node")
            if absence is Absence.SILENT:  # it is there: the error is its own
                raise
            raise errors.Unavailable(
                f"the node went away while it answered: {explain_absence(run, absence)}"
            ) from error
