"""The certificate of a port that speaks TLS: is it one, is the key its own, and which name is it for."""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from flm.worker.errors import ConfigError

_FLIGHTS = 4  # messages of a handshake, each way


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files."""

    cert_file: str
    key_file: str

    def credentials(self) -> grpc.ServerCredentials:
        """ConfigError where a file cannot be read or the two do not go together."""
        self.server_name()
        return grpc.ssl_server_credentials(
            [(_read(self.key_file, "key_file"), _read(self.cert_file, "cert_file"))]
        )

    def server_name(self) -> str:
        """A name that the certificate is for, "" where it has none: what a client must call this port by, that trusts the
        certificate itself. ConfigError where a handshake with these files fails, with the field that is wrong."""
        names = self._handshake()
        found = sorted(
            name.replace("*", "any") for kind, name in names.get("subjectAltName", ()) if kind == "DNS"
        )
        found += [name for kind, name in names.get("subjectAltName", ()) if kind == "IP Address"]
        subject = dict(pair for part in names.get("subject", ()) for pair in part)
        return str(next(iter(found), subject.get("commonName", "")))

    def _handshake(self) -> dict[str, Any]:
        """What a client learns of the certificate, which trusts it and nothing else."""
        client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client.check_hostname = False
        client.verify_flags |= (
            ssl.VERIFY_X509_PARTIAL_CHAIN
        )  # as gRPC: the certificate need not be an authority's
        _read(self.cert_file, "cert_file")
        _read(self.key_file, "key_file")
        try:
            client.load_verify_locations(self.cert_file)
        except ssl.SSLError:
            raise ConfigError(
                f"{self.cert_file} is no certificate; expected PEM", field="tls.cert_file"
            ) from None
        try:
            server.load_cert_chain(self.cert_file, self.key_file, password=_no_password)
        except (ssl.SSLError, ValueError) as error:
            what = (
                "is not the key of cert_file" if "MISMATCH" in str(error) else "is no key, or has a password"
            )
            message = f"{self.key_file} {what}; expected the certificate's own in PEM, without a password"
            raise ConfigError(message, field="tls.key_file") from None
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        here = client.wrap_bio(to_client, to_server)
        there = server.wrap_bio(to_server, to_client, server_side=True)
        try:
            for end in (here, there) * _FLIGHTS:
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason
            raise ConfigError(f"{self.cert_file}: clients refuse it: {why}", field="tls.cert_file") from None
        return dict(here.getpeercert() or {})


def _read(path: str, field: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"expected a readable PEM file: {error}", field=f"tls.{field}") from None


def _no_password() -> str:
    raise ValueError("a key with a password")  # else OpenSSL asks at the terminal
