"""Which rows a step sees, and the tensors made of them."""

import dataclasses
import itertools
import math
from collections import Counter
from hashlib import blake2b

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import CPU, all_rows, dataset_of, random_dataset

from minisft.batches import (
    IGNORED,
    Ahead,
    Batches,
    RowSchedule,
    cut_by_tokens,
    epoch_order,
    make_micro_batch,
    trained_per_row,
)
from minisft.nn import mix64

PACKED = [[5, 1, 9], [12], [2, 2], [1], [7, 3, 3, 4], [20], [6], [11, 8], [3], [13, 1]]


# ------------------------------------------------------------------------------------- the schedule


@settings(max_examples=150, deadline=None)
@given(
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 7),
    world=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 2),
)
def test_every_epoch_covers_each_row_once(num_rows, batch_size, accumulation, world, seed, epoch):
    schedule = RowSchedule(num_rows, batch_size, accumulation, seed, world)
    first = epoch * schedule.steps_per_epoch
    steps = range(first, first + schedule.steps_per_epoch)
    seen = Counter()
    for step in steps:
        ranks = [schedule.rows(step, rank) for rank in range(world)]
        assert ranks[0], "the first rank always has work"
        assert all(len(batches) <= accumulation for batches in ranks)
        assert all(0 < len(batch) <= batch_size for batches in ranks for batch in batches)
        seen.update(row for batches in ranks for batch in batches for row in batch)
    assert seen == dict.fromkeys(range(num_rows), 1)


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 7),
    world=st.integers(2, 4),
)
def test_ranks_share_the_batches_of_one_rank(num_rows, batch_size, accumulation, world):
    """Rank r of W takes batches r, r + W, ...: a step of W ranks is W x accumulation batches."""
    many = RowSchedule(num_rows, batch_size, accumulation, 3, world)
    one = RowSchedule(num_rows, batch_size, accumulation * world, 3)
    assert many.steps_per_epoch == one.steps_per_epoch
    for step in range(2 * one.steps_per_epoch):
        ranks = [many.rows(step, rank) for rank in range(world)]
        dealt = [b for turn in itertools.zip_longest(*ranks) for b in turn if b is not None]
        assert dealt == one.rows(step)


def test_order_is_torch_s_permutation_under_seed_plus_epoch():
    schedule = RowSchedule(num_rows=11, batch_size=2, accumulation=3, seed=40)
    assert schedule.steps_per_epoch == 2
    for epoch in range(3):
        generator = torch.Generator().manual_seed(40 + epoch)
        want = torch.randperm(11, generator=generator).tolist()
        steps = [schedule.rows(2 * epoch), schedule.rows(2 * epoch + 1)]
        assert [len(s) for s in steps] == [3, 3]
        assert [len(b) for s in steps for b in s] == [2, 2, 2, 2, 2, 1]
        assert [row for s in steps for b in s for row in b] == want
    assert epoch_order(11, 40) != epoch_order(11, 41) != epoch_order(11, 42)


def test_a_step_is_a_pure_function_of_its_number():
    schedule = RowSchedule(23, 2, 3, seed=1)
    forwards = [schedule.rows(step) for step in range(12)]
    assert [RowSchedule(23, 2, 3, seed=1).rows(step) for step in reversed(range(12))] == (
        forwards[::-1]
    )


def test_epochs_completed():
    """A step is its micro-steps over those of an epoch; the short last one completes it."""
    schedule = RowSchedule(
        num_rows=15, batch_size=2, accumulation=3, seed=0
    )  # 8 micro-steps: 3, 3, 2
    epochs = [schedule.epoch_after(step) for step in range(7)]
    assert epochs == [3 / 8, 6 / 8, 1.0, 1 + 3 / 8, 1 + 6 / 8, 2.0, 2 + 3 / 8]
    two_ranks = RowSchedule(num_rows=15, batch_size=2, accumulation=3, seed=0, world=2)
    assert [two_ranks.epoch_after(step) for step in range(3)] == [3 / 4, 1.0, 1 + 3 / 4]


def test_micro_steps_of_an_epoch():
    for n, batch, world in itertools.product((1, 2, 9, 10), (1, 3), (1, 2, 4)):
        schedule = RowSchedule(n, batch, 2, 0, world)
        assert schedule.micro_steps_per_epoch == math.ceil(math.ceil(n / batch) / world)


# ------------------------------------------------------------------------------------ micro-batches


def reference_targets(dataset, rows):
    """(position of the hidden state, target) of every trained label, written out in loops."""
    found, place = [], 0
    for row in rows:
        for start, stop in dataset.row_documents(row):
            for t in range(start, stop):
                if t > start and dataset.labels[t] != IGNORED:
                    found.append((place - 1, int(dataset.labels[t])))
                place += 1
    return found


