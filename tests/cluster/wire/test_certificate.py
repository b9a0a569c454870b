"""What is wrong with a certificate or its key is said before anything starts; what it is for is read from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flm.cluster.wire.certificate import Tls
from flm.worker.errors import ConfigError

DATA = Path(__file__).parents[2] / "data"
LOCKED = """-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHeMEkGCSqGSIb3DQEFDTA8MBsGCSqGSIb3DQEFDDAOBAg=
-----END ENCRYPTED PRIVATE KEY-----
"""


def tls(certificate: str, key: str) -> Tls:
    return Tls(str(DATA / certificate), str(DATA / key))


def test_the_name_a_certificate_is_for() -> None:
    assert tls("loopback.pem", "loopback.key").server_name() == "localhost"
    assert tls("named.pem", "named.key").server_name() == "any.lab.example.com"


@pytest.mark.parametrize(
    ("certificate", "key", "field", "said"),
    [
        ("none.pem", "named.key", "tls.cert_file", "expected a readable PEM file"),
        ("named.pem", "none.key", "tls.key_file", "expected a readable PEM file"),
        ("named.key", "named.key", "tls.cert_file", "is no certificate"),
        ("smollm2_greedy.json", "named.key", "tls.cert_file", "is no certificate"),
        ("named.pem", "named.pem", "tls.key_file", "is no key"),
        ("named.pem", "loopback.key", "tls.key_file", "is not the key of cert_file"),
        ("expired.pem", "named.key", "tls.cert_file", "clients refuse it: certificate has expired"),
    ],
)
def test_what_would_fail_is_refused_with_its_field(certificate: str, key: str, field: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        tls(certificate, key).credentials()
    assert caught.value.field == field


def test_a_key_with_a_password_is_refused_and_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(LOCKED)
    with pytest.raises(ConfigError, match="without a password"):
        Tls(str(DATA / "named.pem"), str(tmp_path / "key")).server_name()
