"""Which rows a step trains on, and how they become tensors: pure functions of (seed, step).

Row order is Hugging Face Trainer's: epoch e visits a permutation seeded with seed + e, in batches
of per_device_train_batch_size; rank r of W takes batches r, r + W, …; gradient_accumulation_steps
of them are one optimizer step, and an epoch's last step may be shorter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.llama import Tokens
from minisft.nn import documents_of, mix64

# A data collator: [{"input_ids", "labels", "attention_mask"}, ...] of one micro-batch's rows -> the
# same three as [rows, length] tensors or lists, padded where the mask is 0 (no mask: nowhere), as
# transformers' DataCollatorForSeq2Seq and DataCollatorForLanguageModeling(mlm=False) make them. It
# must be a function of its input alone, or a resumed run is another one.
BatchFn = Callable[[list[dict[str, list[int]]]], Mapping[str, Any]]
IGNORED = -100  # Hugging Face's label of a token that is not trained


class Collator(NamedTuple):
    """A batch_fn, and the size of the vocabulary that its ids are checked against."""

    batch_fn: BatchFn
    vocab_size: int


class MicroBatch(NamedTuple):
    """Rows side by side, and which hidden states predict what.

    hidden state target_rows_M[i] (an index into T) predicts token targets_M[i]; int64 both. Tokens
    without a trained label, and the first token of every document, are nobody's target.
    """

    tokens: Tokens
    target_rows_M: Tensor
    targets_M: Tensor


class StepBatch(NamedTuple):
    """One rank's share of one optimizer step.

    num_loss_tokens counts the targets of all ranks and micro-batches: the loss is their mean.
    num_tokens counts all tokens of all ranks; rows are this rank's dataset rows in order.
    """

    micro_batches: list[MicroBatch]
    num_loss_tokens: int
    num_tokens: int
    rows: list[int]
    epoch: float  # after this step


@dataclass(frozen=True)
class RowSchedule:
    """The rows of every step, as a pure function of the step number (from 0)."""

    num_rows: int
    batch_size: int
    accumulation: int
    seed: int
    world: int = 1
    # With weights: (rows, rows drawn from it each epoch) of every source, in the dataset's order.
    shares: tuple[tuple[int, int], ...] = ()

    @property
    def micro_steps_per_epoch(self) -> int:
        return math.ceil(math.ceil(self.num_rows / self.batch_size) / self.world)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.micro_steps_per_epoch / self.accumulation)

    def rows(self, step: int, rank: int = 0) -> list[list[int]]:
        """The dataset rows of each micro-batch of `step` on `rank`, in visiting order."""
        epoch, first = divmod(step, self.steps_per_epoch)
        if self.shares:
            order = mixed_order(self.shares, self.seed + epoch)
        else:
            order = epoch_order(self.num_rows, self.seed + epoch)
        start = first * self.accumulation
        stop = min(start + self.accumulation, self.micro_steps_per_epoch)
        batches = [(micro * self.world + rank) * self.batch_size for micro in range(start, stop)]
        return [order[b : b + self.batch_size] for b in batches if b < self.num_rows]

    def epoch_after(self, step: int) -> float:
        """Epochs completed once `step` is done, as Trainer logs it."""
        epoch, first = divmod(step, self.steps_per_epoch)
        done = min((first + 1) * self.accumulation, self.micro_steps_per_epoch)
        return epoch + done / self.micro_steps_per_epoch


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int) -> list[int]:
    """torch's random permutation of the rows under that seed (Trainer's order)."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()


