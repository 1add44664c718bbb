"""One stack as docker compose sees it: its name, the files that describe it, the command."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from deploy.settings import ServeSettings
from proto import errors

COMPOSE_FILE = Path(__file__).parents[1] / "docker-compose.yml"
HELPER_FILE = COMPOSE_FILE.with_name("docker-compose.helper.yml")  # of a worker or a shadow
BORROWER_FILE = COMPOSE_FILE.with_name("docker-compose.borrower.yml")  # of a worker without a store
LENDING_FILE = COMPOSE_FILE.with_name("docker-compose.lending.yml")  # beside one with a store
_OBSERVABILITY = COMPOSE_FILE.with_name("observability")  # of the profile of that name
ENV_NAME = "compose.env"
RUN_NAME = "run"  # folder of the sockets
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")  # what both generations of compose take
_UNUSABLE = re.compile(r"[:\\\n\r]")  # compose cannot mount a path with one of these


def project_name(out: Path, name: str | None) -> str:
    """`name`, or one that no other folder has. Raises ConfigInvalid."""
    if name is None:
        return f"flashmoe-{digest(str(out))[:8]}"
    if not _NAME.fullmatch(name):
        raise errors.ConfigInvalid(
            f"--name {name!r} names no compose project: write small letters, digits, - and _"
        )
    return name


def render_environment(variables: Mapping[str, object]) -> str:
    """An env file that both generations of compose read alike. Raises ConfigInvalid."""
    lines = []
    for name, value in variables.items():
        if isinstance(value, Path) and _UNUSABLE.search(str(value)):
            raise errors.ConfigInvalid(
                f"compose cannot use the path {str(value)!r}: it has a colon, a backslash or a "
                "line break; give it another name"
            )
        quoted = str(value).replace("'", "\\'")
        lines.append(f"{name}='{quoted}'\n")
    return "".join(lines)


def write(out: Path, environment: str, settings: ServeSettings) -> None:
    """The compose files and what they read, so that none needs the source tree."""
    (out / ENV_NAME).write_text(environment)
    compose_file = COMPOSE_FILE if settings.role == "main" else HELPER_FILE
    if settings.borrows_from is not None:
        compose_file = BORROWER_FILE
    (out / COMPOSE_FILE.name).write_bytes(compose_file.read_bytes())
    lending = out / LENDING_FILE.name
    lending.unlink(missing_ok=True)
    if settings.lends_at is not None:
        lending.write_bytes(LENDING_FILE.read_bytes())
    if settings.role != "main":
        return
    for source in (path for path in _OBSERVABILITY.rglob("*") if path.is_file()):
        target = out / source.relative_to(_OBSERVABILITY.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        target.chmod(0o644)  # Prometheus and Grafana run as users of their own


def command(out: Path) -> str:
    """What drives the stack that was written to `out`, ready for a shell; without a verb."""
    program = "docker compose"
    if shutil.which("docker-compose") and not _has_plugin():
        program = "docker-compose"
    files = ["--env-file", str(out / ENV_NAME), "-f", str(out / COMPOSE_FILE.name)]
    if (lending := out / LENDING_FILE.name).exists():
        files += ["-f", str(lending)]
    return f"{program} {shlex.join(files)}"


def _has_plugin() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