@pytest.mark.parametrize("masked", [0.0, 0.3, 0.9])
def test_targets_are_the_trained_labels_that_have_a_predecessor(masked):
    dataset = random_dataset(PACKED, masked=masked)
    rows = [4, 0, 9, 2, 7]
    micro = make_micro_batch(dataset, rows, CPU)
    got = list(zip(micro.target_rows_M.tolist(), micro.targets_M.tolist(), strict=True))
    assert got == reference_targets(dataset, rows)
    assert micro.target_rows_M.dtype == micro.targets_M.dtype == torch.int64
    assert len(got) > 0 or masked == 0.9


def test_no_target_crosses_from_one_document_into_the_next():
    """Every label is trained; the last token of a document predicts nothing."""
    micro = make_micro_batch(random_dataset(PACKED, masked=0.0), list(range(len(PACKED))), CPU)
    lengths = [n for row in PACKED for n in row]
    ends = torch.tensor(lengths).cumsum(0) - 1
    assert not set(ends.tolist()) & set(micro.target_rows_M.tolist())
    assert len(micro.targets_M) == sum(n - 1 for n in lengths)


def test_positions_restart_in_every_document():
    rows = [4, 0, 5]
    tokens = make_micro_batch(random_dataset(PACKED), rows, CPU).tokens
    lengths = [n for row in rows for n in PACKED[row]]
    assert tokens.position_ids_T.tolist() == [t for n in lengths for t in range(n)]
    assert tokens.documents.lengths == tuple(lengths)
    assert tokens.documents.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths)]
    assert tokens.documents.cu_seqlens.dtype == torch.int32
    assert tokens.dropout_keys_T is None


def test_ids_are_the_rows_side_by_side_and_the_dataset_is_left_alone():
    dataset = random_dataset(PACKED)
    labels = dataset.labels.clone()
    rows = [9, 3, 3, 0]
    tokens = make_micro_batch(dataset, rows, CPU).tokens
    want = [t for r in rows for a, b in dataset.row_documents(r) for t in range(a, b)]
    assert torch.equal(tokens.input_ids_T, dataset.input_ids[want].long())
    all_rows(dataset)
    assert torch.equal(dataset.labels, labels)


def test_empty_documents_leave_no_trace():
    full = dataset_of([[[5, 6, 7], [8, 9]]], [[[5, 6, 7], [8, 9]]])
    holes = dataset_of([[[], [5, 6, 7], [], [8, 9], []]], [[[], [5, 6, 7], [], [8, 9], []]])
    a, b = (make_micro_batch(d, [0], CPU) for d in (full, holes))
    assert a.tokens.documents.lengths == b.tokens.documents.lengths == (3, 2)
    assert torch.equal(a.tokens.input_ids_T, b.tokens.input_ids_T)
    assert torch.equal(a.targets_M, b.targets_M)
    assert torch.equal(a.target_rows_M, b.target_rows_M)
    assert trained_per_row(full).tolist() == trained_per_row(holes).tolist() == [3]


def test_a_row_trained_on_its_first_label_only_has_no_target():
    dataset = dataset_of([[[5, 6, 7]]], [[[5, IGNORED, IGNORED]]])
    micro = make_micro_batch(dataset, [0], CPU)
    assert micro.targets_M.numel() == micro.target_rows_M.numel() == 0
    assert trained_per_row(dataset).tolist() == [0]


# -------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [1, 17, 40, 10**6])
def test_counts_of_a_step_are_those_of_its_micro_batches(world, max_tokens):
    dataset = random_dataset(PACKED, masked=0.5)
    schedule = RowSchedule(len(dataset), 2, 2, seed=5, world=world)
    batches = Batches(dataset, schedule, max_tokens, CPU)
    for step in range(2 * schedule.steps_per_epoch):
        ranks = [batches.batch(step, rank) for rank in range(world)]
        micros = [m for batch in ranks for m in batch.micro_batches]
        assert {b.num_loss_tokens for b in ranks} == {sum(m.targets_M.numel() for m in micros)}
        assert {b.num_tokens for b in ranks} == {sum(m.tokens.input_ids_T.numel() for m in micros)}
        assert {b.epoch for b in ranks} == {schedule.epoch_after(step)}
        for rank, batch in enumerate(ranks):
            assert batch.rows == [row for rows in schedule.rows(step, rank) for row in rows]


