"""Which products a device offers, and which of them a layer is given."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.device import measure, products
from experts.device.measure import ROW_COUNTS, LayerTimer, even_ends, products_for
from experts.device.products import GROUPED, LOOP, Product, contenders, has_grouped_product, has_triton_product
from experts.device.stacks import Stack, stack
from experts.kernels.weight import Fp8Weight, encode_fp8
from tests.device_models import CPU

GPU = torch.device("cuda", 0)
TRITON = Product("triton", LOOP.gated, LOOP.plain, capturable=True)
HIDDEN, INTERMEDIATE = 64, 32


def stacks(*, fp8: bool) -> tuple[Stack, Stack]:
    def draw(out: int, width: int) -> torch.Tensor | Fp8Weight:
        plain = torch.randn(out, width)
        return Fp8Weight(*encode_fp8(plain)) if fp8 else plain.bfloat16()

    gate_up, down = [[draw(2 * INTERMEDIATE, HIDDEN)]] * 3, [[draw(HIDDEN, INTERMEDIATE)]] * 3
    return stack(gate_up, CPU, torch.bfloat16), stack(down, CPU, torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is there but for its memory, with Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(products, "triton_kernel", lambda: TRITON)


@pytest.mark.parametrize(
    ("device", "generation", "dtype", "widths", "grouped"),
    [
        ("cuda", (9, 0), torch.bfloat16, (64, 40), True),
        ("cuda", (10, 0), torch.bfloat16, (64, 40), True),
        ("cuda", (8, 9), torch.bfloat16, (64, 40), False),
        ("cuda", (9, 0), torch.float32, (64, 40), False),
        ("cuda", (9, 0), torch.bfloat16, (64, 12), False),
        ("cpu", (9, 0), torch.bfloat16, (64, 40), False),
    ],
)
def test_experts_are_grouped_where_torch_has_a_kernel_for_it(
    device: str, generation: tuple[int, int], dtype: torch.dtype, widths: tuple[int, int], grouped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    assert has_grouped_product(torch.device(device), dtype, widths) is grouped


@pytest.mark.parametrize(
    ("device", "generation", "dtype", "fp8", "offered"),
    [
        ("cuda", (8, 0), torch.bfloat16, False, True),
        ("cuda", (8, 0), torch.bfloat16, True, False),
        ("cuda", (8, 9), torch.bfloat16, True, True),
        ("cuda", (9, 0), torch.float16, True, True),
        ("cuda", (9, 0), torch.float32, False, False),
        ("cuda", (7, 5), torch.float16, False, False),
        ("cpu", (9, 0), torch.bfloat16, False, False),
    ],
)
def test_triton_is_offered_where_its_kernel_compiles(
    device: str, generation: tuple[int, int], dtype: torch.dtype, fp8: bool, offered: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    assert has_triton_product(torch.device(device), dtype, fp8=fp8) is offered


@pytest.mark.usefixtures("hopper")
def test_plain_weights_have_two_contenders() -> None:
    assert contenders(GPU, torch.bfloat16, stacks(fp8=False)) == (GROUPED, TRITON)


@pytest.mark.usefixtures("hopper")
def test_no_contender_makes_a_copy_of_fp8_weights() -> None:
    assert contenders(GPU, torch.bfloat16, stacks(fp8=True)) == (TRITON,)


def test_without_triton_there_is_a_warning_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "experts.device.grouped_triton", None)
    products.triton_kernel.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert products.triton_kernel() is None
        assert products.triton_kernel() is None
    products.triton_kernel.cache_clear()
    assert len(caplog.records) == 1


def test_a_cpu_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "graph_seconds", lambda work: pytest.fail("something was measured"))
    assert products_for(*stacks(fp8=False), CPU, torch.bfloat16)(1) is LOOP


def failing_from(num_rows: int) -> Product:
    def gated(rows: torch.Tensor, weights: Stack, ends: torch.Tensor) -> torch.Tensor:
        if len(rows) >= num_rows:
            raise torch.OutOfMemoryError
        return LOOP.gated(rows, weights, ends)

    return Product("failing", gated, LOOP.plain, capturable=True)


def one_second(work: Callable[[], object]) -> float:
    work()
    return 1.0


def test_a_product_that_fails_is_timed_up_to_there_and_named(caplog: pytest.LogCaptureFixture) -> None:
    timer = LayerTimer(*stacks(fp8=False), CPU, torch.bfloat16, one_second)
    timings = timer.timings([failing_from(1000), LOOP])
    assert timings == {"failing": {8: 1.0, 128: 1.0}, "loop": dict.fromkeys(ROW_COUNTS, 1.0)}
    assert [record.getMessage() for record in caplog.records if "'failing' for 1024 rows" in record.getMessage()]


def test_a_product_that_does_not_compile_is_not_timed() -> None:
    def compile_products(rows: torch.Tensor, gate_up: Stack, down: Stack, ends: torch.Tensor) -> None:
        raise RuntimeError("no C compiler")

    broken = replace(LOOP, name="broken", compile=compile_products)
    timings = LayerTimer(*stacks(fp8=False), CPU, torch.bfloat16, one_second).timings([broken, LOOP])
    assert timings == {"broken": {}, "loop": dict.fromkeys(ROW_COUNTS, 1.0)}


@given(num_rows=st.integers(0, 10_000), num_experts=st.integers(1, 300))
def test_rows_are_spread_evenly(num_rows: int, num_experts: int) -> None:
    ends = even_ends(num_rows, num_experts)
    assert ends[-1] == num_rows
    lengths = ends.diff(prepend=ends.new_zeros(1))
    assert int(lengths.max() - lengths.min()) <= 1
