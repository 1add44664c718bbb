"""How a daemon starts and how it reports what is wrong: what launchers, containers and daemons
agree on.

`python -m NAME --config flashmoe.toml` reads its own table of that file, logs JSON lines to
stderr, and ends with one sentence as its last line. Its status is START_ERROR when the start cannot
succeed, so that trying again would not help. A container engine restarts every process that ends;
there, `--hold FILE` makes the daemon write the sentence to the file and stay, without serving,
until the file is removed.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import faulthandler
import logging
import os
import re
import sys
import tomllib
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from pydantic import BaseModel, ValidationError

from proto import errors, rpc
from proto import stats_pb2 as stats_pb
from proto.process import last_words, log
from proto.process.metrics_page import SnapshotCollector

FAILURE, START_ERROR = last_words.FAILURE, last_words.START_ERROR
# Errors that may pass by themselves: the system lacks descriptors, memory, room or a device.
_PASSING = {
    errno.EADDRINUSE,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ESTALE,
}
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

    Every thread's stack goes to stderr when a signal such as SIGABRT or SIGSEGV ends it.
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
        log.configure(config.log_level)
        asyncio.run(run(config))
    except Exception as error:  # noqa: BLE001  every error gets a line and a status
        return _report_end(name, error, arguments.hold)
    return 0


def _report_end(name: str, error: Exception, hold: Path | None) -> int:
    """Write why the daemon ends; the last line is one sentence. Returns the exit status.

    hold: file that keeps a refused start until somebody removes it; None: none
    """
    logging.shutdown()  # the sentence comes after all lines of the log
    if not isinstance(error, errors.FlashMoEError):
        traceback.print_exception(error)
    problem = _problem(error)
    sentence = last_words.write(name, type(problem).__name__, str(problem))
    if problem.retryable:
        return FAILURE
    if hold:
        last_words.hold(str(hold), sentence)
    return START_ERROR


def _problem(error: Exception) -> errors.FlashMoEError:
    """The error as the starter should see it: retryable where waiting may help."""
    if isinstance(error, errors.FlashMoEError) and (error.retryable or not rpc.has_served()):
        return error
    if rpc.has_served():  # so it can start; the defect may not come again
        return errors.Unavailable(f"ended by a defect, {type(error).__name__}: {error}")
    if isinstance(error, grpc.RpcError):
        return errors.from_rpc(error)
    if isinstance(error, MemoryError):
        return errors.MemoryExceeded(
            f"not enough memory to start ({error}): close other programs, or lower --memory"
        )
    if isinstance(error, OSError) and _may_pass(error):
        return errors.Unavailable(str(error))
    return errors.StartFailed(last_words.cannot_start(error))


def _may_pass(error: OSError) -> bool:
    passing = (ConnectionError, TimeoutError, BlockingIOError, InterruptedError)
    return isinstance(error, passing) or error.errno in _PASSING


def leave(status: int) -> NoReturn:
    """End the process at once. `main` has given back all that the daemon held.

    The interpreter's own way out ends threads of gRPC's inside C++ calls, for which a process may
    be aborted (grpc issue 11804): a drain that went well would look like a crash.
    """
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def may_pass(last_line: str) -> bool:
    """Whether a daemon's last line says that trying again may help."""
    return _REFUSAL.fullmatch(last_line) is not None and refusal(last_line).retryable


def refusal(last_line: str) -> errors.FlashMoEError:
    """The error that a daemon's last line describes."""
    match = _REFUSAL.fullmatch(last_line)
    if match is None:
        return errors.Unavailable(last_line)
    return errors.from_kind(match[2], match[1])


@contextmanager
def serving_metrics(
    snapshot: Callable[[], stats_pb.Snapshot], port: int | None, port_file: Path | None
) -> Iterator[int | None]:
    """A Prometheus page on loopback for the block; yields its port, None when off.

    port:      0: any free port; None: no page
    port_file: the port is written there
    Raises ConfigInvalid when the port cannot be bound.
    """
    if port is None:
        yield None
        return
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(snapshot))
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise errors.ConfigInvalid(
            f"metrics_port {port} cannot be bound ({error.strerror}): choose another, or 0"
        ) from error
    try:
        if port_file is not None:
            _write_port(port_file, server.server_port)
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _write_port(file: Path, port: int) -> None:
    """Write the whole file or none: on a full disk the daemon serves without it."""
    scratch = file.with_name(f"{file.name}.new")
    try:
        scratch.write_text(f"{port}\n")
        scratch.replace(file)
    except OSError as error:
        extra = {"file": str(file), "port": port, "reason": str(error)}
        logging.getLogger(__name__).warning("port of the metrics not written", extra=extra)
        for path in (scratch, file):  # an old port may belong to another process
            with suppress(OSError):
                path.unlink(missing_ok=True)
