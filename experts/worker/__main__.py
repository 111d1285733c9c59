"""python -m experts.worker: one worker as a process. Prints one line of JSON when it serves; SIGTERM ends it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from barista.errors import BaristaError
from barista.tracing import TRACE_RATIO, WORKER_SERVICE, open_tracer
from barista.trust import TOKEN_VARIABLE, Trust
from experts.expert_model import ExpertModel
from experts.health.watch import GpuWatch, watch_gpus
from experts.worker.server import WorkerServer


def main(nvml: Any = None) -> None:
    """Serve until SIGTERM. A terminal's Ctrl-C reaches the whole group; whoever started us decides what it means.

    nvml: what stands in for the module pynvml where a test has no GPU.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    options = _options()
    try:
        server = _serve(options, nvml)
    except BaristaError as error:
        sys.exit(f"{options.name}: {error}")
    if options.until_eof:
        threading.Thread(target=_wait_for_eof, args=(stopped,), daemon=True).start()
    sys.stdout.write(json.dumps({"name": server.name, "address": server.address, "pid": server.pid}) + "\n")
    sys.stdout.flush()
    stopped.wait()
    server.stop()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experts.worker", description=__doc__)
    parser.add_argument("--name", default="worker-0")
    parser.add_argument("--model", type=Path, required=True, help="file that ExpertModel.to_json wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--capacity", type=int, required=True, help="bytes of expert weights")
    parser.add_argument("--tls-dir", type=Path)
    parser.add_argument("--trace-to", help="OTLP/HTTP endpoint or file of OpenTelemetry traces")
    parser.add_argument("--trace-ratio", type=float, default=TRACE_RATIO, help="share of the steps to trace")
    parser.add_argument("--gpu", action="append", help="index or UUID of a GPU to watch; may be given more than once")
    parser.add_argument("--until-eof", action="store_true", help="end when the standard input does")
    return parser.parse_args()


def _serve(options: argparse.Namespace, nvml: Any) -> WorkerServer:
    gpus: GpuWatch | None = watch_gpus(options.gpu, nvml) if options.gpu else None
    return WorkerServer(
        ExpertModel.from_json(options.model.read_text()),
        options.name,
        options.host,
        options.port,
        options.threads,
        options.capacity,
        Trust(os.environ.get(TOKEN_VARIABLE, ""), options.tls_dir),
        open_tracer(options.trace_to, options.trace_ratio, WORKER_SERVICE, options.name),
        gpus,
    )


def _wait_for_eof(stopped: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 1 << 16):  # not through sys.stdin, whose lock the end of the process wants
        pass
    stopped.set()


if __name__ == "__main__":
    main()
