"""A folder short enough for sockets, and certificates made by the openssl program."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.rpc import TlsFiles


@pytest.fixture
def run_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fm-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TlsFiles]:
    """server and client under one authority, stranger under another."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl program makes the certificates, and is not installed")
    folder = tmp_path_factory.mktemp("tls")
    for authority in ("ours", "theirs"):
        _openssl(folder, f"req -x509 -subj /CN={authority} {_key(authority)} -out {authority}.pem")
    files = {name: _certificate(folder, name, "ours") for name in ("server", "client")}
    return files | {"stranger": _certificate(folder, "stranger", "theirs")}


def _certificate(folder: Path, name: str, authority: str) -> TlsFiles:
    (folder / "san.txt").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    _openssl(folder, f"req -new -subj /CN={name} {_key(name)} -out {name}.csr")
    signed_by = f"-CA {authority}.pem -CAkey {authority}.key -CAcreateserial"
    _openssl(folder, f"x509 -req -in {name}.csr {signed_by} -extfile san.txt -out {name}.pem")
    return TlsFiles(cert=folder / f"{name}.pem", key=folder / f"{name}.key", ca=folder / "ours.pem")


def _key(name: str) -> str:
    return f"-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.key"


def _openssl(folder: Path, arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)
