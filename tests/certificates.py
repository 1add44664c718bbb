"""Certificates for tests of several boxes on this machine, and what a server shows."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from cryptography import x509

from deploy.cluster.certificates import Authority
from proto.rpc import TlsFiles


def files(folder: Path, box: str) -> TlsFiles:
    return TlsFiles(cert=folder / f"{box}.pem", key=folder / f"{box}.key", ca=folder / "ca.pem")


def issued(folder: Path, *boxes: str) -> Authority:
    folder.mkdir(exist_ok=True)
    authority = Authority.of(folder)
    for box in boxes:
        authority.issue(folder, box, ["127.0.0.1", "127.0.0.2"])
    return authority


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def certificate_shown(address: str, tls: TlsFiles) -> x509.Certificate:
    """What a new connection is shown by the server."""
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.cert, tls.key)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 20) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        der = connection.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


def serial_shown(address: str, tls: TlsFiles) -> int:
    return int(certificate_shown(address, tls).serial_number)
