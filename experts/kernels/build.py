"""Compiles the kernels for every instruction set that this machine can run: python -m experts.kernels.build

With --installed: for every one of its architecture, into the installed package. So an image needs no compiler.
"""

from __future__ import annotations

import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from barista.errors import BaristaError
from experts.kernels.compiler import build, build_installed, compilable_variants, runnable_variants

logger = logging.getLogger(__name__)


def main() -> int:
    """Build them side by side; 1, and the reason on stderr, when that fails."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    installed = "--installed" in sys.argv[1:]
    one, variants = (build_installed, compilable_variants()) if installed else (build, runnable_variants())
    try:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for path in pool.map(one, variants):
                logger.info("%s", path)
    except BaristaError as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
