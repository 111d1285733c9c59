"""Barista beside whichever peers are installed, on the same work in one sitting.

    python -m benchmarks.compare --model DIR --formats bf16,int8,int4 --rounds 3 \\
        [--llama-python PY --q8-0 M.gguf --q4-0 M.gguf] [--vllm-python PY] [--transformers-python PY] [--json]

Each peer runs in the Python environment that is named (see benchmarks/peers). Rounds take everybody in turn; figures
are medians, ratios are medians of the rounds' ratios. A share of the limit (benchmarks/limit.py) is that of the same
process. vLLM decodes its own greedy tokens, so it is compared with a greedy run of Barista in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Run = Callable[[], dict[str, Any]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--sequences", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--q8-0", type=Path)
    parser.add_argument("--q4-0", type=Path)
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--transformers-python", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    runs = runners(args)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for round_index in range(args.rounds):
        for name, run in runs.items():
            results[name].append(run())
            print(f"round {round_index + 1}: {name}: {json.dumps(results[name][-1])}", file=sys.stderr, flush=True)
    rows = [row(name, results, args.sequences.split(",")) for name in runs]
    print(json.dumps(rows) if args.json else "\n".join(table(rows)))


def runners(args: argparse.Namespace) -> dict[str, Run]:
    """Everyone who takes part, in the order of a round: each format, and behind it the peer it is compared with."""

    def ours(form: str, *more: str) -> Run:
        engine = ("benchmarks.engine", "--model", str(args.model), "--format", form, "--rounds", "1", "--json", *more)
        return lambda: _printed(Path(sys.executable), *engine, "--sequences", args.sequences)

    def theirs(python: Path, module: str, model: Path) -> Run:
        return lambda: _printed(python, f"benchmarks.peers.{module}", str(model), "--sequences", args.sequences)

    runs: dict[str, Run] = {}
    for form in args.formats.split(","):
        runs[form] = ours(form)
        gguf = {"int8": args.q8_0, "int4": args.q4_0}.get(form)
        if args.llama_python and gguf:
            runs[f"llama.cpp {'Q8_0' if form == 'int8' else 'Q4_0'}"] = theirs(args.llama_python, "llama_cpp", gguf)
    if args.vllm_python:
        runs["bf16 greedy"] = ours("bf16", "--greedy")
        runs["vLLM"] = theirs(args.vllm_python, "vllm_cpu", args.model)
    if args.transformers_python:
        runs["transformers"] = theirs(args.transformers_python, "transformers_mm", args.model)
    return runs


BESIDE = {"llama.cpp Q8_0": "int8", "llama.cpp Q4_0": "int4", "vLLM": "bf16 greedy", "transformers": "bf16"}


def row(name: str, results: dict[str, list[dict[str, Any]]], sequences: list[str]) -> dict[str, Any]:
    """One runner's medians; of ours the shares of the limit, of a peer's how many times as fast we are."""

    def figures(runner: str) -> dict[str, list[float]]:
        of = results[runner]
        decode = {f"decode {count}": [run["decode"][count] for run in of] for count in sequences}
        return decode | {"prefill 512": [run["prefill_512"] for run in of]}

    found = figures(name)
    medians: dict[str, Any] = {"name": name} | {key: statistics.median(values) for key, values in found.items()}
    if name in BESIDE:
        ours = figures(BESIDE[name])
        medians["ratios"] = {
            key: statistics.median(a / b for a, b in zip(ours[key], found[key], strict=True)) for key in found
        }
    else:
        medians["shares"] = {
            f"decode {count}": statistics.median(run["share"][count] for run in results[name]) for count in sequences
        }
        medians["read_bandwidth"] = statistics.median(run["read_bandwidth"] for run in results[name])
    return medians


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: tokens/s, of ours with the share of the limit, of peers with our ratio to them."""
    columns = [key for key in rows[0] if key.startswith(("decode", "prefill"))]
    lines = ["| tokens/s | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for entry in rows:
        cells = []
        for column in columns:
            ratio, share = entry.get("ratios", {}).get(column), entry.get("shares", {}).get(column)
            note = f" (we: {ratio:.2f}x)" if ratio else f" ({share:.0%} of the limit)" if share else ""
            cells.append(f"{entry[column]:.1f}{note}")
        lines.append(f"| {entry['name']} | " + " | ".join(cells) + " |")
    bandwidths = ", ".join(f"{e['name']} {e['read_bandwidth'] / 1e9:.1f}" for e in rows if "read_bandwidth" in e)
    return [*lines, "", f"Read bandwidth while these ran, GB/s: {bandwidths}."]


def _printed(python: Path, module: str, *arguments: str) -> dict[str, Any]:
    """The JSON object on the last line that a module prints."""
    done = subprocess.run(
        [python, "-m", module, *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{python} -m {module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
