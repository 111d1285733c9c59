"""Compiles the GPU kernels for every architecture: python -m experts.expert_parallel.build [SOURCES]

One call of nvcc with warnings as errors; a kernel that spills registers or uses local memory is an error too. SOURCES:
the folder cuda/ of a checkout, whose kernels go into the installed package; so an image needs no nvcc.
"""

from __future__ import annotations

import sys
from pathlib import Path

from barista.errors import BaristaError
from experts.expert_parallel.library import cuda_path, install_cuda


def main() -> int:
    """Print where the library is; 1, and the reason on stderr, when it cannot be built."""
    try:
        print(install_cuda(Path(sys.argv[1])) if len(sys.argv) > 1 else cuda_path())  # noqa: T201
    except BaristaError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
