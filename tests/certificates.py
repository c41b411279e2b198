"""Certificates for servers that tests start on this machine: an authority, and what it vouches for."""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate with its key, as PEM."""

    certificate: bytes
    key: bytes


def authority(name: str) -> Certificate:
    """A certificate that vouches for itself and for others, for an hour."""
    return _issue(name, None, ca=True)


def vouched(by: Certificate, name: str, *, group: str | None = None) -> Certificate:
    """A certificate for a client of that name and group, and for a server on 127.0.0.1."""
    return _issue(name, by, ca=False, group=group)


def _issue(name: str, by: Certificate | None, *, ca: bool, group: str | None = None) -> Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if group is not None:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
    subject = x509.Name(attributes)
    signer = serialization.load_pem_private_key(by.key, None) if by else key
    issuer = x509.load_pem_x509_certificate(by.certificate) if by else None
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if not ca:
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    pem = serialization.Encoding.PEM
    return Certificate(
        certificate=builder.sign(signer, hashes.SHA256()).public_bytes(pem),
        key=key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
