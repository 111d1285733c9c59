"""vLLM's CPU backend, greedy: python -m benchmarks.peers.vllm_cpu MODEL_DIR [--sequences 1,4,16]

It decodes its own tokens, so it is compared with `benchmarks.engine --greedy`. The speed of decoding is that of what 33
tokens take longer than 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams

from benchmarks.ids import CONTEXT, PREFILL, SEQUENCES, STEPS, Ids


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--sequences", default=",".join(map(str, SEQUENCES)))
    args = parser.parse_args()
    stdout, sys.stdout = sys.stdout, sys.stderr
    model = LLM(
        args.model, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048, max_num_seqs=16,
        enforce_eager=True, enable_prefix_caching=False,
    )  # fmt: skip
    vocab = model.llm_engine.model_config.get_vocab_size()

    def seconds(prompts: list[list[int]], tokens: int) -> float:
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - started

    seconds(Ids(vocab).draw(1, 16), 4)
    decode = {}
    for sequences in map(int, args.sequences.split(",")):
        prompts = Ids(vocab).draw(sequences, CONTEXT)
        one = seconds(prompts, 1)
        decode[str(sequences)] = sequences * STEPS / (seconds(prompts, 1 + STEPS) - one)
    prefill = PREFILL / seconds(Ids(vocab).draw(1, PREFILL), 1)
    print(json.dumps({"decode": decode, "prefill_512": prefill}), file=stdout)


if __name__ == "__main__":
    main()
