"""GGUF metadata as the config.json that the same model has on the Hugging Face hub."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from barista.errors import CheckpointError
from experts.checkpoint.gguf_header import GGUFFile
from experts.checkpoint.gguf_names import FAMILIES, GGUFFamily
from experts.checkpoint.types import DOWNLOAD_AGAIN, TensorInfo

ROPE_FACTORS = "rope_freqs.weight"


def family_of(gguf: GGUFFile) -> GGUFFamily:
    """The table entry of this file. Raises CheckpointError with the known names for an unknown architecture."""
    name = gguf.metadata.get("general.architecture")
    if name == "llama" and gguf.metadata.get("llama.expert_count", 0):
        return FAMILIES["mixtral"]
    if not isinstance(name, str) or name not in FAMILIES or name == "mixtral":
        known = ", ".join(key for key in FAMILIES if key != "mixtral")
        raise CheckpointError(f"{gguf.path}: GGUF architecture {name!r} is not supported.", f"Known: {known}.")
    return FAMILIES[name]


def config_of(gguf: GGUFFile, family: GGUFFamily) -> dict[str, Any]:
    """config.json. Raises CheckpointError for a key that is missing or that no such config can express."""
    read = _Reader(gguf)
    heads = read.integer("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        **{key: read.integer(source) for key, source in family.config_keys.items()},
        "num_key_value_heads": read.integer("attention.head_count_kv", heads),
        "head_dim": read.integer("attention.key_length", read.integer("embedding_length") // max(1, heads)),
        "rms_norm_eps": read.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": read.real("rope.freq_base", 10000.0),
        "vocab_size": read.embedding().shape[0],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.metadata.get("tokenizer.ggml.eos_token_id"),
        **family.constants,
    }
    rotated = read.integer("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        raise CheckpointError(f"{gguf.path}: RoPE over {rotated} of {config['head_dim']} values is not supported.")
    config["rope_scaling"] = read.rope_scaling(config)
    return config


class _Reader:
    """Checked access to the keys under the architecture's own prefix."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        self.prefix = gguf.metadata["general.architecture"]

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.gguf.metadata.get(f"{self.prefix}.{key}", default)
        if type(value) is not int or not 0 < value < 2**31:
            raise self._wrong(key, value, "a positive integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.gguf.metadata.get(f"{self.prefix}.{key}", default)
        if type(value) is not float or not 0 < value < math.inf:
            raise self._wrong(key, value, "a positive number")
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.gguf.path}: metadata {self.prefix}.{key} is {str(value)[:80]}, expected {expected}.", DOWNLOAD_AGAIN
        )

    def embedding(self) -> TensorInfo:
        info = self.gguf.tensors.get("token_embd.weight")
        if info is None or len(info.shape) != 2:
            raise CheckpointError(f"{self.gguf.path}: tensor token_embd.weight is missing or not a matrix.")
        return info

    def rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        if ROPE_FACTORS in self.gguf.tensors:
            return self._llama3_scaling(config)
        kind = self.gguf.metadata.get(f"{self.prefix}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind != "yarn":
            raise CheckpointError(
                f"{self.gguf.path}: RoPE scaling {str(kind)[:80]!r} is not supported.",
                "Known: none, yarn, Llama 3.1's.",
            )
        return {
            "rope_type": "yarn",
            "factor": self.real("rope.scaling.factor"),
            "original_max_position_embeddings": self.integer("rope.scaling.original_context_length"),
        }

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """Llama 3.1's parameters from the per-frequency divisors that the converter computed from them.

        The smallest divisor is 1 and the largest is `factor`; the other three have been the same in every Llama since
        3.1. Whether they are so here is checked against the divisors.
        """
        info = self.gguf.tensors[ROPE_FACTORS]
        raw = np.fromfile(info.file, dtype=np.uint8, count=info.nbytes, offset=info.offset)
        if info.dtype != "F32" or info.shape != (config["head_dim"] // 2,):
            raise CheckpointError(f"{info.file}: tensor {ROPE_FACTORS} is {info.dtype} {list(info.shape)}.")
        divisors = raw.view(np.float32)
        scaling = {
            "rope_type": "llama3",
            "factor": round(float(divisors.max()), 3),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if not np.allclose(divisors, llama3_divisors(scaling, config["rope_theta"], config["head_dim"]), rtol=1e-3):
            raise CheckpointError(f"{info.file}: tensor {ROPE_FACTORS} is not Llama 3.1's RoPE scaling.")
        return scaling


def llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """By how much each of the head_dim / 2 RoPE frequencies is divided (Llama 3.1's rule, as in transformers)."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = smooth.clip(0.0, 1.0)
    divisors: np.ndarray[Any, np.dtype[np.float64]] = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return divisors
