"""What a worker holds: digests, capacity, terms, and layers that change while others compute."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest
import torch

from barista.errors import CheckpointError
from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.expert_model import ExpertModel, expert_bytes
from experts.expert_weights import ExpertReader
from experts.link import RowsStatus
from experts.worker import digests
from experts.worker.digests import DigestManifest
from experts.worker.store import ExpertStore, Fenced, NoRoom
from tests.distributed.workers import tiny_expert_model

ALL = {0: range(4), 1: range(4)}
ONE_EXPERT = 3 * 32 * 16 * 4  # bytes


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    kernels.load()
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BARISTA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ExpertModel:
    return tiny_expert_model(tmp_path_factory.mktemp("tiny"))


def store(model: ExpertModel, capacity: int = 1 << 30) -> ExpertStore:
    return ExpertStore(model, capacity)


def load(store: ExpertStore, experts, **told: int) -> None:
    for _ in store.assign(experts, **told):
        pass


def rows(store: ExpertStore, layer: int, ids: list[list[int]]):
    """What the store computes for fixed rows, and those rows."""
    topk_ids = torch.tensor(ids, dtype=torch.int32)
    x = torch.randn(len(ids), 32, generator=torch.Generator().manual_seed(1))
    out = torch.empty(int((topk_ids != -1).sum()), 32)
    return store.compute(layer, x, topk_ids, out), out, x


def test_the_digest_of_an_expert_is_blake2b_of_its_gate_up_and_down_bytes(model):
    held = store(model)
    load(held, {1: [2]})
    reader = ExpertReader(open_checkpoint(model.path), torch.float32)
    values = b"".join(tensor.numpy().tobytes() for tensor in reader.read(model.layers[1], 1, 2))
    (only,) = held.held()
    assert (only.layer, only.expert, only.digest) == (1, 2, hashlib.blake2b(values, digest_size=16).digest())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_takes_what_expert_bytes_says(tmp_path, dtype):
    model = tiny_expert_model(tmp_path / "m", dtype)
    held = store(model)
    load(held, ALL)
    sizes = expert_bytes(open_checkpoint(model.path), model)
    values = 8 * 3 * 32 * 16
    assert held.held_bytes == sum(4 * size for size in sizes.values()) == values * getattr(torch, dtype).itemsize


def test_weights_that_are_stored_as_they_are_held_are_not_copied(model):
    reader = ExpertReader(open_checkpoint(model.path), torch.float32)
    first, again = (reader.read(model.layers[0], 0, 1)[0] for _ in range(2))
    assert first.data_ptr() == again.data_ptr()


def test_rows_are_those_of_a_table_with_all_experts(model):
    held = store(model)
    load(held, ALL)
    reader = ExpertReader(open_checkpoint(model.path), torch.float32)
    table = kernels.ExpertTable({e: reader.read(model.layers[1], 1, e) for e in range(4)}, 4)
    ids = [[0, 3], [-1, 1], [2, -1]]
    computed, out, x = rows(held, 1, ids)
    assert computed.status is RowsStatus.OK
    assert torch.equal(out, kernels.expert_rows(x, torch.tensor(ids, dtype=torch.int32), table))


def test_what_is_not_held_is_named_once_and_nothing_is_computed(model):
    held = store(model)
    load(held, {0: [1]}, term=3, epoch=9)
    computed, _, _ = rows(held, 0, [[3, 1], [2, 3], [-1, 1]])
    assert (computed.status, computed.not_held, computed.epoch) == (RowsStatus.NOT_HELD, (2, 3), 9)
    computed, _, _ = rows(held, 1, [[1, -1]])
    assert computed.not_held == (1,)


@pytest.mark.parametrize(("layer", "ids"), [(0, [[4, 0]]), (0, [[-2, 0]]), (7, [[0, 1]])])
def test_ids_that_the_model_has_not_are_refused(model, layer, ids):
    held = store(model)
    load(held, ALL)
    with pytest.raises(ValueError, match="layer"):
        rows(held, layer, ids)


def test_assigning_what_is_held_is_free(model):
    held = store(model, 4 * ONE_EXPERT)
    load(held, {0: range(4)})
    (report,) = held.assign({0: range(4)})
    assert (report.bytes_done, report.bytes_total) == (0, 0)
    assert [item.expert for item in report.loaded] == [0, 1, 2, 3]


def test_progress_counts_the_bytes_of_each_layer_to_the_end(model):
    held = store(model)
    load(held, {0: [0]})
    reports = list(held.assign(ALL))
    assert [report.bytes_done for report in reports] == [0, 3 * ONE_EXPERT, 7 * ONE_EXPERT]
    assert {report.bytes_total for report in reports} == {7 * ONE_EXPERT}
    assert sorted((item.layer, item.expert) for report in reports for item in report.loaded) == [
        (layer, expert) for layer in ALL for expert in ALL[layer]
    ]


def test_what_does_not_fit_is_refused_with_the_missing_bytes_and_nothing_is_loaded(model):
    held = store(model, 3 * ONE_EXPERT + 1)
    load(held, {0: [0]})
    with pytest.raises(NoRoom, match=f"{ONE_EXPERT - 1:,} bytes are missing"):
        load(held, {1: [0, 1, 2]})
    assert len(held.held()) == 1
    held.release({0: [0]})
    load(held, {1: [0, 1, 2]})


def test_an_older_term_is_fenced_and_term_0_never_is(model):
    held = store(model)
    load(held, {0: [0]}, term=5, epoch=7)
    for command in (held.release, lambda *order, **told: load(held, *order, **told)):
        with pytest.raises(Fenced, match="term 4 was replaced by term 5"):
            command({0: [0]}, term=4, epoch=99)
    load(held, {0: [1]}, term=0, epoch=99)
    assert (held.term, held.epoch, len(held.held())) == (5, 7, 2)


def test_an_assignment_under_way_ends_when_a_newer_term_speaks(model):
    held = store(model)
    reports = held.assign(ALL, term=1)
    next(reports)
    next(reports)
    held.release({}, term=2)
    with pytest.raises(Fenced):
        next(reports)


def test_another_assignment_comes_in_between_two_layers(model):
    held = store(model)
    slow = held.assign(ALL)
    next(slow)
    load(held, {1: [3]})
    assert [(item.layer, item.expert) for item in held.held()] == [(1, 3)]
    for _ in slow:
        pass
    assert held.held_bytes == 8 * ONE_EXPERT


def test_released_experts_are_gone_and_unknown_ones_ignored(model):
    held = store(model)
    load(held, {0: [0, 1]})
    held.release({0: [1, 2], 1: [0]})
    assert [(item.layer, item.expert) for item in held.held()] == [(0, 0)]
    held.release({0: [0]})
    assert held.held() == ()
    assert held.held_bytes == 0


def test_computing_goes_on_with_right_bytes_while_a_layer_changes(model):
    held = store(model)
    load(held, {0: [0, 1]})
    _, wanted, _ = rows(held, 0, [[0, 1]] * 3)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            load(held, {0: [2, 3]})
            held.release({0: [2, 3]})

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(200):
            computed, out, _ = rows(held, 0, [[0, 1]] * 3)
            assert computed.status is RowsStatus.OK
            assert torch.equal(out, wanted)
    finally:
        stop.set()
        changer.join()


def test_a_checkpoint_without_an_expert_is_refused_by_its_name(model):
    layers = dict(model.layers)
    layers[2] = layers[1]
    short = ExpertModel(path=model.path, dtype="float32", top_k=2, layers=layers, digest=model.digest)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp"):
        store(short)


def test_a_second_start_reads_no_weights_for_their_digests(model, monkeypatch):
    first = store(model)
    load(first, ALL)
    monkeypatch.setattr("experts.worker.store.digest_of", None)
    second = store(model)
    load(second, ALL)
    assert second.held() == first.held()


def test_digests_of_a_changed_file_are_not_believed(model, cache):
    load(store(model), {0: [0]})
    (file,) = (cache / "digests").glob("*.json")
    value = json.loads(file.read_text())
    value["files"][0][2] += 1
    value["digests"]["0/0"] = "00" * 16
    file.write_text(json.dumps(value))
    held = store(model)
    load(held, {0: [0]})
    assert held.held()[0].digest != bytes(16)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": []}', '{"files": null, "digests": 3}'])
def test_a_damaged_manifest_is_as_good_as_none(model, cache, text):
    load(store(model), {0: [0]})
    (file,) = (cache / "digests").glob("*.json")
    file.write_text(text)
    held = store(model)
    load(held, {0: [0]})
    assert json.loads(file.read_text())["digests"] == {"0/0": held.held()[0].digest.hex()}


def test_two_writers_of_a_manifest_keep_what_both_know(model):
    checkpoint = open_checkpoint(model.path)
    one, other = (DigestManifest(checkpoint, model.digest) for _ in range(2))
    one.put(0, 0, b"a" * 16)
    one.save()
    other.put(1, 3, b"b" * 16)
    other.save()
    both = DigestManifest(checkpoint, model.digest)
    assert (both.get(0, 0), both.get(1, 3)) == (b"a" * 16, b"b" * 16)


def test_a_cache_that_cannot_be_written_is_no_error(model, monkeypatch):
    def refuse(file: Path, text: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(digests, "_write", refuse)
    held = store(model)
    load(held, ALL)
    assert len(held.held()) == 8
