"""Experts on a device compute what the CPU kernels compute, whatever holds them and however the rows are padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts import kernels
from experts.device.experts import DeviceExperts
from experts.device.products import grouped_product, looped_product
from experts.device.stacks import stack
from experts.formats import INT8
from experts.kernels.expert_table import ExpertWeights
from experts.kernels.weight import Fp8Weight, TiledWeight, Weight, encode, encode_fp8
from tests.device_models import CPU, expert_weights

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 5, 128, 64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def plain(dtype: torch.dtype = torch.float32) -> list[ExpertWeights]:
    return expert_weights(NUM_EXPERTS, HIDDEN, INTERMEDIATE, dtype)


def each(weights: list[ExpertWeights], change) -> list[ExpertWeights]:
    return [tuple(map(change, expert)) for expert in weights]  # type: ignore[misc]


def as_fp8(weight: Weight) -> Fp8Weight:
    assert isinstance(weight, torch.Tensor)
    return Fp8Weight(*encode_fp8(weight))


def as_int8(weight: Weight) -> TiledWeight:
    assert isinstance(weight, torch.Tensor)
    return TiledWeight(INT8, (weight.shape[0], weight.shape[1]), encode(INT8, weight))


def rows_of(lengths: list[int], padding: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(lengths) + padding, HIDDEN, generator=generator).to(dtype)
    return rows, torch.tensor(lengths).cumsum(0, dtype=torch.int32)


def expected(weights: list[ExpertWeights], rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Each row through its expert by the kernel of the CPU, as a token's only choice."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[:, None]
    table = kernels.ExpertTable(dict(enumerate(weights)), NUM_EXPERTS, dtype=rows.dtype)
    return kernels.moe(rows[: len(ids)], ids, torch.ones(len(ids), 1), table)[0]


LENGTHS = st.lists(st.integers(0, 4), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, padding=st.integers(0, 3))
def test_rows_equal_the_cpu_kernels(dtype: torch.dtype, lengths: list[int], padding: int) -> None:
    weights = plain(dtype=dtype)
    rows, ends = rows_of(lengths, padding, dtype)
    ours = DeviceExperts(weights, device=CPU, dtype=dtype)(rows, ends)
    assert ours.shape == rows.shape
    assert ours.dtype is dtype
    torch.testing.assert_close(
        ours[: sum(lengths)], expected(weights, rows, lengths), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("change", [as_fp8, as_int8, lambda weight: weight.half()], ids=["fp8", "int8", "float16"])
def test_weights_of_few_bits_equal_the_cpu_kernels(change) -> None:
    weights = each(plain(), change)
    rows, ends = rows_of([2, 0, 3, 1, 4], 0, torch.float32)
    ours = DeviceExperts(weights, device=CPU, dtype=torch.float32)(rows, ends)
    table = each(weights, lambda weight: weight if isinstance(weight, torch.Tensor) else weight.float())
    torch.testing.assert_close(ours, expected(table, rows, [2, 0, 3, 1, 4]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("intermediate", "rows_per_scale"), [(256, 128), (96, 32), (65, 1)])
def test_fp8_takes_a_byte_for_each_weight_and_scales_for_as_many_rows_as_divide_the_heights(
    intermediate: int, rows_per_scale: int
) -> None:
    matrices = [[as_fp8(torch.randn(intermediate, 130)) for _ in range(2)] for _ in range(3)]
    num_scales = 3 * (2 * intermediate // rows_per_scale) * 2  # two blocks wide
    assert stack(matrices, CPU, torch.float32).nbytes == 3 * 2 * intermediate * 130 + 4 * num_scales


@pytest.mark.parametrize("out", [1, 127, 128, 200])
@pytest.mark.parametrize("width", [1, 128, 130])
def test_fp8_matrices_of_any_height_lie_below_one_another(out: int, width: int) -> None:
    matrices = [[as_fp8(torch.randn(out, width)) for _ in range(2)] for _ in range(3)]
    held = stack(matrices, CPU, torch.float32)
    for expert, parts in enumerate(matrices):
        wanted = torch.cat([part.float() for part in parts])
        assert torch.equal(held.one(expert), wanted)
        assert torch.equal(held.whole()[expert], wanted)


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, padding=st.integers(0, 3))
def test_the_grouped_product_equals_the_loop(dtype: torch.dtype, lengths: list[int], padding: int) -> None:
    weights = stack([(down,) for _, _, down in plain()], CPU, dtype)
    rows = rows_of(lengths, padding, dtype)[0][:, :INTERMEDIATE].contiguous()
    ends = torch.tensor(lengths).cumsum(0, dtype=torch.int32)
    filled = sum(lengths)
    torch.testing.assert_close(
        grouped_product(rows, weights, ends)[:filled],
        looped_product(rows, weights, ends)[:filled],
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("intermediate", [64, 128, 192])
@pytest.mark.parametrize("change", [lambda weight: weight, as_fp8], ids=["plain", "fp8"])
def test_experts_made_of_the_weights_of_others_are_the_same(change, intermediate: int) -> None:
    weights = each(expert_weights(NUM_EXPERTS, HIDDEN, intermediate, torch.float32), change)
    ours = DeviceExperts(weights, device=CPU, dtype=torch.float32)
    order = [3, 0, 4]
    moved = DeviceExperts([ours.weights(expert) for expert in order], device=CPU, dtype=torch.float32)
    wanted = DeviceExperts([weights[expert] for expert in order], device=CPU, dtype=torch.float32)
    rows, ends = torch.randn(6, HIDDEN), torch.tensor([2, 4, 6], dtype=torch.int32)
    assert torch.equal(moved(rows, ends), wanted(rows, ends))
    assert moved.nbytes == wanted.nbytes


def test_experts_of_different_shapes_are_refused() -> None:
    weights = plain()
    weights[1] = (weights[1][0][:8], weights[1][1][:8], weights[1][2][:, :8])  # type: ignore[index]
    with pytest.raises(ValueError, match="cannot be stacked"):
        DeviceExperts(weights, device=CPU, dtype=torch.float32)


def test_no_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be stacked"):
        DeviceExperts([], device=CPU, dtype=torch.float32)