@lru_cache(maxsize=2)
def mixed_order(shares: tuple[tuple[int, int], ...], seed: int) -> list[int]:
    """One epoch of a mixture under that seed: each source's share of rows, all of them shuffled.

    shares: (rows, drawn) of each source. Whole passes over a source first; what is left of its
    share is drawn from it without repetition, anew under every seed.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, start = [], 0
    for size, drawn in shares:
        passes, rest = divmod(drawn, size)
        rows += [torch.arange(start, start + size)] * passes
        rows.append(start + torch.randperm(size, generator=generator)[:rest])
        start += size
    together = torch.cat(rows)
    return together[torch.randperm(len(together), generator=generator)].tolist()


def source_shares(rows: list[int], weights: Sequence[float | None]) -> tuple[tuple[int, int], ...]:
    """(rows, rows drawn each epoch) of every source; () without weights.

    An epoch has as many rows as all sources together, split by weight to the nearest row.
    UserError where a weight is too small for one row.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return ()
    exact = [weight * sum(rows) for weight in given]
    drawn = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: drawn[i] - exact[i])
    for i in by_rest[: sum(rows) - sum(drawn)]:
        drawn[i] += 1
    if 0 in drawn:
        raise UserError(
            f"--dataset: weight {given[drawn.index(0)]:g} of {sum(rows)} rows is less than one row "
            "an epoch; raise it, or leave that dataset out"
        )
    return tuple(zip(rows, drawn, strict=True))


@dataclass(frozen=True)
class Batches:
    """`batch(step, rank)`: the tensors of a step, made on the CPU and moved to `device`.

    max_tokens: rows are laid side by side, in order, into as few micro-batches of at most this many
    tokens as they fit (a longer row is one of its own). The cut changes memory and speed; loss and
    gradients are those of the token mean over the step, whatever the cut. The collator, if
    there is one, is applied to the rows of each micro-batch first.
    """

    dataset: TokenizedDataset
    schedule: RowSchedule
    max_tokens: int
    device: torch.device
    dropout: bool = False
    ahead: bool = False  # worth a thread: the step itself runs on a GPU
    collator: Collator | None = None

    @cached_property
    def _trained_per_row(self) -> Tensor:
        return trained_per_row(self.dataset)

    @cached_property
    def _tokens_per_row(self) -> Tensor:
        return self.dataset.row_lengths

    def batch(self, step: int, rank: int = 0) -> StepBatch:
        """The micro-batches of one step on one rank; raises nothing that data loading did not."""
        everyone = [
            row
            for r in range(self.schedule.world)
            for b in self.schedule.rows(step, r)
            for row in b
        ]
        mine = [row for rows in self.schedule.rows(step, rank) for row in rows]
        if self.collator is not None:
            return self._collated(step, rank, mine)
        lengths = [int(self._tokens_per_row[row]) for row in mine]
        return StepBatch(
            micro_batches=[
                make_micro_batch(
                    self.dataset,
                    rows,
                    self.device,
                    dropout_seed=(self.schedule.seed, step) if self.dropout else None,
                )
                for rows in cut_by_tokens(mine, lengths, self.max_tokens)
            ],
            num_loss_tokens=int(self._trained_per_row[everyone].sum()),
            num_tokens=int(self._tokens_per_row[everyone].sum()),
            rows=mine,
            epoch=self.schedule.epoch_after(step),
        )

    def _collated(self, step: int, rank: int, mine: list[int]) -> StepBatch:
        """The step after the collator; what it makes decides the counts."""
        assert self.collator is not None
        everyone = [
            collate(self.dataset, self.schedule.rows(step, r), self.collator)
            for r in range(self.schedule.world)
        ]
        plain = dataclasses.replace(self, collator=None, dataset=everyone[rank])
        rows = list(range(len(everyone[rank])))
        seed = (self.schedule.seed, step) if self.dropout else None
        cut = cut_by_tokens(rows, plain._tokens_per_row.tolist(), self.max_tokens)
        return StepBatch(
            micro_batches=[
                make_micro_batch(plain.dataset, part, self.device, dropout_seed=seed)
                for part in cut
            ],
            num_loss_tokens=sum(int(trained_per_row(d).sum()) for d in everyone),
            num_tokens=sum(d.input_ids.numel() for d in everyone),
            rows=mine,
            epoch=self.schedule.epoch_after(step),
        )


