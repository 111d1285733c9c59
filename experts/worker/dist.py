"""python -m experts.worker.dist: a worker between nodes (docs/between-nodes.md). It ends with its engine."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from barista.errors import BaristaError
from experts import kernels
from experts.expert_model import ExpertModel
from experts.transport.dist_group import GroupBroken
from experts.transport.dist_model import loader
from experts.transport.dist_rendezvous import run_worker
from experts.worker.store import ExpertStore


def main() -> None:
    """Serve in one group after another."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    options = _options()
    kernels.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    try:
        store = ExpertStore(ExpertModel.from_json(options.model.read_text()), options.capacity)
        run_worker(options.engine, options.name, loader(store))
    except (BaristaError, GroupBroken) as error:
        sys.exit(f"{options.name}: {error}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experts.worker.dist", description=__doc__)
    parser.add_argument("--name", required=True, help="as no other worker of this engine is called")
    parser.add_argument("--engine", required=True, help="HOST:PORT of its rendezvous")
    parser.add_argument("--model", type=Path, required=True, help="file that ExpertModel.to_json wrote")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--capacity", type=int, required=True, help="bytes of expert weights")
    return parser.parse_args()


if __name__ == "__main__":
    main()
