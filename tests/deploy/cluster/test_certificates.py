"""Certificates of a cluster: who accepts whom, what is never overwritten, renewal while it runs.

Planted faults seen red: see the tests.
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.cli import run
from deploy.cluster.certificates import Authority
from proto import errors, rpc
from proto.rpc import Listen, TlsFiles
from tests.certificates import certificate, files, issued, serial_shown
from tests.ports import free_port

CLUSTER = """
model = "/stores/tiny"
ray = "10.0.0.1:6379"
[main]
host = "10.0.0.1"
memory = "2GiB"
[[worker]]
name = "w1"
host = "10.0.0.2"
memory = "1GiB"
"""


def test_the_verb_writes_keys_for_their_owner_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Boxes beyond loopback and no `certs` yet: the verb is what makes them."""
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    command = ["cluster", "certs", str(tmp_path / "cluster.toml"), "--out", str(tmp_path / "c")]
    before = os.umask(0)
    try:
        assert run(command) == 0
    finally:
        os.umask(before)
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names == {"ca.pem", "ca.key", "main.pem", "main.key", "w1.pem", "w1.key"}
    for name in names:
        assert stat.S_IMODE((tmp_path / "c" / name).stat().st_mode) == 0o600
    assert "w1: copy ca.pem, w1.pem and w1.key to it" in capsys.readouterr().out
    first = {name: (tmp_path / "c" / name).read_bytes() for name in names}
    assert run(command) == 0
    kept = {name for name in names if (tmp_path / "c" / name).read_bytes() == first[name]}
    assert kept == {"ca.pem", "ca.key"}, "the authority is kept, the rest is renewed"
    [host] = (
        certificate(tmp_path / "c/w1.pem")
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value.get_values_for_type(x509.IPAddress)
    )
    assert str(host) == "10.0.0.2"


@pytest.mark.parametrize("gone", ["ca.pem", "ca.key"])
def test_half_an_authority_is_not_replaced(gone: str, tmp_path: Path) -> None:
    """Seen red: a new authority over the half that is left."""
    issued(tmp_path)
    (tmp_path / gone).unlink()
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(errors.ConfigInvalid, match=f"{gone} is missing"):
        Authority.of(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == left


def test_a_key_of_another_authority_is_refused(tmp_path: Path) -> None:
    issued(tmp_path / "a"), issued(tmp_path / "b")
    (tmp_path / "b/ca.key").replace(tmp_path / "a/ca.key")
    with pytest.raises(errors.ConfigInvalid, match=r"is not the key of"):
        Authority.of(tmp_path / "a")


async def test_boxes_accept_each_other_and_no_stranger(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    issued(ours, "main", "w1"), issued(theirs, "main")
    stranger = files(theirs, "main").model_copy(update={"ca": ours / "ca.pem"})
    address = f"127.0.0.2:{free_port('127.0.0.2')}"
    async with rpc.serving(Listen(address, files(ours, "w1")), lambda server: None, [], 1.0):
        assert await health(address, files(ours, "main")) == "SERVING"
        assert await health(address, stranger) == "UNAVAILABLE"
        assert await health(address, files(theirs, "main")) == "UNAVAILABLE"


async def test_a_server_takes_what_was_renewed(tmp_path: Path) -> None:
    """Seen red: credentials that are read once."""
    authority = issued(tmp_path, "main", "w1")
    main, lent = files(tmp_path, "main"), files(tmp_path, "w1")
    address = f"127.0.0.2:{free_port('127.0.0.2')}"
    async with rpc.serving(Listen(address, lent), lambda server: None, [], 1.0):
        async with rpc.connect_aio(address, main) as open_before:
            assert await ask(open_before) == "SERVING"
            assert await shown(address, main) == certificate(lent.cert).serial_number
            former = certificate(lent.cert).serial_number
            authority.issue(tmp_path, "w1", ["127.0.0.2"])
            renewed = certificate(lent.cert).serial_number
            assert await shown(address, main) == renewed != former
            assert await ask(open_before) == "SERVING", "a connection lives on"
        lent.key.unlink()
        assert await shown(address, main) == renewed, "what cannot be read changes nothing"


async def health(address: str, tls: TlsFiles) -> str:
    async with rpc.connect_aio(address, tls) as channel:
        return await ask(channel)


async def ask(channel: grpc.aio.Channel) -> str:
    try:
        reply = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=20
        )
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


async def shown(address: str, tls: TlsFiles) -> int:
    """Serial number of the certificate that a new connection is shown."""
    return await asyncio.to_thread(serial_shown, address, tls)