@given(lengths=st.lists(st.integers(0, 30), max_size=30), max_tokens=st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_cut_by_tokens_keeps_order_and_the_limit_and_wastes_no_cut(lengths, max_tokens):
    rows = [100 + i for i in range(len(lengths))]
    of = dict(zip(rows, lengths, strict=True))
    groups = cut_by_tokens(rows, lengths, max_tokens)
    assert [row for group in groups for row in group] == rows
    sums = [sum(of[row] for row in group) for group in groups]
    for group, total in zip(groups, sums, strict=True):
        assert group
        assert total <= max_tokens or len([r for r in group if of[r]]) == 1
    for total, following in zip(sums, groups[1:], strict=False):
        assert total + of[following[0]] > max_tokens, "the next row would have fitted"


def test_a_row_beyond_the_limit_is_a_micro_batch_of_its_own():
    assert cut_by_tokens([0, 1, 2, 3], [3, 50, 3, 4], 10) == [[0], [1], [2, 3]]
    assert cut_by_tokens([7, 8, 9], [5, 5, 1], 10) == [[7, 8], [9]]
    assert cut_by_tokens([], [], 10) == []


# ------------------------------------------------------------------------------------- dropout keys


def keys_by_row(dataset, *, max_tokens, step=0, seed=0, batch_size=10, accumulation=1):
    """Row -> its dropout keys, in one step over all rows."""
    schedule = RowSchedule(len(dataset), batch_size, accumulation, seed)
    batch = Batches(dataset, schedule, max_tokens, CPU, dropout=True).batch(step)
    lengths = [sum(PACKED[row]) for row in batch.rows]
    keys = torch.cat([m.tokens.dropout_keys_T for m in batch.micro_batches])
    return dict(zip(batch.rows, (k.tolist() for k in keys.split(lengths)), strict=True))


def test_dropout_keys_depend_on_the_row_and_not_on_the_cut():
    dataset = random_dataset(PACKED)
    whole = keys_by_row(dataset, max_tokens=10**6)
    assert sorted(whole) == list(range(len(PACKED)))
    assert [len(whole[row]) for row in sorted(whole)] == [sum(row) for row in PACKED]
    for max_tokens in (1, 17, 30):
        assert keys_by_row(dataset, max_tokens=max_tokens) == whole
    assert keys_by_row(dataset, max_tokens=1, batch_size=2, accumulation=5) == whole


def test_dropout_keys_do_not_depend_on_the_other_rows_of_the_step():
    dataset = random_dataset(PACKED)
    together = make_micro_batch(dataset, [4, 0], CPU, dropout_seed=(1, 2)).tokens.dropout_keys_T
    alone = make_micro_batch(dataset, [0], CPU, dropout_seed=(1, 2)).tokens.dropout_keys_T
    assert torch.equal(together[sum(PACKED[4]) :], alone)


def test_dropout_keys_never_repeat():
    """Not within a row, nor across rows, steps and seeds."""
    dataset = random_dataset(PACKED)
    keys = [
        key
        for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 11), (10, 1))
        for row in keys_by_row(dataset, max_tokens=99, step=step, seed=seed).values()
        for key in row
    ]
    assert len(set(keys)) == len(keys) == 6 * sum(map(sum, PACKED))


def test_dropout_keys_are_the_same_in_every_process():
    """They are part of what a run computes: other values would change runs that are resumed."""
    keys = make_micro_batch(random_dataset([[3]]), [0], CPU, dropout_seed=(7, 5)).tokens
    base = int.from_bytes(blake2b(b"7,5,0", digest_size=8).digest(), "big", signed=True)
    want = mix64(torch.tensor([base, base + 1, base + 2]))
    assert keys.dropout_keys_T.tolist() == want.tolist()


@pytest.mark.parametrize("threaded", [False, True])
def test_batches_made_ahead_are_the_same(threaded):
    batches = dataclasses.replace(
        Batches(random_dataset([[5], [3, 4], [9], [2]]), RowSchedule(4, 1, 2, seed=3), 64, CPU),
        ahead=threaded,
    )
    ahead = Ahead(batches, 1, 4)
    assert (ahead.next is not None) == threaded
    for step in (1, 2, 3, 2):  # in order, and once more out of it
        ours, plain = ahead.batch(step), batches.batch(step)
        assert ours.rows == plain.rows and ours.num_tokens == plain.num_tokens
        for a, b in zip(ours.micro_batches, plain.micro_batches, strict=True):
            assert torch.equal(a.tokens.input_ids_T, b.tokens.input_ids_T)


def test_an_error_in_a_batch_made_ahead_is_raised_when_it_is_asked_for(monkeypatch):
    batches = Batches(random_dataset([[5], [3]]), RowSchedule(2, 1, 1, seed=3), 64, CPU, ahead=True)
    monkeypatch.setattr(Batches, "batch", lambda self, step: 1 / 0)
    ahead = Ahead(batches, 0, 2)
    with pytest.raises(ZeroDivisionError):
        ahead.batch(0)
