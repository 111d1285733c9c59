"""What tests/unit/test_device_*.py say of the CPU as a device, on a GPU; and CUDA graphs, which it has alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("msgspec")
pytest.importorskip("grpc")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.device import measure
from experts.device.experts import DeviceExperts
from experts.device.measure import ROW_COUNTS, LayerTimer
from experts.device.products import grouped_product, has_grouped_product, looped_product
from experts.device.stacks import stack
from experts.kernels.expert_table import ExpertWeights
from experts.kernels.weight import Fp8Weight, encode_fp8
from experts.pool import DispatchBatch
from experts.transport.device import DeviceTransport
from experts.transport.local import LocalTransport
from router.model.device.graphs import CudaCapture
from router.model.load import load_model
from router.models import prepare_built_in
from router.tokenizer import Tokenizer
from tests import tiny
from tests.device_models import device_model, expert_weights, run_again
from tests.engines import answer, engine_on, request
from tests.forced import FORCED, PROMPTS, logits_of
from tests.unit.tiny_model import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is in reach"),
]

GPU = torch.device("cuda", 0)
NUM_EXPERTS, HIDDEN, INTERMEDIATE = 8, 256, 128


def weights(dtype: torch.dtype) -> list[ExpertWeights]:
    return expert_weights(NUM_EXPERTS, HIDDEN, INTERMEDIATE, dtype)


@pytest.fixture
def hopper() -> None:
    """Experts are computed in one kernel, so that a step may be a CUDA graph."""
    if not has_grouped_product(GPU, torch.bfloat16, (HIDDEN, INTERMEDIATE)):
        pytest.skip("a GPU before Hopper loops over the experts")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("lengths", "padding"),
    [([4, 0, 3, 1, 0, 0, 7, 2], 0), ([4, 0, 3, 1, 0, 0, 7, 2], 5), ([0] * 7 + [90], 0), ([16] * 8, 0), ([0] * 8, 5)],
)
def test_the_grouped_product_equals_the_loop(lengths: list[int], padding: int) -> None:
    held = stack([(gate, up) for gate, up, _ in weights(torch.bfloat16)], GPU, torch.bfloat16)
    rows = torch.randn(sum(lengths) + padding, HIDDEN).to(GPU, torch.bfloat16)
    ends = torch.tensor(lengths).cumsum(0, dtype=torch.int32).to(GPU)
    ours, wanted = (product(rows, held, ends)[: sum(lengths)] for product in (grouped_product, looped_product))
    torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("hopper")
def test_products_are_timed_once_for_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BARISTA_CACHE", str(tmp_path))
    for _ in range(2):  # processes
        monkeypatch.setattr(measure, "_choices", {})
        assert DeviceExperts(weights(torch.bfloat16), device=GPU, dtype=torch.bfloat16).capturable
        monkeypatch.setattr(LayerTimer, "timings", lambda *_: pytest.fail("it was timed again"))
    (file,) = tmp_path.glob("products/*/choice.json")
    assert set(json.loads(file.read_text())["seconds"]["grouped"]) == set(map(str, ROW_COUNTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_layer_equals_the_local_transport(dtype: torch.dtype, fp8: bool) -> None:
    plain = weights(dtype)
    held = [tuple(Fp8Weight(*encode_fp8(weight)) for weight in expert) for expert in plain] if fp8 else plain
    table = [tuple(weight.float().to(dtype) for weight in expert) for expert in held]
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(33, HIDDEN, generator=generator).to(dtype)
    topk_ids = torch.rand(33, NUM_EXPERTS, generator=generator).topk(3).indices.int()
    topk_ids[5] = -1
    batch = DispatchBatch(0, 0, hidden_states, topk_ids, torch.rand(33, 3, generator=generator))
    on_gpu = DispatchBatch(0, 0, *(t.to(GPU) for t in (batch.hidden_states, batch.topk_ids, batch.topk_weights)))
    device = DeviceTransport({0: DeviceExperts(held, device=GPU, dtype=dtype)})
    local = LocalTransport({0: kernels.ExpertTable(dict(enumerate(table)), NUM_EXPERTS, dtype=dtype)})
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4
    ours, failed = device.combine(device.dispatch(on_gpu))
    torch.testing.assert_close(ours.cpu(), local.combine(local.dispatch(batch))[0], rtol=tolerance, atol=tolerance)
    assert not failed.any()


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("max_tokens_per_step", [9, 512])
def test_logits_in_float32_equal_the_cpu_kernels(family: str, max_tokens_per_step: int, tmp_path: Path) -> None:
    tiny.make(family, tmp_path)
    models = device_model(tmp_path, device=GPU), load_model(open_checkpoint(tmp_path), torch.float32)
    ours, wanted = (torch.cat(logits_of(model, PROMPTS, FORCED, max_tokens_per_step)) for model in models)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=2e-4)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe", "llama"])
def test_a_replayed_graph_gives_the_bytes_of_its_kernels(family: str, tmp_path: Path) -> None:
    """Of the same padded step, kernel by kernel. Some graphs are replayed often, with others in between."""
    tiny.make(family, tmp_path)
    models = device_model(tmp_path, torch.bfloat16, GPU), device_model(tmp_path, torch.bfloat16, GPU, capture=run_again)
    ours, wanted = (torch.cat(logits_of(model, PROMPTS, FORCED, 9)) for model in models)
    assert torch.equal(ours, wanted)


@pytest.mark.usefixtures("hopper")
def test_a_graph_counts_the_tokens_of_experts_at_each_replay(tmp_path: Path) -> None:
    tiny.make("qwen3_moe", tmp_path)
    counts = []
    for capture in (CudaCapture(GPU), run_again):
        model = device_model(tmp_path, torch.bfloat16, GPU, capture=capture)
        engine = engine_on(model)
        answer(engine, [request("a", [5, 6, 7], max_tokens=9, temperature=0)])
        counts.append(torch.tensor(engine.stats().expert_tokens).sum(dim=1).tolist())
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.usefixtures("hopper")
def test_a_decode_step_never_waits_for_the_gpu(tmp_path: Path) -> None:
    """Until its logits are copied."""
    tiny.make("deepseek_v3", tmp_path)
    model = device_model(tmp_path, torch.bfloat16, GPU, capture=strictly)
    recorder = answer(engine_on(model), [request("a", [5, 6, 7], max_tokens=9, temperature=0)])
    assert len(recorder.tokens["a"]) == 9


def strictly(run: Callable[[], None], before: Callable[[], None]) -> Callable[[], None]:
    """A Capture that runs again, and raises where that waits for the GPU."""

    def replay() -> None:
        try:
            torch.cuda.set_sync_debug_mode("error")
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return replay


def test_house_blends_greedy_text_is_that_of_the_cpu() -> None:
    path = prepare_built_in(lambda fraction, message: None)
    tokenizer = Tokenizer.from_checkpoint(path)
    texts = ("The capital of France is", "To make bread you need", "In Python, a generator is")
    submits = [
        request(text, tokenizer.encode(text, add_special_tokens=False), temperature=0, max_tokens=32) for text in texts
    ]
    wanted = answer(engine_on(load_model(open_checkpoint(path), torch.float32)), submits)
    assert answer(engine_on(device_model(path, device=GPU)), submits).tokens == wanted.tokens


def test_serve_answers_from_a_gpu_what_it_answers_from_the_cpu(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    assert served_text(model, "--device", "cuda") == served_text(model)


def served_text(model: Path, *flags: str) -> str:
    """What a server of the model answers to one prompt, greedily."""
    httpx = pytest.importorskip("httpx", reason="the server's packages are not installed")
    command = [sys.executable, "-m", "router.cli", "serve", str(model), "--port", "0", "--json", *flags]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            body = {"prompt": "a latte", "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=60)
            text: str = answer.json()["choices"][0]["text"]
            return text
        finally:
            server.terminate()
