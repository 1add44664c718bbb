"""A private certificate authority for the boxes of one cluster, and a certificate for each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from proto import errors

CA_CERT, CA_KEY = "ca.pem", "ca.key"
_CA_DAYS, _BOX_DAYS = 3650, 397
_CLOCKS_APART = timedelta(hours=1)  # boxes without a battery for their clock


@dataclass(frozen=True)
class Authority:
    """What signs. The key stays where the certificates are made: no box needs it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def of(cls, folder: Path) -> Authority:
        """The one in the folder, or a new one where there is none at all.

        Raises ConfigInvalid when half of one is there, or the halves do not belong together.
        """
        certificate, key = folder / CA_CERT, folder / CA_KEY
        if not certificate.exists() and not key.exists():
            return cls._new(folder)
        if not (certificate.exists() and key.exists()):
            gone = key if certificate.exists() else certificate
            raise errors.ConfigInvalid(
                f"{gone} is missing, and with another one every box's certificate would end: put "
                "it back, or give another folder"
            )
        try:
            found = x509.load_pem_x509_certificate(certificate.read_bytes())
            signs = load_pem_private_key(key.read_bytes(), None)
        except ValueError as error:
            raise errors.ConfigInvalid(f"{folder} has no certificate authority: {error}") from error
        if not isinstance(signs, ec.EllipticCurvePrivateKey) or (
            signs.public_key() != found.public_key()
        ):
            raise errors.ConfigInvalid(f"{key} is not the key of {certificate}: put it back")
        return cls(found, signs)

    @classmethod
    def _new(cls, folder: Path) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("FlashMoE cluster")
        made = (
            _begun(name, name, key, _CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        _write(folder / CA_KEY, _pem_of_key(key), is_new=True)
        _write(folder / CA_CERT, made.public_bytes(Encoding.PEM), is_new=True)
        return cls(made, key)

    def issue(self, folder: Path, box: str, hosts: Iterable[str]) -> None:
        """Write BOX.key and BOX.pem, over what is there: daemons that run take the new ones. A
        box serves and calls with the same certificate.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        made = (
            _begun(_name(box), self.certificate.subject, key, _BOX_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectAlternativeName(_names(box, hosts)), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        _write(folder / f"{box}.key", _pem_of_key(key))
        _write(folder / f"{box}.pem", made.public_bytes(Encoding.PEM))

    def has_signed(self, certificate: x509.Certificate) -> bool:
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (InvalidSignature, ValueError):
            return False
        return True


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_APART)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _names(box: str, hosts: Iterable[str]) -> Sequence[x509.GeneralName]:
    return [x509.DNSName(box), *(x509.IPAddress(ip_address(host)) for host in sorted(set(hosts)))]


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _write(path: Path, data: bytes, is_new: bool = False) -> None:
    """For its owner alone. A reader sees the old bytes or the new ones.

    Raises FileExistsError when `is_new` and something is there.
    """
    target = path if is_new else path.with_name(f".{path.name}.new")
    if not is_new:
        target.unlink(missing_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(data)
    if not is_new:
        target.replace(path)
