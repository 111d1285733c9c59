"""config.json as anyone may write it: impossible values are named, missing keys take transformers' defaults."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from barista.errors import CheckpointError
from experts.checkpoint import TensorInfo
from experts.checkpoint.gguf_config import config_of
from experts.checkpoint.gguf_header import GGUFFile
from experts.checkpoint.gguf_names import FAMILIES as GGUF_FAMILIES
from router.model.families import FAMILIES, model_spec
from router.model.spec import GQASpec, MLASpec, ModelSpec, MoESpec
from router.tokenizer import Tokenizer

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
LLAMA: dict[str, Any] = SIZES | {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4}
DEEPSEEK: dict[str, Any] = SIZES | {"architectures": ["DeepseekV3ForCausalLM"], "num_attention_heads": 4}
QWEN_MOE: dict[str, Any] = SIZES | {"architectures": ["Qwen3MoeForCausalLM"], "num_attention_heads": 4}
YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# Where the message does not name the key itself.
SAID = {
    "rope_scaling": r"rope_scaling|RoPE: \w+ is",
    "num_attention_heads": "num_attention_heads|hidden_size is 64, expected a multiple of 3",
}
# What a family's default configuration leaves open.
NEEDED: dict[str, dict[str, Any]] = {"DeepseekV2ForCausalLM": {"num_experts_per_tok": 6}}


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (LLAMA, "hidden_size", None),
        (LLAMA, "hidden_size", 64.0),
        (LLAMA, "hidden_size", True),
        (LLAMA, "num_hidden_layers", "x"),
        (LLAMA, "num_hidden_layers", -1),
        (LLAMA, "num_hidden_layers", 0),
        (LLAMA, "num_hidden_layers", 10**12),
        (LLAMA, "vocab_size", -5),
        (LLAMA, "max_position_embeddings", 0),
        (LLAMA, "num_attention_heads", 0),
        (LLAMA, "num_attention_heads", 3),
        (LLAMA, "num_key_value_heads", 3),
        (LLAMA, "num_key_value_heads", 0),
        (LLAMA, "head_dim", 63),
        (LLAMA, "partial_rotary_factor", 0.01),
        (LLAMA, "partial_rotary_factor", 1.5),
        (LLAMA, "rope_theta", -1),
        (LLAMA, "rope_theta", 10**400),
        (LLAMA, "rope_scaling", 3),
        (LLAMA, "rope_parameters", ["yarn"]),
        (LLAMA, "rope_scaling", {"rope_type": ["x"]}),
        (LLAMA, "rope_scaling", YARN | {"factor": "4"}),
        (LLAMA, "rope_scaling", YARN | {"original_max_position_embeddings": 0}),
        (LLAMA, "rope_scaling", YARN | {"beta_fast": -1}),
        (LLAMA, "rope_scaling", YARN | {"truncate": 1}),
        (LLAMA, "rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}),
        (LLAMA, "rms_norm_eps", "a"),
        (LLAMA, "rms_norm_eps", float("nan")),
        (LLAMA, "rms_norm_eps", float("inf")),
        (LLAMA, "tie_word_embeddings", "yes"),
        (DEEPSEEK, "n_group", 0),
        (DEEPSEEK, "n_group", 7),
        (DEEPSEEK | {"topk_group": 8}, "n_group", 256),
        (DEEPSEEK, "topk_group", 9),
        (DEEPSEEK, "num_experts_per_tok", 0),
        (DEEPSEEK, "num_experts_per_tok", 200),
        (DEEPSEEK, "n_routed_experts", 10**12),
        (DEEPSEEK, "qk_rope_head_dim", 7),
        (DEEPSEEK, "q_lora_rank", 0),
        (DEEPSEEK, "routed_scaling_factor", float("nan")),
        (DEEPSEEK, "num_nextn_predict_layers", 10**9),
        (DEEPSEEK, "rope_scaling", YARN | {"mscale": "x", "mscale_all_dim": 1.0}),
        (QWEN_MOE, "mlp_only_layers", 3),
        (QWEN_MOE, "mlp_only_layers", ["x"]),
        (QWEN_MOE, "decoder_sparse_step", 0),
        (QWEN_MOE, "num_local_experts", -1),
    ],
)
def test_an_impossible_value_is_refused_by_name(base: dict[str, Any], key: str, value: Any) -> None:
    model_spec(base)
    with pytest.raises(CheckpointError) as refusal:
        model_spec(base | {key: value})
    assert refusal.value.remedy
    assert re.search(SAID.get(key, key), str(refusal.value))


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.just(10**12), st.text(max_size=2),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.sampled_from(sorted(YARN)), st.integers(-1, 9)),
)  # fmt: skip


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_configuration_gives_a_spec_or_a_checkpoint_error(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FAMILIES)))
    keys = st.sampled_from(sorted({*FAMILIES[name].defaults, *SIZES, "rope_scaling", "rope_parameters", "hidden_act"}))
    changes = data.draw(st.dictionaries(keys, JUNK, min_size=1, max_size=3))
    # Small tables only: what is tested is the reading.
    small = {"n_routed_experts": 16, "num_experts": 16, "num_experts_per_tok": 2, "num_attention_heads": 4}
    with contextlib.suppress(CheckpointError):
        model_spec(SIZES | small | changes | {"architectures": [name]})


def test_the_message_names_key_value_and_what_is_expected() -> None:
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM: hidden_size is null, expected an integer from 1"):
        model_spec(LLAMA | {"hidden_size": None})
    with pytest.raises(CheckpointError, match=r"num_local_experts is -1, expected an integer from 1"):
        model_spec(QWEN_MOE | {"num_local_experts": -1})
    with pytest.raises(CheckpointError, match=r"lacks the key 'vocab_size'"):
        model_spec({key: value for key, value in LLAMA.items() if key != "vocab_size"})


def test_more_experts_than_any_table_of_names_should_hold_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"9997 layers of 256 experts"):
        model_spec(DEEPSEEK | {"num_hidden_layers": 10_000})


@pytest.mark.parametrize("names", [5, "LlamaForCausalLM", [["x"]], [None], {"a": 1}])
def test_architectures_must_be_a_list_of_names(names: Any) -> None:
    with pytest.raises(CheckpointError, match=r"architectures is .*, expected a list with one name"):
        model_spec(LLAMA | {"architectures": names})


@pytest.mark.parametrize("config", [[], "x", None, 3])
def test_a_config_that_is_no_object_is_refused(config: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is .*, expected an object"):
        model_spec(config)


def our_values(spec: ModelSpec) -> dict[str, Any]:
    """The spec under the names of transformers' configuration classes."""
    attention = spec.attention
    values: dict[str, Any] = {
        "rms_norm_eps": spec.rms_norm_eps,
        "max_position_embeddings": spec.max_position,
        "tie_word_embeddings": spec.tied_embeddings,
        "rope_theta": attention.rope.theta,
    }
    if isinstance(attention, MLASpec):
        names = ("q_lora_rank", "kv_lora_rank", "v_head_dim")
        values |= {name: getattr(attention, name) for name in names}
        values |= {"qk_nope_head_dim": attention.nope_head_dim, "qk_rope_head_dim": attention.rope_head_dim}
        values |= {"attention_bias": attention.bias, "rope_interleave": attention.rope.interleaved}
    else:
        values |= {"num_key_value_heads": attention.num_kv_heads, "head_dim": attention.head_dim}
        values |= {"clip_qkv": attention.clip_qkv, "attention_bias": attention.qkv_bias}
        values |= {"use_qk_norm": attention.qk_norm != "none"}
        values |= {"partial_rotary_factor": attention.rope.dim / attention.head_dim}
    moe_layers = [layer for layer in spec.layers if isinstance(layer, MoESpec)]
    return values | (_moe_values(spec, moe_layers[0], len(moe_layers)) if moe_layers else {})