def collate(
    dataset: TokenizedDataset, batches: list[list[int]], collator: Collator
) -> TokenizedDataset:
    """Rows of a dataset, batch by batch through the collator, its padding taken away again.

    UserError, naming what is wrong, for a result that is no batch of this model's ids.
    """
    rows: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        examples = []
        for row in batch:
            start, stop = dataset.document_offsets[dataset.row_offsets[row : row + 2]].tolist()
            ids, labels = dataset.input_ids[start:stop], dataset.labels[start:stop]
            mask = [1] * len(ids)
            examples.append(
                {"input_ids": ids.tolist(), "labels": labels.tolist(), "attention_mask": mask}
            )
        made = _made(collator.batch_fn, examples)
        try:
            ids = torch.as_tensor(made["input_ids"])
            labels = torch.as_tensor(made["labels"])
            mask = torch.as_tensor(made.get("attention_mask", torch.ones_like(ids))).bool()
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(
                f"batch_fn made no batch of input_ids and labels [rows, length] ({e!r})"
            ) from None
        shapes = {tuple(t.shape) for t in (ids, labels, mask)}
        if len(shapes) != 1 or ids.dim() != 2:
            raise UserError(
                f"batch_fn made input_ids {tuple(ids.shape)}, labels {tuple(labels.shape)} and "
                f"attention_mask {tuple(mask.shape)}; expected three of one shape [rows, length]"
            )
        wrong = [i for i in ids[mask].tolist() if not 0 <= i < collator.vocab_size]
        wrong += [
            t for t in labels[mask].tolist() if t != IGNORED and not 0 <= t < collator.vocab_size
        ]
        if wrong:
            raise UserError(
                f"batch_fn made the id or label {wrong[0]}; expected 0 to "
                f"{collator.vocab_size - 1}, or {IGNORED} for a label that is not trained"
            )
        rows += [(i[m], t[m]) for i, t, m in zip(ids, labels, mask, strict=True) if m.any()]
    if not rows:
        raise UserError("batch_fn left no row in a batch; expected at least one token")
    lengths = torch.tensor([0, *(len(ids) for ids, _ in rows)])
    return TokenizedDataset(
        input_ids=torch.cat([ids for ids, _ in rows]).int(),
        labels=torch.cat([labels for _, labels in rows]).int(),
        document_offsets=lengths.cumsum(0),
        row_offsets=torch.arange(len(rows) + 1),
        stats=dataset.stats,
    )


def _made(batch_fn: BatchFn, examples: list[dict[str, list[int]]]) -> Mapping[str, Any]:
    """What a batch_fn makes of rows. Some cannot pad labels, for they make their own: where every
    token of the rows is trained, such a one gets rows without."""
    try:
        try:
            return batch_fn(examples)
        except ValueError:
            if any(row["labels"] != row["input_ids"] for row in examples):
                raise
            return batch_fn([{k: v for k, v in row.items() if k != "labels"} for row in examples])
    except Exception as e:
        reason = " ".join(str(e).split())
        raise UserError(
            f"batch_fn failed ({type(e).__name__}: {reason}); it takes a list of rows, dicts of "
            "the lists input_ids, labels and attention_mask, and returns the three as [rows, "
            "length], padded where the mask is 0. One that makes its own labels takes only rows "
            "whose every token is trained (DataCollatorForSeq2Seq keeps those of the rows)"
        ) from e


class Ahead:
    """Batches made one step ahead, in a thread: the device need not wait for the CPU.

    A batch is a pure function of its step, so making it early changes nothing.
    """

    def __init__(self, batches: Batches, first: int, stop: int):
        self.batches, self.stop = batches, stop
        self.pool = ThreadPoolExecutor(1) if batches.ahead else None
        self.next: tuple[int, Future] | None = None
        self._start(first)

    def batch(self, step: int) -> StepBatch:
        """The batch of `step`; raises what making it raised."""
        if self.next is None or self.next[0] != step:
            batch = self.batches.batch(step)
        else:
            batch = self.next[1].result()
        self._start(step + 1)
        return batch

    def _start(self, step: int) -> None:
        if self.pool is not None and step < self.stop:
            self.next = (step, self.pool.submit(self.batches.batch, step))


