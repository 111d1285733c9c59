"""`barista precision`: its arithmetic against closed forms, its decisions, and a tiny model measured in whole."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from barista.errors import CheckpointError, ConfigError
from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.formats import Holding
from router import cli
from router.inspect import inspect_checkpoint
from router.model.families import model_spec
from router.precision import Options, compare_formats
from router.precision.compare import distances, mean_over_windows, perplexity, perplexity_change, share_of_other_choices
from router.precision.figures import Estimate, Loss, Measured, Report, Speed, speed
from router.precision.picture import COLOURS, decades, draw, round_step, spaced
from router.precision.plan import Plan, plan_formats
from router.precision.report import as_json, claim, print_report
from router.precision.text import Text, read_text, reference_manual, spread, text_windows
from router.tokenizer import Tokenizer
from tests import packable
from tests.unit.tiny_model import write_tiny_model

VOCAB = 50
# Of the tiny model with a tokenizer (tests/unit/tiny_model.py): shapes that divide by 64.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 32}
TEXT = Text("a tale", "Once upon a time there was a barista who never spilt a cup. " * 20)


def silent(fraction: float, message: str) -> None:
    assert 0 <= fraction <= 1
    assert message


# ---------------------------------------------------------------- distances


def test_a_model_without_a_preference_has_the_vocabulary_as_its_perplexity() -> None:
    logits, targets = torch.full((7, VOCAB), 3.5), torch.arange(7)
    assert perplexity(distances(logits, logits, targets).loss) == pytest.approx(VOCAB, rel=1e-9)


def test_the_divergence_is_that_of_the_two_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    found = distances(p.log(), q.log(), torch.tensor([2]))
    assert float(found.kl) == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5), abs=1e-7)
    assert float(found.reference_loss) == pytest.approx(math.log(4))
    assert float(found.loss) == pytest.approx(math.log(2))
    assert float(found.same_top1) == 0


def test_the_divergence_agrees_with_torchs_in_float64_and_is_never_negative() -> None:
    torch.manual_seed(0)
    x = 4 * torch.randn(100, VOCAB)
    for scale in (1e-4, 1e-2, 1.0):
        y = x + scale * torch.randn(100, VOCAB)
        p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
        wanted = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        found = distances(x, y, torch.zeros(100, dtype=torch.int64)).kl
        assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-4)
        assert found.min() > -1e-6


def test_equal_logits_are_at_distance_zero_and_a_shift_of_all_logits_changes_nothing() -> None:
    x, targets = 5 * torch.randn(40, VOCAB), torch.zeros(40, dtype=torch.int64)
    same = distances(x, x.clone(), targets)
    assert not same.kl.any()
    assert torch.equal(same.loss, same.reference_loss)
    assert same.same_top1.all()
    shifted = distances(x, x + 8, targets)
    assert shifted.kl.abs().max() < 1e-5
    assert torch.allclose(shifted.loss, same.loss, atol=1e-5, rtol=0)


def test_a_probability_of_almost_zero_gives_a_finite_divergence() -> None:
    x, y = torch.tensor([[0.0, -300.0]]), torch.tensor([[0.0, -200.0]])
    assert float(distances(x, y, torch.tensor([0])).kl) == 0


# ---------------------------------------------------------------- estimates


def test_the_error_is_that_of_the_windows_means() -> None:
    windows = torch.tensor([[0.0, 2.0], [3.0, 3.0], [4.0, 6.0]])  # means 1, 3, 5: deviation 2
    assert mean_over_windows(windows) == Estimate(3.0, pytest.approx(2 / math.sqrt(3)))
    assert mean_over_windows(windows[:1]) == Estimate(1.0, None)


def test_the_perplexitys_change_is_the_ratio_of_the_two_perplexities() -> None:
    losses, reference = torch.tensor([[2.0, 2.2], [2.1, 2.5]]), torch.tensor([[2.0, 2.0], [2.0, 2.0]])
    change = perplexity_change(losses, reference)
    assert change.value == pytest.approx(perplexity(losses) / perplexity(reference) - 1)
    assert change.error == pytest.approx(math.exp(0.2) * torch.tensor([0.1, 0.3]).std().item() / math.sqrt(2))


def test_how_hard_the_text_is_does_not_enter_the_error_of_the_change() -> None:
    reference = torch.tensor([[1.0, 9.0], [20.0, 30.0]])
    assert perplexity_change(reference + 0.5, reference).error == pytest.approx(0, abs=1e-6)


def test_a_choice_is_another_one_if_its_set_of_experts_is() -> None:
    reference = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    choices = torch.tensor([[[1, 0], [3, 2]], [[4, 6], [7, 6]]])  # one of four sets differs, three orders do
    assert share_of_other_choices(reference, choices) == 0.25
    assert share_of_other_choices(torch.empty(0, 4, 0), torch.empty(0, 4, 0)) is None


def test_the_speed_is_of_the_median_step_and_its_spread_of_the_tenths() -> None:
    steps = [0.01 * (index + 1) for index in range(11)]
    assert speed(steps) == Speed(pytest.approx(1 / 0.06), pytest.approx(1 / 0.10), pytest.approx(1 / 0.02))


# ---------------------------------------------------------------- text


def test_the_default_text_is_half_a_megabyte_that_is_the_same_every_time() -> None:
    text = reference_manual()
    assert 300_000 < len(text.content) < 1_000_000
    assert text.sha256 == reference_manual().sha256


@pytest.mark.parametrize(("count", "prefix"), [(1, []), (3, []), (4, [9, 9])])
def test_windows_reach_from_the_first_token_to_the_last(count: int, prefix: list[int]) -> None:
    ids = list(range(100, 200))
    windows = spread(ids, prefix, 10 * count + 3, 10)
    assert [len(window) for window in windows] == [10] * count
    assert all(window[: len(prefix)] == prefix for window in windows)
    assert windows[0][len(prefix)] == 100
    assert count == 1 or windows[-1][-1] == 199


def test_text_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.txt cannot be read"):
        read_text(tmp_path / "nowhere.txt")
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_text(tmp_path / "latin1")
    tokenizer = Tokenizer.from_checkpoint(write_tiny_model(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"a tale has 5 tokens, of which 2,000"):
        text_windows(Text("a tale", "short"), tokenizer, 2000, 512, 260)
    with pytest.raises(CheckpointError, match="vocabulary ends at 99"):
        text_windows(TEXT, tokenizer, 20, 512, 100)


# ---------------------------------------------------------------- which formats


def planned(path: Path, *names: str, reference: str | None = None) -> Plan:
    checkpoint = open_checkpoint(path)
    return plan_formats(checkpoint, model_spec(checkpoint.config), names or None, reference)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("wide"), **WIDE)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("narrow"))


def test_by_default_every_format_that_the_shapes_take_is_compared_with_the_stored_one(wide: Path, narrow: Path) -> None:
    plan = planned(wide)
    assert plan.reference == Holding("float32")
    assert [held.name for held in plan.formats] == ["bf16", "fp8", "int8", "int4", "mxfp4"]
    assert not plan.skipped
    plan = planned(narrow)
    assert [held.name for held in plan.formats] == ["bf16", "fp8"]
    assert plan.skipped.keys() == {"int8", "int4", "mxfp4"}
    assert "do not divide into groups of 64" in plan.skipped["int4"]


def test_a_format_that_is_named_must_be_one_that_the_model_takes(wide: Path, narrow: Path) -> None:
    assert [held.name for held in planned(wide, "int4", "float32", "int4").formats] == ["int4", "float32"]
    assert planned(wide, "int4", reference="bf16").reference == Holding("bfloat16")
    with pytest.raises(ConfigError, match="--formats: 'int3' is no format"):
        planned(wide, "int8", "int3")
    with pytest.raises(ConfigError, match="--reference: 'q4' is no format"):
        planned(wide, reference="q4")
    with pytest.raises(CheckpointError, match="groups of 64"):
        planned(narrow, "int8")


# ---------------------------------------------------------------- a model, measured


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; afterwards the process computes on as many threads as before."""
    threads = torch.get_num_threads()
    yield packable.own_cache(tmp_path / "cache", monkeypatch)
    torch.set_num_threads(threads)
    kernels.set_num_threads(0)


