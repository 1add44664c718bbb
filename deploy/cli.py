"""The `flashmoe` command: lists the verbs, imports the one that is called, turns a typed error into
one sentence and an exit code.
"""

from __future__ import annotations

import proto.process.quiet_grpc  # noqa: F401  isort: skip  before grpc

import importlib
import importlib.metadata
import re
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from deploy.terminal import console
from deploy.terminal.imports import importing
from proto import errors

VERBS = {
    "index": "Write a manifest over a checkpoint in place: no copy of its weights.",
    "pack": "Copy a checkpoint into aligned records that read fastest.",
    "shard": "Copy a share of a store's experts, for one of several boxes.",
    "verify": "Read and check every expert and dense weight of a store.",
    "plan": "Tell whether a model fits a memory ceiling, and how fast it should decode.",
    "simulate": "Tell how fast several boxes would decode a model that is not here.",
    "serve": "Run all daemons on this box until interrupted.",
    "worker": "Compute experts for a main node on another box, until interrupted.",
    "cluster": "Start a main node and its workers on several boxes, on Ray.",
    "shadow": "Name experts for a main node on another box before it wants them.",
    "run": "Start a stack of its own, generate once, print a summary, stop.",
    "generate": "Stream text from a running stack.",
    "chat": "Talk with a running stack in the terminal; it remembers what was said.",
    "status": "Tell how every daemon of a running stack is.",
    "top": "Watch a running stack live: speed, clients, policies, disk, memory, every expert.",
    "record": "Write which experts every decode step chose, as a trace.",
    "replay": "Tell what each eviction policy would have missed on a trace.",
    "calibrate": "Learn ahead which experts a model uses after which.",
    "tune": "Measure what lossy decoding costs and brings, and find the fastest within a budget.",
    "eval": "Measure the perplexity of a store's model on held-out text.",
    "container-config": "Write what deploy/docker-compose.yml reads to serve a store.",
    "container-wait": "Wait until the containers serve, and print how to reach them.",
    "doctor": "Check what on this machine stands in the way.",
    "health": "Ask one daemon whether it serves.",
}


def load(verb: str) -> Any:
    """The command of a verb: the function of that name in the module of that name in `verbs`.
    Imports what it works with.
    """
    name = verb.replace("-", "_")
    with importing():
        module = importlib.import_module(f"deploy.verbs.{name}")
    found = getattr(module, name)
    if isinstance(found, typer.Typer):  # a verb with verbs of its own
        return typer.main.get_command(found)
    alone = typer.Typer(add_completion=False)
    alone.command(verb, epilog=console.EXIT_CODES)(found)
    return typer.main.get_command(alone)


class Verbs(TyperGroup):
    """Help lists the verbs without their work; only the one that is called is imported."""

    def __init__(self, **attributes: Any) -> None:
        listed = {name: TyperCommand(name=name, help=summary) for name, summary in VERBS.items()}
        super().__init__(**attributes | {"commands": listed})

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None
        return name, load(name), rest


_OPTION, _EMPTY_OPTION = re.compile(r"--[a-z-]+"), re.compile(r"(--[a-z-]+)=")

app = typer.Typer(
    name="flashmoe",
    cls=Verbs,
    epilog=console.EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.write(f"flashmoe {importlib.metadata.version('flashmoe')}\n")
        raise typer.Exit


VERSION = typer.Option("--version", help="Print the version.", callback=_print_version)


@app.callback(invoke_without_command=True)
def flashmoe(context: typer.Context, version: Annotated[bool, VERSION] = False) -> None:
    """Run Mixture-of-Experts models that do not fit in memory, their experts on the SSD."""
    if context.invoked_subcommand is None:
        console.write(context.get_help())
        raise typer.Exit(console.BAD_INPUT)


def main() -> None:
    """Entry point of the `flashmoe` script."""
    console.prepare_output()
    code = run()
    if code == console.OUTPUT_CLOSED:
        console.discard_output()
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Do what the arguments ask. Prints an error as one sentence. Returns the exit code."""
    try:
        return _run(arguments)
    except console.OutputClosed:
        return console.OUTPUT_CLOSED
    except SystemExit:  # how typer ends when nobody reads its help
        return console.OUTPUT_CLOSED


def _run(arguments: list[str] | None) -> int:
    try:
        _check_no_empty(sys.argv[1:] if arguments is None else arguments)
        code: int | None = app(arguments, prog_name="flashmoe", standalone_mode=False)
        console.flush()
    except errors.FlashMoEError as error:
        return console.fail(str(error), console.exit_code(error))
    except TyperException as error:
        return console.fail(_describe_usage(error), console.BAD_INPUT)
    except typer.Abort:
        return console.INTERRUPTED
    except OSError as error:
        return console.fail(_describe_system(error), console.BAD_INPUT)
    except Exception as error:  # noqa: BLE001  a defect of ours: print all of it
        console.say(traceback.format_exc())
        return console.fail(
            f"a defect of FlashMoE, please report the lines above: {type(error).__name__}: {error}",
            console.DEFECT,
        )
    return code or console.OK


def _check_no_empty(arguments: list[str]) -> None:
    """Raises InvalidRequest for an empty argument: an empty path would be this folder."""
    num_options = arguments.index("--") if "--" in arguments else len(arguments)
    for number, argument in enumerate(arguments):
        name = _EMPTY_OPTION.fullmatch(argument) if number < num_options else None
        if name is None and argument:
            continue
        before = arguments[number - 1] if number else ""
        what = name[1] if name else before if _OPTION.fullmatch(before) else "an argument"
        raise errors.InvalidRequest(f"{what} is empty: give it a value, or leave it out")


def _describe_usage(error: TyperException) -> str:
    """What is wrong with the arguments, and how to go on."""
    sentence = error.format_message().rstrip(".")
    if type(error).__name__ == "NoSuchOption":
        sentence += "; an argument that begins with a dash goes behind --, after all options"
    context: typer.Context | None = getattr(error, "ctx", None)
    return f"{sentence} ({context.command_path if context else 'flashmoe'} --help tells more)"


def _describe_system(error: OSError) -> str:
    """What the operating system refused, and of which file."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


if __name__ == "__main__":
    main()
