"""python -m tests.distributed.engine_on_cpus FD: `python -m router.engine FD` with CPUs for GPUs, and two workers."""

from __future__ import annotations

import socket
import sys

import torch

from experts.expert_parallel.pool import GroupConfig
from router.engine import load, loop

CPU = torch.device("cpu")


def main() -> None:
    """What asks for a GPU is told of the CPU. All else is the engine's own."""
    loop.cuda_device = lambda: CPU
    load._group_config = lambda config: GroupConfig(
        engine=CPU, workers=(CPU,) * config.gpu_workers, max_tokens=config.max_num_batched_tokens
    )
    torch.cuda.set_device = lambda device: None
    torch.cuda.mem_get_info = lambda device=None: (2**34, 2**35)
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        loop.serve(sock)


if __name__ == "__main__":
    main()
