"""`--format auto`: as stored if that fits, else the most bits that do; and how much memory each takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.config import ServeConfig
from barista.errors import CheckpointError, ConfigError
from experts.checkpoint import Checkpoint, open_checkpoint
from experts.formats import Holding, holding
from router.announce import Announcement
from router.assemble import format_choice
from router.format_choice import choose_format, first_that_fits, memory_needed
from router.memory import require_room_for_trunk
from router.messages import ModelInfo
from router.model.families import model_spec
from router.model.spec import ModelSpec
from tests import packable, tiny

NAMES = ("auto", "int8", "int4")
SIZES = st.tuples(*(st.integers(0, 100) for _ in NAMES)).map(lambda sizes: dict(zip(NAMES, sizes, strict=True)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ModelSpec]:
    checkpoint = open_checkpoint(packable.make("qwen3_moe", tmp_path_factory.mktemp("model")))
    return checkpoint, model_spec(checkpoint.config)


@given(sizes=SIZES, free=st.integers(0, 100))
def test_the_first_that_fits_is_taken_or_else_the_smallest(sizes: dict[str, int], free: int) -> None:
    chosen = first_that_fits(sizes, free)
    fitting = [name for name in NAMES if sizes[name] <= free]
    assert chosen == fitting[0] if fitting else sizes[chosen] == min(sizes.values())


def needed(model: tuple[Checkpoint, ModelSpec], weight_format: str) -> int:
    return memory_needed(*model, Holding("float32", weight_format))


def test_fewer_bits_are_chosen_only_when_more_do_not_fit_and_the_reason_says_so(
    model: tuple[Checkpoint, ModelSpec],
) -> None:
    full = needed(model, "plain")
    assert needed(model, "int4") < needed(model, "int8") < full
    for free, chosen in ((full, "auto"), (full - 1, "int8"), (needed(model, "int8") - 1, "int4"), (0, "int4")):
        choice = choose_format(*model, "auto", free)
        assert choice.format == chosen
        assert choice.held == holding(model[0], chosen)
        assert bool(choice.reason) == (chosen != "auto")
    assert str(choose_format(*model, "auto", full - 1)).startswith("int8 (chosen: float32 needs ")
    assert "again and again" in choose_format(*model, "auto", 0).reason


def test_what_is_asked_for_is_taken_whatever_fits(model: tuple[Checkpoint, ModelSpec]) -> None:
    for wanted in ("float32", "bf16", "fp8", "int8", "int4", "mxfp4"):
        choice = choose_format(*model, wanted, 0)
        assert (choice.format, str(choice)) == (wanted, wanted)


def test_where_the_weights_are_on_other_machines_this_ones_memory_does_not_count(
    model: tuple[Checkpoint, ModelSpec],
) -> None:
    assert choose_format(*model, "auto", None).format == "auto"


def test_a_format_that_the_shapes_cannot_take_is_never_chosen_and_refused_when_asked_for(tmp_path: Path) -> None:
    tiny.make("qwen3_moe", tmp_path)  # its heads have 24 values, 96 in all
    checkpoint = open_checkpoint(tmp_path)
    spec = model_spec(checkpoint.config)
    assert choose_format(checkpoint, spec, "auto", 0).format == "auto"
    with pytest.raises(CheckpointError, match=r"\[64, 96\] cannot be held as int4.*--format bf16"):
        choose_format(checkpoint, spec, "int4", 10**9)


def test_too_little_memory_for_the_trunk_is_an_error_with_the_remedy(model: tuple[Checkpoint, ModelSpec]) -> None:
    held = holding(model[0], "int8")
    with pytest.raises(
        ConfigError, match=r"all but its experts.* of memory in int8; 1\.0 kB are free\..*--format int4"
    ):
        require_room_for_trunk(model[0], held, 1000)
    require_room_for_trunk(model[0], held, 10**9)


def test_the_ready_lines_say_the_format_and_why(model: tuple[Checkpoint, ModelSpec]) -> None:
    choice = choose_format(*model, "auto", 0)
    announcement = Announcement(
        url="http://a", model_id="m", path=Path("p"), format=str(choice), threads=1, has_chat=True, needs_key=False
    )
    info = ModelInfo(10, 10, 10, 10, (), "float32", 1, 0, "id")
    assert f"\n  format    {choice}\n" in announcement.as_text(info)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_machines_memory_decides_nothing_of_a_gpu(
    model: tuple[Checkpoint, ModelSpec], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.assemble.available_memory", lambda: 0)
    choice = format_choice(ServeConfig(device=device), model[0].path)
    assert (choice.held == Holding("float32")) == (device == "cuda")


def test_a_gpu_is_announced() -> None:
    announcement = Announcement(
        url="http://127.0.0.1:1", model_id="m", path=Path("m"), has_chat=False, needs_key=False, device="cuda"
    )
    info = ModelInfo(260, 4096, 8192, 512, (2,), "float32", 2, 4, "x")
    assert "  device    cuda\n" in announcement.as_text(info)
