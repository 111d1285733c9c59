"""transformers with grouped_mm experts: python -m benchmarks.peers.transformers_mm MODEL_DIR [--sequences 1,4,16]"""

from __future__ import annotations

import argparse
import json
import os
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.ids import CONTEXT, PREFILL, SEQUENCES, STEPS, WARM_UP, Ids


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--sequences", default=",".join(map(str, SEQUENCES)))
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", experts_implementation="grouped_mm").eval()
    vocab, decode = model.config.vocab_size, {}
    for sequences in map(int, args.sequences.split(",")):
        ids, cache = Ids(vocab), DynamicCache(config=model.config)
        model(torch.tensor(ids.draw(sequences, CONTEXT)), past_key_values=cache)
        for _ in range(WARM_UP):
            model(torch.tensor(ids.draw(sequences)), past_key_values=cache)
        started = time.perf_counter()
        for _ in range(STEPS):
            model(torch.tensor(ids.draw(sequences)), past_key_values=cache)
        decode[str(sequences)] = sequences * STEPS / (time.perf_counter() - started)
    prompt = torch.tensor(Ids(vocab).draw(1, PREFILL))
    model(prompt[:, :64])
    started = time.perf_counter()
    model(prompt)
    print(json.dumps({"decode": decode, "prefill_512": PREFILL / (time.perf_counter() - started)}))


if __name__ == "__main__":
    main()
