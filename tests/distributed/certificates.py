"""Certificates of mutual TLS for tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def _openssl(*arguments: str, cwd: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True)


def certificates(folder: Path, name: str = "barista.internal") -> Path:
    """A new folder for --tls-dir: a CA of its own, and one certificate that it signed. Skips without openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make certificates with")
    folder.mkdir()
    key = ("-newkey", "rsa:2048", "-nodes")
    _openssl("req", "-x509", *key, "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem", cwd=folder)
    _openssl("req", *key, "-subj", "/CN=barista", "-keyout", "key.pem", "-out", "cert.csr", cwd=folder)
    (folder / "san.ext").write_text(f"subjectAltName=DNS:{name}")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san.ext")
    _openssl("x509", "-req", "-in", "cert.csr", *signing, "-out", "cert.pem", cwd=folder)
    return folder
