"""The deployment token, and the files of mutual TLS. Real handshakes are in tests/distributed/test_worker.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.errors import ConfigError
from barista.trust import TLS_NAME, Trust, with_remedy


def test_a_call_with_the_metadata_of_the_same_token_is_accepted():
    assert Trust("secret").accepts(Trust("secret").metadata)
    assert Trust("secret").accepts((("user-agent", "x"), *Trust("secret").metadata))


@given(st.text(min_size=1), st.text(min_size=1))
def test_only_the_same_token_is_accepted(ours: str, theirs: str):
    assert Trust(ours).accepts(Trust(theirs).metadata) == (ours == theirs)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        (),
        (("authorization", "secret"),),
        (("authorization", "bearer secret"),),
        (("authorization", ""),),
        (("x-authorization", "Bearer secret"),),
        (("authorization", "Bearer secret"), ("authorization", "Bearer other")),
    ],
)
def test_anything_else_is_refused(metadata):
    assert not Trust("secret").accepts(metadata)


def test_an_empty_token_is_an_error():
    with pytest.raises(ConfigError, match="BARISTA_POOL_TOKEN"):
        Trust("")


@pytest.mark.parametrize("missing", ["ca.pem", "cert.pem", "key.pem"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str):
    for name in {"ca.pem", "cert.pem", "key.pem"} - {missing}:
        (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match=missing):
        Trust("secret", tmp_path)


def test_only_what_failed_for_want_of_trust_gets_a_remedy():
    assert with_remedy("UNAVAILABLE: connection refused") == "UNAVAILABLE: connection refused"
    assert TLS_NAME in with_remedy("Tls handshake failed (TSI_PROTOCOL_FAILURE): CERTIFICATE_VERIFY_FAILED")
