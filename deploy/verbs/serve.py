"""The verb that runs all daemons on this box until it is interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compute_node.gateway.host_port import HostPort
from deploy.settings import ServeSettings
from deploy.stack.launcher import serving
from deploy.stack.run_dir import RunDir
from deploy.stack.stack_plan import StackPlan
from deploy.terminal import console, options
from deploy.terminal.signals import stop_flag
from proto import errors
from proto.quality import EXACT_NAME
from proto.redis_schema import PolicySetting
from proto.rpc import is_loopback

CORS_ORIGIN = typer.Option(
    metavar="ORIGIN", help="A web page's origin that may use HTTP from a browser; repeat for more."
)


def serve(
    model: Annotated[Path | None, options.MODEL] = None,
    memory: Annotated[str | None, options.MEMORY] = None,
    experts_memory: Annotated[str | None, options.EXPERTS_MEMORY] = None,
    run_dir: Annotated[Path | None, options.RUN_DIR] = None,
    redis: Annotated[str | None, options.REDIS] = None,
    source: Annotated[Path | None, options.SOURCE] = None,
    policy: Annotated[PolicySetting | None, options.POLICY] = None,
    quality: Annotated[str | None, options.DEFAULT_QUALITY] = None,
    forecaster: Annotated[Path | None, options.FORECASTER] = None,
    http: Annotated[str | None, options.HTTP] = None,
    api_key_file: Annotated[Path | None, options.API_KEY_FILE] = None,
    cors_origin: Annotated[list[str] | None, CORS_ORIGIN] = None,
    worker: Annotated[list[str] | None, options.WORKER] = None,
    shadow: Annotated[str | None, options.SHADOW] = None,
    lend: Annotated[str | None, options.LEND] = None,
    config: Annotated[Path | None, options.CONFIG] = None,
) -> None:
    """Run all daemons on this box until interrupted; prints one line when ready.

    Example: flashmoe serve --model ~/stores/olmoe --memory 4GiB --http 8000
    """
    settings = ServeSettings.load(config).with_flags(
        model=model,
        memory=memory,
        experts_memory=experts_memory,
        run_dir=run_dir,
        redis=redis,
        source=source,
        policy=policy,
        quality=quality,
        http=http,
        api_key_file=api_key_file,
        cors_origins=tuple(cors_origin) if cors_origin else None,
        workers=tuple(worker) if worker else None,
        shadow_address=shadow,
        lend=lend,
    )
    check_http(settings)
    if forecaster is not None:
        settings = settings.with_forecaster(forecaster)
    plan, stopped = StackPlan.of(settings), stop_flag()
    with serving(plan, stopped, say=console.say) as stack:
        if not stopped():
            console.out.print(
                f"ready: {plan.model_name}, {plan.memory.slots} of {plan.memory.num_experts} "
                f"experts in memory, ceiling {console.size(plan.memory.ceiling_bytes)}, "
                f"run dir {settings.run_dir}{_lossy(settings)}{_url(plan.run_dir, settings)}",
            )
        stack.watch(stopped)
    console.say("stopped")


def check_http(settings: ServeSettings) -> None:
    """Raises ConfigInvalid for an address that is none, and for what needs --http."""
    if settings.http is None:
        given = {"--api-key-file": settings.api_key_file, "--cors-origin": settings.cors_origins}
        for flag in (flag for flag, value in given.items() if value):
            raise errors.ConfigInvalid(f"{flag} protects what --http serves: give --http, too")
        return
    try:
        where = HostPort.parse(settings.http)
    except ValueError as error:
        raise errors.ConfigInvalid(f"--http {error}") from None
    if settings.api_key_file is None and not is_loopback(str(where)):
        raise errors.ConfigInvalid(
            f"--http {where} is reachable from other hosts: give --api-key-file, a file with one "
            "key a line"
        )


def _url(run: RunDir, settings: ServeSettings) -> str:
    return f", http://{run.http.read_text().strip()}" if settings.http is not None else ""


def _lossy(settings: ServeSettings) -> str:
    """What is not exact is announced."""
    quality = settings.default_quality
    return "" if quality == EXACT_NAME else f", lossy within {quality} unless a request says exact"
