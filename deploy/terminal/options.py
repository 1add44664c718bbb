"""Options that several verbs take, each with its help."""

from __future__ import annotations

import typer

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
ROUTE = typer.Option(
    metavar="RULES",
    help='Lossy: what decode does about experts that are not in memory: "prior .05", '
    '"substitute .5", "skip .5", "precision .9", joined by +. (default: exact)',
    show_default=False,
)
QUALITY = typer.Option(
    metavar="BUDGET",
    help="Lossy: the fastest decoding by which perplexity rises no more, as 1%, by what `flashmoe "
    "tune` measured; or exact. (default: as the stack is served)",
    show_default=False,
)
JSON_SCHEMA = typer.Option(
    "--json-schema",
    metavar="FILE",
    help="The answer is JSON that keeps to the schema in FILE.",
    show_default=False,
)
DEFAULT_QUALITY = typer.Option(
    metavar="BUDGET",
    help="Lossy unless a request says otherwise: the fastest decoding by which perplexity rises no "
    "more, as 1%, by what `flashmoe tune` measured. (default: exact)",
    show_default=False,
)
ROUTE_PROMPTS = typer.Option("--route-prompts", help="The prompt goes by --route, too.")
SPECIAL_TOKENS = typer.Option(
    "--special-tokens", help="Show special tokens in the text, such as the end of text."
)
JSON = typer.Option("--json", help="One JSON object instead of text.")

CHECKPOINT = typer.Argument(metavar="HF_DIR", help="Folder of a Hugging Face checkpoint.")
STORE = typer.Argument(metavar="STORE", help="Folder made by `flashmoe index` or `pack`.")
OUT = typer.Option("--out", metavar="STORE", help="Folder to write.")
WORKER = typer.Option(
    metavar="ADDRESS",
    help="A box where `flashmoe worker` listens, as 10.0.0.2:9400; repeat for more.",
)
SHADOW = typer.Option(
    metavar="ADDRESS", help="A box where `flashmoe shadow` listens, as 10.0.0.9:9401."
)
LISTEN = typer.Option(
    metavar="HOST:PORT",
    help="Where main nodes reach it; TLS beyond loopback. (default: 127.0.0.1:9400)",
)
LEND = typer.Option(
    metavar="HOST:PORT",
    help="Where workers without a store borrow experts; TLS beyond loopback. (default: nowhere)",
)
LENT_STORE = typer.Option(
    "--store",
    metavar="HOST:PORT",
    help="Borrow experts where another box lends them, in place of --model.",
)
HTTP = typer.Option(
    metavar="[HOST:]PORT", help="Serve OpenAI's interface and a live page there. (default: off)"
)
API_KEY_FILE = typer.Option(
    metavar="FILE", help="Keys that HTTP clients need, one a line; required beyond loopback."
)
