"""llama.cpp, through llama-cpp-python: python -m benchmarks.peers.llama_cpp MODEL.gguf [--sequences 1,4,16]"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time

import llama_cpp as llama

from benchmarks.ids import CONTEXT, PREFILL, SEQUENCES, STEPS, WARM_UP, Ids


class Runner:
    """A context of the model for so many sequences, which advance together."""

    def __init__(self, model: ctypes.c_void_p, sequences: int, tokens: int, threads: int) -> None:
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = tokens, 2048, 512, sequences
        settings.n_threads = settings.n_threads_batch = threads
        if hasattr(settings, "kv_unified"):
            settings.kv_unified = True
        self.context, self.length = llama.llama_init_from_model(model, settings), 0
        assert self.context

    def step(self, ids: list[list[int]]) -> None:
        """The next tokens of every sequence, equally many; logits of the last of each are computed."""
        sequences, count = len(ids), len(ids[0])
        batch = llama.llama_batch_init(sequences * count, 0, 1)
        batch.n_tokens = sequences * count
        for at in range(batch.n_tokens):
            sequence, offset = divmod(at, count)
            batch.token[at], batch.pos[at] = ids[sequence][offset], self.length + offset
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = offset == count - 1
        assert llama.llama_decode(self.context, batch) == 0
        llama.llama_batch_free(batch)
        self.length += count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--sequences", default=",".join(map(str, SEQUENCES)))
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(args.model.encode(), settings)
    assert model, f"llama.cpp cannot load {args.model}"
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    decode = {}
    for sequences in map(int, args.sequences.split(",")):
        ids = Ids(vocab)
        runner = Runner(model, sequences, sequences * (args.context + WARM_UP + STEPS), args.threads)
        while runner.length < args.context:
            runner.step(ids.draw(sequences, min(max(1, PREFILL // sequences), args.context - runner.length)))
        for _ in range(WARM_UP):
            runner.step(ids.draw(sequences))
        started = time.perf_counter()
        for _ in range(STEPS):
            runner.step(ids.draw(sequences))
        decode[str(sequences)] = sequences * STEPS / (time.perf_counter() - started)
        llama.llama_free(runner.context)
    prompt, speeds = Ids(vocab).draw(1, PREFILL), []
    for _ in range(2):  # the first one builds what the second one uses
        runner = Runner(model, 1, PREFILL, args.threads)
        started = time.perf_counter()
        runner.step(prompt)
        speeds.append(PREFILL / (time.perf_counter() - started))
        llama.llama_free(runner.context)
    print(json.dumps({"decode": decode, "prefill_512": max(speeds)}))


if __name__ == "__main__":
    main()