def _moe_values(spec: ModelSpec, layer: MoESpec, num_moe_layers: int) -> dict[str, Any]:
    gate = layer.gate
    experts = dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), gate.num_experts)
    return experts | {
        "num_experts_per_tok": gate.top_k,
        "n_group": gate.num_groups,
        "topk_group": gate.topk_groups,
        "norm_topk_prob": gate.normalise,
        "routed_scaling_factor": gate.scale,
        "moe_intermediate_size": layer.experts.intermediate_size,
        "n_shared_experts": layer.shared_intermediate_size // layer.experts.intermediate_size,
        "first_k_dense_replace": spec.num_layers - num_moe_layers,
        "num_mtp_layers": spec.num_extra_layers,
    }


def their_values(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """All that the configuration says, RoPE's values among the others; null where it leaves a value to the model."""
    values = config.to_dict()
    rope = values.pop("rope_parameters")
    heads = config.num_attention_heads
    values |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0)}
    if values.get("head_dim") is None:
        values["head_dim"] = config.hidden_size // heads
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    return values


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_missing_keys_take_the_defaults_of_transformers(name: str) -> None:
    sizes = SIZES | {"num_attention_heads": 32, "hidden_size": 4096, **NEEDED.get(name, {})}
    ours = our_values(model_spec(sizes | {"architectures": [name]}))
    theirs = their_values(getattr(transformers, name.replace("ForCausalLM", "Config"))(**sizes))
    # DeepSeek-V2's null groups mean no groups, Qwen2's bias is its model's and no key.
    compared = {key for key in ours if theirs.get(key) is not None} - (
        {"head_dim"} if "kv_lora_rank" in ours else set()
    )
    assert {key: ours[key] for key in compared} == {key: theirs[key] for key in compared}
    assert len(compared) >= 6


