"""The worker's side of its orders."""

from __future__ import annotations

import json
import subprocess
import sys

# A worker whose model, like a compiler or a library, prints to the standard output: from Python and past it.
NOISY = """
import os
from experts.expert_parallel import worker

class Noisy:
    def __init__(self, model):
        print("loading")
    def obey(self, order):
        print("compiling", flush=True)
        os.write(1, b"ptxas info\\n")
        return {"left": True}

worker.Worker = Noisy
worker.ExpertModel.from_json = lambda line: None
worker.main()
"""


def test_what_a_library_prints_is_no_answer() -> None:
    orders = "{}\n" + json.dumps({"do": "leave"}) + "\n"
    with subprocess.Popen(
        [sys.executable, "-c", NOISY, "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as noisy:
        assert noisy.stdin is not None
        assert noisy.stdout is not None
        noisy.stdin.write(orders)
        noisy.stdin.flush()
        answers = [json.loads(noisy.stdout.readline()) for _ in range(2)]
    assert answers == [{"do": "start"}, {"do": "leave", "left": True}]