def measured(path: Path, *formats: str, num_tokens: int = 300) -> Report:
    options = Options(text=TEXT, num_tokens=num_tokens, threads=1, formats=formats)
    return compare_formats("tiny", path, options, silent)


def test_the_unquantised_model_is_at_distance_zero_from_itself_and_fewer_bits_are_further(
    wide: Path, own_cache: Path
) -> None:
    report = measured(wide, "float32", "int8", "int4")
    same, int8, int4 = (entry.loss for entry in report.formats)
    zero, all_of_them = Estimate(0.0, None), Estimate(1.0, None)
    for loss in (same, report.reference.loss):
        assert (loss.perplexity_change, loss.kl, loss.same_top1, loss.other_experts) == (zero, zero, all_of_them, 0.0)
        assert loss.perplexity == report.reference.loss.perplexity
    assert 0 < int8.kl.value < int4.kl.value
    assert int8.other_experts is not None
    assert int4.other_experts is not None
    assert 0 < int8.other_experts < int4.other_experts < 1
    assert int4.perplexity == pytest.approx((1 + int4.perplexity_change.value) * report.reference.loss.perplexity)
    for entry, name in zip(report.formats, ("float32", "int8", "int4"), strict=True):
        figures = inspect_checkpoint(open_checkpoint(wide), 1 << 40, name)
        assert (entry.held_bytes, entry.active_bytes) == (figures.held_bytes, figures.active_bytes_per_token)
        assert 0 < entry.speed.slow <= entry.speed.median <= entry.speed.fast
    assert not [file for file in own_cache.iterdir() if file.is_file()]


def test_a_dense_model_has_no_choices_of_experts(tmp_path: Path, own_cache: Path) -> None:
    dense = write_tiny_model(tmp_path / "dense", **WIDE, architectures=["LlamaForCausalLM"])
    (loss,) = (entry.loss for entry in measured(dense, "int8").formats)
    assert loss.other_experts is None
    assert loss.kl.value > 0