def test_a_glm_rotates_half_of_each_head_unless_it_says_otherwise() -> None:
    config = SIZES | {"architectures": ["Glm4MoeForCausalLM"], "num_attention_heads": 8, "head_dim": 16}
    assert model_spec(config).attention.rope.dim == 8
    assert model_spec(config | {"partial_rotary_factor": 1.0}).attention.rope.dim == 16


def test_a_sliding_window_that_is_not_used_does_not_bound_the_length() -> None:
    config = SIZES | {"architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 32, "hidden_size": 128}
    assert model_spec(config | {"sliding_window": 64}).max_position == 32768
    assert model_spec(config | {"sliding_window": 64, "use_sliding_window": True}).max_position == 64
    mixtral = config | {"architectures": ["MixtralForCausalLM"]}
    assert model_spec(mixtral | {"sliding_window": 64}).max_position == 64


def test_no_key_value_heads_means_as_many_as_heads() -> None:
    attention = model_spec(LLAMA | {"num_key_value_heads": None}).attention
    assert isinstance(attention, GQASpec)
    assert attention.num_kv_heads == 4


KIMI_K2 = """{
  "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "attention_bias": false, "aux_loss_alpha": 0.001,
  "bos_token_id": 163584, "eos_token_id": 163585, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
  "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 131072,
  "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1,
  "norm_topk_prob": true, "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 61,
  "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
  "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn"},
  "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
  "scoring_func": "sigmoid", "tie_word_embeddings": false, "topk_group": 1, "topk_method": "noaux_tc",
  "v_head_dim": 128, "vocab_size": 163840}"""


def test_kimi_k2_is_a_deepseek_v3() -> None:
    spec = model_spec(json.loads(KIMI_K2))
    assert (spec.num_layers, spec.num_experts, spec.num_extra_layers) == (61, 384, 0)
    assert spec.attention.rope.scaling == "yarn"
    assert spec.attention.rope.theta == 50000.0
    moe = spec.layers[1]
    assert isinstance(moe, MoESpec)
    assert (moe.gate.top_k, moe.gate.num_groups, moe.gate.scale) == (8, 1, 2.827)


def test_a_tiktoken_model_without_tokenizer_json_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(KIMI_K2)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*barista pull"):
        Tokenizer.from_checkpoint(tmp_path)
    (tmp_path / "tiktoken.model").write_text("IQ== 0")
    with pytest.raises(CheckpointError, match=r"tiktoken\.model but no tokenizer\.json.*save_pretrained"):
        Tokenizer.from_checkpoint(tmp_path)


def gguf_file(**rope: Any) -> GGUFFile:
    numbers = {"embedding_length": 64, "feed_forward_length": 96, "block_count": 2, "attention.head_count": 4}
    llama = numbers | {"context_length": 512, "attention.layer_norm_rms_epsilon": 1e-5, **rope}
    metadata = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in llama.items()}
    path = Path("m.gguf")
    table = TensorInfo(name="token_embd.weight", dtype="F32", shape=(9, 64), file=path, offset=0, nbytes=9 * 64 * 4)
    return GGUFFile(path, metadata, {table.name: table})


def test_a_gguf_file_may_scale_its_positions_only_as_the_model_can() -> None:
    yarn = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
    rope = model_spec(
        config_of(gguf_file(**{"rope.scaling.type": "yarn"}, **yarn), GGUF_FAMILIES["llama"])
    ).attention.rope
    assert (rope.scaling, rope.factor, rope.original_max_len) == ("yarn", 4.0, 128)
    with pytest.raises(CheckpointError, match=r"'linear' is not supported\. Known: none, yarn, Llama 3\.1's"):
        config_of(gguf_file(**{"rope.scaling.type": "linear"}, **yarn), GGUF_FAMILIES["llama"])
