"""Rows are gathered in runs that cover them all, fit the memory, and see their own sequence up to themselves."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from router.model.device.contexts import context, runs_of

BLOCK, NOWHERE = 4, 999
SEQUENCES = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 20)), min_size=1, max_size=8)  # rows, positions before


@given(sequences=SEQUENCES, limit=st.integers(1, 60))
def test_runs_cover_every_row_and_every_sequence_once_and_in_order(
    sequences: list[tuple[int, int]], limit: int
) -> None:
    runs = runs_of([rows for rows, _ in sequences], [rows + before for rows, before in sequences], limit)
    seqs = [seq for run in runs for seq in range(run.first_seq, run.first_seq + run.num_seqs)]
    rows = [row for run in runs for row in range(run.first_row, run.first_row + run.num_seqs * run.num_rows)]
    assert seqs == list(range(len(sequences)))
    assert rows == list(range(sum(rows for rows, _ in sequences)))


@given(sequences=SEQUENCES, limit=st.integers(1, 60))
def test_runs_gather_no_more_than_the_limit_where_they_can(sequences: list[tuple[int, int]], limit: int) -> None:
    lengths = [rows + before for rows, before in sequences]
    for run in runs_of([rows for rows, _ in sequences], lengths, limit):
        assert run.length == max(lengths[run.first_seq : run.first_seq + run.num_seqs])
        assert run.num_seqs == 1 or (run.num_rows == 1 and run.num_seqs * run.length <= limit)


def test_sequences_of_one_row_share_a_run() -> None:
    assert len(runs_of([1] * 8, [20] * 8)) == 1


@given(sequences=SEQUENCES, limit=st.integers(1, 60), seed=st.integers(0, 99))
def test_a_row_sees_its_own_sequence_up_to_itself(sequences: list[tuple[int, int]], limit: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randperm(len(sequences) * 6, generator=generator).view(len(sequences), 6).int()
    positions = torch.cat([torch.arange(before, before + rows) for rows, before in sequences]).int()
    owner = [seq for seq, (rows, _) in enumerate(sequences) for _ in range(rows)]
    for run in runs_of([rows for rows, _ in sequences], [rows + before for rows, before in sequences], limit):
        seen = context(run, positions, tables, BLOCK, NOWHERE)
        for index, row in enumerate(range(seen.rows.start, seen.rows.stop)):
            sequence, place = divmod(index, run.num_rows)
            slots = seen.slots[sequence][seen.mask[sequence, 0, place]].tolist()
            wanted = range(int(positions[row]) + 1)
            assert slots == [int(tables[owner[row], p // BLOCK]) * BLOCK + p % BLOCK for p in wanted]


@given(sequences=SEQUENCES)
def test_places_that_no_row_sees_are_read_nowhere(sequences: list[tuple[int, int]]) -> None:
    tables = torch.arange(len(sequences) * 6).view(len(sequences), 6)
    positions = torch.cat([torch.arange(before, before + rows) for rows, before in sequences])
    for run in runs_of([rows for rows, _ in sequences], [rows + before for rows, before in sequences]):
        seen = context(run, positions, tables, BLOCK, NOWHERE)
        assert torch.equal(seen.slots == NOWHERE, ~seen.mask[:, 0].any(dim=1))