def test_the_command_prints_json_alone_and_draws_a_picture(wide: Path, own_cache: Path, tmp_path: Path) -> None:
    text, picture = tmp_path / "tale.txt", tmp_path / "cost.svg"
    text.write_text(TEXT.content)
    arguments = ["precision", str(wide), "--formats", "int8,int4", "--text", str(text), "--tokens", "64", "--json"]
    done = CliRunner().invoke(cli.app, [*arguments, "--picture", str(picture)])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert [entry["format"] for entry in values["formats"]] == ["int8", "int4"]
    assert values["text_sha256"] == TEXT.sha256
    assert values["num_predicted"] == 63
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_a_picture_that_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["precision", "m", "--picture", str(tmp_path / "no" / "a.svg")])
    assert isinstance(done.exception, ConfigError)
    assert str(tmp_path / "no") in done.exception.message


# ---------------------------------------------------------------- what is shown


def entry(name: str, megabytes: float, kl: float, top1: float) -> Measured:
    loss = Loss(16 * (1 + kl), Estimate(kl, kl / 9), Estimate(kl, kl / 9), Estimate(top1, 0.003), 0.1)
    return Measured(name, "float32", "id", int(megabytes * 1e6), int(megabytes * 9e5), loss, Speed(40.0, 35.0, 44.0))


REPORT = Report(
    model="a <b> & c",
    family="Llama",
    text="a tale",
    text_sha256="0",
    num_tokens=4096,
    num_windows=8,
    threads=2,
    reference=entry("float32", 400, 0.0, 1.0),
    formats=(entry("int8", 100, 0.01, 0.96), entry("int4", 60, 0.5, 0.7), entry("mxfp4", 60, 0.6, 0.7)),
    skipped={"fp8": "it is too wide."},
)


def shown(report: Report) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=60))
    return stream.getvalue()


def test_each_format_is_one_line_however_narrow_the_terminal() -> None:
    lines = shown(REPORT).splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["format", "float32", "int8", "int4", "mxfp4"]
    assert "400.0 MB" in lines[1]
    assert "75.0%" in lines[2]
    assert "0.0100 ±0.0011" in lines[2]
    assert "96.00% ±0.30" in lines[2]
    assert any("4,088 tokens of a tale" in line for line in lines)
    assert lines[-1] == "fp8 is left out: it is too wide."


def test_the_missions_claim_is_judged_by_both_of_its_numbers() -> None:
    int8, int4, _ = REPORT.formats
    assert claim(REPORT, int8).endswith("(75% less, 95% kept: reached).")
    assert claim(REPORT, int4).endswith("not reached).")
    assert claim(REPORT, replace(int8, held_bytes=int(1.1e8))).endswith("not reached).")


def test_json_has_every_figure_and_the_memory_that_is_saved() -> None:
    values = json.loads(json.dumps(as_json(REPORT)))
    assert values["formats"][0]["memory_saved"] == 0.75
    assert values["formats"][0]["loss"]["kl"] == {"value": 0.01, "error": pytest.approx(0.01 / 9)}
    assert values["reference"]["speed"] == {"median": 40.0, "slow": 35.0, "fast": 44.0}


def dots(report: Report) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(draw(report))
    return [(float(e.get("cx", 0)), float(e.get("cy", 0))) for e in root.iter() if e.tag.endswith("circle")]


def test_in_the_picture_fewer_bytes_are_to_the_left_and_less_harm_is_lower() -> None:
    int8, int4, mxfp4 = dots(REPORT)
    assert int4[0] == mxfp4[0] < int8[0]
    assert mxfp4[1] < int4[1] < int8[1]


def test_the_picture_takes_any_name_and_any_number_of_formats() -> None:
    words = "".join(ElementTree.fromstring(draw(REPORT)).itertext())
    assert "a <b> & c: what fewer bits cost" in words
    many = replace(REPORT, formats=REPORT.formats * (len(COLOURS) // 3 + 1))
    assert len(dots(many)) == len(many.formats)
    exact = replace(REPORT, formats=(entry("float32", 400, 0.0, 1.0),))
    assert len(dots(exact)) == 1
    assert dots(replace(REPORT, formats=())) == []


def test_labels_keep_their_distance_and_their_order() -> None:
    heights = [50.0, 48.0, 200.0, 10.0]
    moved = spaced(heights, 40, 30)
    assert moved == [110.0, 70.0, 200.0, 30.0]


@pytest.mark.parametrize(
    ("values", "wanted"), [([0.01], (-2, -1)), ([0.02, 0.5], (-2, 0)), ([1.0], (0, 1)), ([], (-1, 0))]
)
def test_the_axis_ends_at_powers_of_ten(values: list[float], wanted: tuple[int, int]) -> None:
    assert decades(values) == wanted


@pytest.mark.parametrize(("largest", "step"), [(380e6, 100e6), (700.0, 200.0), (1500.0, 500.0), (3.0, 1.0)])
def test_the_steps_of_an_axis_are_round(largest: float, step: float) -> None:
    assert round_step(largest) == pytest.approx(step)
    assert 3 <= largest / step < 7.5