def cut_by_tokens(rows: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Consecutive groups of rows of at most max_tokens tokens each (or one row)."""
    groups: list[list[int]] = []
    room = 0
    for row, length in zip(rows, lengths, strict=True):
        if not groups or length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(row)
        room -= length
    return groups


def trained_per_row(dataset: TokenizedDataset) -> Tensor:
    """How many targets each row has: labels that are not ignored and not first in a document."""
    if dataset.row_targets is not None:
        return dataset.row_targets
    trained = dataset.labels != IGNORED
    starts = dataset.document_offsets[:-1]
    starts = starts[starts < len(trained)]
    trained[starts] = False
    running = torch.cat((torch.zeros(1, dtype=torch.int64), trained.cumsum(0)))
    return running[dataset.document_offsets[dataset.row_offsets]].diff()


def make_micro_batch(
    dataset: TokenizedDataset,
    rows: list[int],
    device: torch.device,
    *,
    dropout_seed: tuple[int, int] | None = None,
) -> MicroBatch:
    """Lay dataset rows side by side. dropout_seed: (seed, step), or None for no dropout."""
    spans = [
        (int(dataset.document_offsets[d]), int(dataset.document_offsets[d + 1]))
        for row in rows
        for d in range(int(dataset.row_offsets[row]), int(dataset.row_offsets[row + 1]))
    ]
    spans = [(a, b) for a, b in spans if b > a]
    ids = torch.cat([dataset.input_ids[a:b] for a, b in spans]).long()
    labels = torch.cat([dataset.labels[a:b] for a, b in spans]).long()
    lengths = tuple(b - a for a, b in spans)
    cu = torch.tensor((0, *lengths)).cumsum(0)
    labels[cu[:-1]] = IGNORED
    predicted = (labels != IGNORED).nonzero().squeeze(1)
    keys = None if dropout_seed is None else _dropout_keys(dataset, rows, dropout_seed).to(device)
    tokens = Tokens(
        ids.to(device),
        torch.cat([torch.arange(n) for n in lengths]).to(device),
        documents_of(lengths, device),
        keys,
    )
    return MicroBatch(tokens, (predicted - 1).to(device), labels[predicted].to(device))


def _dropout_keys(dataset: TokenizedDataset, rows: list[int], seed_step: tuple[int, int]) -> Tensor:
    """int64 [T]: a number per token that only (seed, step, row, place in the row) decide."""
    keys = []
    for row in rows:
        first, last = dataset.document_offsets[dataset.row_offsets[row : row + 2]].tolist()
        name = ",".join(map(str, (*seed_step, row))).encode()
        base = int.from_bytes(blake2b(name, digest_size=8).digest(), "big", signed=True)
        keys.append(mix64(torch.arange(last - first) + base))
    return torch.cat(keys)


@dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """Token arrays of all rows, back to back, on the CPU.

    Row i holds documents row_offsets[i]..row_offsets[i+1]; document d holds tokens
    document_offsets[d]..document_offsets[d+1]. Labels are not shifted: the model's output at
    position t is scored against labels[t+1] of the same document.
    """

    input_ids: Tensor  # int32 [total]
    labels: Tensor  # int32 [total]; IGNORED where not trained
    document_offsets: Tensor  # int64 [num_documents + 1]
    row_offsets: Tensor  # int64 [num_rows + 1]
    stats: dict[str, Any]
    digests: Tensor | None = None  # int64: a hash of the ids of each document that was read
    row_targets: Tensor | None = None  # int64 [num_rows]: trained labels not first in a document
    hash: str | None = None  # data_hash, where it is known already
    entry: Path | None = None  # where it is kept on disk

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row_documents(self, i: int) -> list[tuple[int, int]]:
        """[(start, stop)] into the token arrays of each document of row i."""
        first, last = self.row_offsets[i : i + 2].tolist()
        offsets = self.document_offsets[first : last + 1].tolist()
        return list(itertools.pairwise(offsets))

    @property
    def row_lengths(self) -> Tensor:
        """Tokens of each row, int64 [num_rows]."""
        return self.document_offsets[self.row_offsets].diff()

    @property
    def max_token_id(self) -> int:
        """The largest id, to compare with the embedding's rows; -1 if there is no token."""
        if "max_token_id" in self.stats:
            return self.stats["max_token_id"]
        return int(self.input_ids.max()) if len(self.input_ids) else -1
