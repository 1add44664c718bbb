"""The image of the containers, built once."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.container.test_containers import docker, make

LOCAL_BASE = "python:3.11-slim"


@pytest.fixture(scope="session")
def image() -> str:
    """Built as a user builds it. Skips where no engine answers."""
    probe = subprocess.run(["sh", "-c", "docker info"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no container engine answers: {probe.stderr.strip().splitlines()[-1]}")
    if "BASE" not in os.environ and docker("image", "ls", "--quiet", LOCAL_BASE):
        os.environ["BASE"] = LOCAL_BASE
    done = make("image")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return "flashmoe:0.1.0"
