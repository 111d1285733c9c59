"""ServeConfig: three sources in order of precedence, and nothing unknown or ill-typed passes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.config import TYPES, ServeConfig, load
from barista.errors import ConfigError

NUMBERS = ("port", "threads", "block_size", "kv_cache_tokens", "max_waiting_requests")


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "barista.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_without_any_source_every_field_has_its_default() -> None:
    assert load(None, {}, {}) == ServeConfig()


@given(
    st.dictionaries(st.sampled_from(NUMBERS), st.integers(1, 999)),
    st.dictionaries(st.sampled_from(NUMBERS), st.integers(1, 999)),
    st.dictionaries(st.sampled_from(NUMBERS), st.integers(1, 999)),
)
def test_flags_win_over_the_environment_and_the_environment_over_the_file(
    tmp_path_factory: pytest.TempPathFactory, in_file: dict[str, int], in_env: dict[str, int], flags: dict[str, int]
) -> None:
    file = toml(tmp_path_factory.mktemp("config"), "".join(f"{k} = {v}\n" for k, v in in_file.items()))
    config = load(file, {f"BARISTA_{k.upper()}": str(v) for k, v in in_env.items()}, flags)
    expected = dataclasses.asdict(ServeConfig()) | in_file | in_env | flags
    assert dataclasses.asdict(config) == expected


def test_workers_on_gpus_are_the_engines_own() -> None:
    assert not ServeConfig(device="cuda", workers=8).has_pool
    assert ServeConfig(workers=8).has_pool


@pytest.mark.parametrize("weight_format", ["auto", "float32", "bf16", "fp8"])
def test_a_gpu_holds_a_whole_model(weight_format: str) -> None:
    assert ServeConfig(device="cuda", format=weight_format).device == "cuda"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "int8"}, "format is int8"),
        ({"format": "mxfp4"}, "format is mxfp4"),
        ({"pool": "house"}, "pool is house: pools compute on CPUs alone"),
        ({"controller": "host:1"}, "controller is host:1: pools compute on CPUs alone"),
        ({"workers": 16}, "workers is 16, but an engine on GPUs has at most 15"),
        ({"workers": 2, "redundancy": 3}, "redundancy is 3, but workers on GPUs have no such setting"),
        ({"workers": 2, "transport": "shm"}, "transport is shm, but workers on GPUs"),
        ({"expert_memory": 10**9}, "expert_memory is 1000000000"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused_by_name(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ServeConfig(device="cuda", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(TYPES))
def test_every_field_can_be_set_from_the_file_and_from_the_environment(tmp_path: Path, name: str) -> None:
    special = {
        "format": "bf16",
        "log_level": "error",
        "transport": "shm",
        "max_num_batched_tokens": 70,
        "trace_ratio": 0.5,
        "device": "cpu",
        "controller": "host:1",
    }
    kind = TYPES[name]
    value = special.get(name, "x" if kind in (str, str | None) or "Path" in str(kind) else 7)
    # Some fields mean nothing without workers or traces, and some nothing with workers.
    values = {"workers": 0 if name in ("expert_memory", "engines") else 2, "trace_to": "x", name: value}
    from_file = load(toml(tmp_path, "".join(f"{key} = {json.dumps(entry)}\n" for key, entry in values.items())), {}, {})
    from_env = load(None, {f"BARISTA_{key.upper()}": str(entry) for key, entry in values.items()}, {})
    assert from_file == from_env
    assert getattr(from_file, name) == (Path("x") if "Path" in str(kind) else value)


def test_an_unknown_key_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"barista\.toml: key 'prot' is not known\. .*port"):
        load(toml(tmp_path, "prot = 1"), {}, {})


def test_an_unknown_variable_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"BARISTA_THREAD is not known\. .*BARISTA_THREADS"):
        load(None, {"BARISTA_THREAD": "1"}, {})


def test_variables_of_other_programs_and_of_the_cache_are_left_alone() -> None:
    assert load(None, {"PATH": "/bin", "BARISTA_CACHE": "/c", "BARISTA_API_KEY": "k"}, {}) == ServeConfig()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("port = '80'", "port is '80', which is not an integer"),
        ("port = true", "port is True, which is not an integer"),
        ("port = 80.0", "port is 80.0, which is not an integer"),
        ("drain_timeout = 'x'", "drain_timeout is 'x', which is not a number"),
        ("model = 3", "model is 3, which is not a string"),
        ("api_key_file = ''", "api_key_file is '', which is not a path"),
        ("[port]\nx = 1", "port is {'x': 1}, which is not an integer"),
    ],
)
def test_a_wrong_type_names_key_value_and_expected_type(tmp_path: Path, line: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(toml(tmp_path, line), {}, {})
    assert expected in caught.value.message


@pytest.mark.parametrize("text", ["", "eighty", "1.5", "tcp://10.0.0.1:80"])
def test_a_variable_that_is_no_number_names_itself(text: str) -> None:
    with pytest.raises(ConfigError, match="BARISTA_PORT is"):
        load(None, {"BARISTA_PORT": text}, {})


@pytest.mark.parametrize(
    "flags",
    [
        {"port": -1},
        {"port": 65536},
        {"grpc_port": -1},
        {"grpc_port": 65536},
        {"threads": 0},
        {"drain_timeout": float("nan")},
        {"drain_timeout": -0.1},
        {"format": "fp7"},
        {"log_level": "loud"},
        {"kv_cache_tokens": 10, "kv_cache_bytes": 10},
        {"workers": -1},
    ],
)
def test_a_value_out_of_range_is_refused(flags: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        load(None, {}, flags)


@pytest.mark.parametrize("content", [b"port = ", b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "bad.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load(file, {}, {})


@pytest.mark.parametrize(
    "given",
    [{"redundancy": 1}, {"worker_threads": 1}, {"worker_memory": 1}, {"transport": "grpc"}, {"controller_port": 5}],
)
def test_a_setting_of_the_workers_asks_for_workers(given: dict[str, object]) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=rf"{name} is .*no workers.*--workers N or --pool NAME"):
        load(None, {}, given)
    assert load(None, {}, {"workers": 2, **given}).has_pool
    assert load(None, {}, {"pool": "bar", **given}).has_pool


def test_experts_are_kept_within_a_limit_in_the_engine_only() -> None:
    assert load(None, {"BARISTA_EXPERT_MEMORY": "1000"}, {}).expert_memory == 1000
    for workers in ({"workers": 2}, {"pool": "bar"}):
        with pytest.raises(
            ConfigError, match=r"expert_memory is 1000, but the experts are on workers.*--worker-memory"
        ):
            load(None, {}, {"expert_memory": 1000, **workers})
    with pytest.raises(ConfigError, match="expert_memory is 0"):
        load(None, {}, {"expert_memory": 0})


@pytest.mark.parametrize("name", ["", "a b", "-x", "x/y", "é", "x" * 64])
def test_the_name_of_a_pool_can_be_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match="which is no name"):
        load(None, {}, {"pool": name})


def test_a_step_has_a_token_for_each_of_its_sequences() -> None:
    assert load(None, {}, {"max_num_seqs": 8, "max_num_batched_tokens": 8}).max_num_seqs == 8
    with pytest.raises(ConfigError, match=r"max_num_seqs is 9.*--max-num-batched-tokens"):
        load(None, {}, {"max_num_seqs": 9, "max_num_batched_tokens": 8})


def test_the_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServeConfig().port = 1  # type: ignore[misc]
