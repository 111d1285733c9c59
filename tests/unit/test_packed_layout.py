"""Where packed tensors lie, and how much memory they take: laws of pure functions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.errors import CheckpointError
from experts.checkpoint import Checkpoint, TensorInfo
from experts.expert_model import ExpertModel, expert_bytes
from experts.formats import FP8, INT4, INT8, Q4_0, Q8_0, QUANTISED, Format, forms_of
from experts.packed.experts import expert_part
from experts.packed.layout import PAGE
from experts.spec import FFNSpec

HIDDEN = 128


def checkpoint(folder: Path, spec: FFNSpec, layers: list[int], dtype: str = "BF16") -> Checkpoint:
    """A table of tensors, without any weights."""
    file = folder / "model.safetensors"
    file.touch()
    names = {
        name: shape
        for layer in layers
        for e in range(spec.num_experts)
        for name, shape in spec.tensors(layer, e).items()
    }
    tensors = {
        name: TensorInfo(name=name, dtype=dtype, shape=shape, file=file, offset=0, nbytes=2 * shape[0] * shape[1])
        for name, shape in names.items()
    }
    return Checkpoint(path=folder, config={}, tensors=tensors, files=(file,))


@given(
    form=st.sampled_from(list(QUANTISED.values())),
    intermediate=st.integers(1, 5).map(lambda n: 64 * n),
    experts=st.integers(1, 5),
    layers=st.sets(st.integers(0, 60), min_size=1, max_size=3),
)
def test_each_expert_begins_on_a_page_and_its_matrices_lie_side_by_side_in_the_file_of_its_layer(
    tmp_path_factory: pytest.TempPathFactory, form: Format, intermediate: int, experts: int, layers: set[int]
) -> None:
    spec = FFNSpec(hidden_size=HIDDEN, intermediate_size=intermediate, num_experts=experts)
    model = checkpoint(tmp_path_factory.mktemp("m"), spec, sorted(layers))
    part = expert_part(model, dict.fromkeys(sorted(layers), spec), form.name)
    size = ExpertModel(
        path=model.path, dtype="bfloat16", top_k=1, layers=dict.fromkeys(layers, spec), digest=b"", format=form.name
    )
    for layer in layers:
        end = 0
        for expert in range(experts):
            names = spec.tensors(layer, expert)
            places = [part.tensors[n] for name in names for n in (name + "_scale_inv", name) if n in part.tensors]
            assert places[0].offset == -(-end // PAGE) * PAGE
            for before, place in pairwise(places):
                assert 0 <= place.offset - (before.offset + before.nbytes) < 64
            assert {place.file for place in places} == {part.folder / f"layer-{layer:05}.bin"}
            end = places[-1].offset + places[-1].nbytes
            assert sum(place.nbytes for place in places) == expert_bytes(model, size)[layer]
        assert part.sizes[f"layer-{layer:05}.bin"] == -(-end // PAGE) * PAGE


def test_a_model_in_a_plain_dtype_packs_nothing(tmp_path: Path) -> None:
    spec = FFNSpec(hidden_size=HIDDEN, intermediate_size=40, num_experts=2)
    part = expert_part(checkpoint(tmp_path, spec, [0]), {0: spec}, "plain")
    assert (part.sizes, part.tensors) == ({}, {})


def test_fp8_as_it_is_stored_is_used_in_place(tmp_path: Path) -> None:
    spec = FFNSpec(hidden_size=HIDDEN, intermediate_size=40, num_experts=2)
    model = checkpoint(tmp_path, spec, [0], "F8_E4M3")
    part = expert_part(model, {0: spec}, "fp8")
    assert part.sizes == {}
    assert {info.file for info in part.tensors.values()} == {model.files[0]}


def test_a_shape_that_the_format_cannot_take_is_named_with_the_tensor_and_the_remedy(tmp_path: Path) -> None:
    spec = FFNSpec(hidden_size=HIDDEN, intermediate_size=40, num_experts=1)
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.down_proj\.weight of shape \[128, 40\].*int4.*--format bf16"
    ):
        expert_part(checkpoint(tmp_path, spec, [3]), {3: spec}, "int4")


@pytest.mark.parametrize(
    ("stored", "asked", "form"),
    [
        ("Q8_0", "gguf", Q8_0),
        ("Q4_0", "gguf", Q4_0),
        ("Q4_1", "gguf", None),
        ("Q8_0", "int8", Q8_0),
        ("Q8_0", "int4", INT4),
        ("Q4_0", "int4", Q4_0),
        ("Q4_0", "int8", INT8),
        ("F8_E4M3", "fp8", FP8),
        ("F8_E4M3", "int8", INT8),
        ("Q8_0", "plain", None),
    ],
)
def test_what_a_format_holds_without_loss_is_kept(tmp_path: Path, stored: str, asked: str, form: Format | None) -> None:
    spec = FFNSpec(hidden_size=HIDDEN, intermediate_size=64, num_experts=1)
    model = checkpoint(tmp_path, spec, [0], stored)
    assert set(forms_of(model, [spec.tensors(0, 0)], asked).values()) == ({form} if form else set())


def test_matrices_of_one_call_are_of_one_format(tmp_path: Path) -> None:
    spec = FFNSpec(hidden_size=HIDDEN, intermediate_size=64, num_experts=1)
    model, other = checkpoint(tmp_path, spec, [0], "Q4_0"), checkpoint(tmp_path, spec, [0], "Q4_1")
    down = list(model.tensors)[2]
    mixed = Checkpoint(path=tmp_path, config={}, tensors={**model.tensors, down: other.tensors[down]})
    assert set(forms_of(mixed, [spec.tensors(0, 0)], "int4").values()) == {INT4}
    assert forms_of(mixed, [spec.tensors(0, 0)], "gguf") == {}
