"""A self-signed certificate for one run.

Browsers give a page threads (SharedArrayBuffer), the camera and WebGPU only in a secure context, and `http://` plus an
address of the local network is none. So the page is served over TLS with a certificate that is made at the start; no
authority vouches for it, the phone says so, and its fingerprint can be compared with the one that the terminal prints.
"""

import datetime
import ipaddress
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

_VALID_DAYS = 30  # with --stay a run may go on for long
_CLOCK_SKEW_HOURS = 24  # a phone whose clock is behind must not find a certificate of tomorrow


@dataclass(frozen=True)
class Certificate:
    """What serves (`context`) and what a person can compare: the SHA-256 of the certificate, as browsers show it."""

    context: ssl.SSLContext
    fingerprint: str


def make(address: str) -> Certificate:
    """A key and a certificate for the address and for localhost. The key touches a disk for the moment of loading it.

    `ssl` reads keys from files alone; the file lies in a directory that only this user may enter, and is gone when this
    returns.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mobiatt-tf benchmark")])
    now = datetime.datetime.now(datetime.UTC)
    addresses = {ipaddress.IPv4Address(address), ipaddress.IPv4Address("127.0.0.1")}
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), *map(x509.IPAddress, sorted(addresses))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=_CLOCK_SKEW_HOURS))
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.TemporaryDirectory(prefix="mobiatt-tf-") as directory:  # mode 700
        file = Path(directory) / "certificate.pem"
        file.touch(mode=0o600)
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context.load_cert_chain(file)
    return Certificate(context, certificate.fingerprint(hashes.SHA256()).hex(":").upper())
