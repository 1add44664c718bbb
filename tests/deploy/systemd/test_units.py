"""The systemd units are what systemd takes: `systemd-analyze verify` says nothing.

Seen red: `KillMode=mixt`, a section [Instal].
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.stack import ROOT

UNITS = ROOT / "deploy/systemd"
PROGRAM = re.compile(r"(?<=^ExecStart=)\S+", re.MULTILINE)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize(
    ("unit", "scope", "name"),
    [
        ("flashmoe.service", "--system", "flashmoe.service"),
        ("flashmoe-ray@.service", "--system", "flashmoe-ray@join.service"),
        ("user/flashmoe.service", "--user", "flashmoe.service"),
    ],
)
def test_a_unit_is_what_systemd_takes(
    unit: str, scope: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a program that is there: verify looks for it."""
    copy = tmp_path / name
    copy.write_text(PROGRAM.sub("/bin/true", (UNITS / unit).read_text()))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    command = ["systemd-analyze", "verify", "--man=no", scope, str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    ours = [line for line in result.stderr.splitlines() if "flashmoe" in line]
    assert (result.returncode, ours) == (0, []), result.stderr
