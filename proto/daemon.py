"""How a daemon is started and how it tells what is wrong: what launchers, containers and daemons
agree on.

`python -m NAME --config flashmoe.toml` reads its own table of that file, logs JSON lines to
stderr, and answers a
start that cannot succeed with one sentence as its last line and status START_ERROR: trying again
would not help. Where whoever starts it cannot be told that (a container engine restarts whatever
ends), `--hold FILE` has it write the sentence there and stay, without serving, until the file is
removed.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging.config
import os
import re
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.registry import Collector
from pydantic import BaseModel, ValidationError

from proto import errors

FAILURE, START_ERROR = 1, 2
_HOLD_POLL_S = 0.5
_REFUSAL = re.compile(r"\w+: (.*) \[(\w+)\]", re.DOTALL)


class DaemonConfig(Protocol):
    """What every daemon's configuration has."""

    @property
    def log_level(self) -> str: ...


Config = TypeVar("Config", bound=DaemonConfig)
Model = TypeVar("Model", bound=BaseModel)


def load_table(path: Path, name: str, model: type[Model]) -> Model:
    """One table of flashmoe.toml, checked. Raises ConfigInvalid naming file, table, key and
    remedy.
    """
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise errors.ConfigInvalid(f"cannot read {path}: {error}") from error
    table = document.get(name)
    if not isinstance(table, dict):
        raise errors.ConfigInvalid(f"{path} has no table [{name}]: add one")
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise errors.ConfigInvalid.of(f"{path}, table [{name}]", error) from error


def main(
    name: str,
    purpose: str,
    load: Callable[[Path], Config],
    run: Callable[[Config], Coroutine[Any, Any, None]],
) -> int:
    """Run a daemon until it is signalled. Returns the process's exit status.

    What every thread was at goes to stderr when a signal such as SIGABRT or SIGSEGV ends it.
    """
    faulthandler.enable()
    parser = argparse.ArgumentParser(prog=name, description=purpose)
    parser.add_argument("--config", type=Path, required=True, help=f"TOML file with [{name}]")
    parser.add_argument("--hold", type=Path, metavar="FILE", help="stay when the start is refused")
    arguments = parser.parse_args()
    try:
        if arguments.hold:
            arguments.hold.unlink(missing_ok=True)
        config = load(arguments.config)
        configure_logging(config.log_level)
        asyncio.run(run(config))
    except errors.FlashMoEError as error:
        sentence = f"{name}: {error} [{type(error).__name__}]\n"
        sys.stderr.write(sentence)
        if error.retryable:
            return FAILURE
        if arguments.hold:
            _hold(arguments.hold, sentence)
        return START_ERROR
    except OSError as error:
        sys.stderr.write(f"{name}: {error} [OSError]\n")
        return FAILURE
    except Exception:  # noqa: BLE001  a defect of ours: told whole, and left like the others
        traceback.print_exc()
        return FAILURE
    return 0


def _hold(file: Path, sentence: str) -> None:
    """Keep a refusal readable in `file` until somebody removes it, or SIGTERM ends the process."""
    try:
        file.write_text(sentence)
    except OSError as error:
        sys.stderr.write(f"cannot write {file}: {error.strerror}\n{sentence}")
    while file.exists():
        time.sleep(_HOLD_POLL_S)


def leave(status: int) -> NoReturn:
    """End the process at once: `main` gave back what the daemon had.

    The interpreter's own way out ends threads of gRPC's inside C++ calls, for which a process may
    be aborted (grpc issue 11804): a drain that went well would look like a crash.
    """
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def refusal(last_line: str) -> errors.FlashMoEError:
    """The error behind the last line of a daemon that would not start."""
    match = _REFUSAL.fullmatch(last_line)
    if match is None:
        return errors.Unavailable(last_line)
    return errors.from_kind(match[2], match[1])


def configure_logging(level: str) -> None:
    """JSON lines on stderr."""
    formatter = {
        "()": "pythonjsonlogger.json.JsonFormatter",
        "format": "%(asctime)s %(levelname)s %(name)s %(message)s",
    }
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": formatter},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"level": level, "handlers": ["stderr"]},
        }
    )


@contextmanager
def serving_metrics(
    collector: Collector, port: int | None, port_file: Path | None
) -> Iterator[int | None]:
    """A Prometheus page on loopback for the block; yields its port, None when off.

    port: 0 is any free one, told in `port_file`; None is off
    Raises ConfigInvalid when the port is not to be had.
    """
    if port is None:
        yield None
        return
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise errors.ConfigInvalid(
            f"metrics_port {port} is not to be had ({error.strerror}): choose another, or 0"
        ) from error
    try:
        if port_file is not None:
            port_file.write_text(f"{server.server_port}\n")
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
