"""The `flashmoe` command: assembles the verbs, turns a typed error into one sentence and an exit
code.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from deploy import (
    calibrate,
    console,
    container,
    container_wait,
    doctor,
    evaluate,
    offline,
    online,
    record,
    replay,
)
from deploy.status import check_health
from proto import errors

app = typer.Typer(
    name="flashmoe",
    help="Run Mixture-of-Experts models that do not fit in memory, their experts on the SSD.",
    epilog=console.EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (
    offline.index,
    offline.pack,
    offline.verify,
    offline.plan,
    online.serve,
    online.run,
    online.generate,
    online.status,
    record.record,
    replay.replay,
    calibrate.calibrate,
    container.container_config,
    container_wait.container_wait,
    doctor.doctor,
):
    app.command(epilog=console.EXIT_CODES)(verb)
app.command("eval", epilog=console.EXIT_CODES)(evaluate.evaluate)


@app.command(epilog=console.EXIT_CODES)
def health(
    address: Annotated[str, typer.Argument(help="unix:PATH or HOST:PORT of a daemon.")],
) -> None:
    """Ask one daemon whether it serves: exit 0 or 4. What container health checks call.

    Example: flashmoe health unix:/run/flashmoe/expert_store.sock
    """
    state = check_health(address)
    console.out.print(state)
    if state != "SERVING":
        raise typer.Exit(console.UNAVAILABLE)


def main() -> None:
    """Entry point of the `flashmoe` script."""
    try:
        code = app(standalone_mode=False)
    except errors.FlashMoEError as error:
        console.err.print(f"flashmoe: {error}", markup=False)
        code = console.exit_code(error)
    except TyperException as error:
        console.err.print(f"flashmoe: {error.format_message()} (--help tells more)", markup=False)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as error:
        console.err.print(f"flashmoe: {error}", markup=False)
        code = console.BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
