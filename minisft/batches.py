"""Which rows a step trains on, and how they become tensors: pure functions of (seed, step)."""

import itertools
import math
from collections.abc import Callable, Sequence
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

# Label of a token that is not trained: Hugging Face's value, so that labels pass between the two.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """Token arrays of all rows, concatenated without padding, on the CPU.

    Row i holds documents row_offsets[i]..row_offsets[i+1]; document d holds tokens
    document_offsets[d]..document_offsets[d+1]. Labels are not shifted: the model's output at
    position t is scored against labels[t+1] of the same document.
    """

    input_ids: Tensor  # int32 [total]
    labels: Tensor  # int32 [total]; IGNORED where not trained
    document_offsets: Tensor  # int64 [num_documents + 1]
    row_offsets: Tensor  # int64 [num_rows + 1]
    stats: dict[str, Any]  # what `minisft.data.stats.dataset_stats` counted
    digests: Tensor | None = None  # int64: a hash of the ids of each document that was read
    row_targets: Tensor | None = None  # int64 [num_rows]: `trained_per_row`, if already counted
    hash: str | None = None  # `minisft.data.token_files.data_hash`, if already computed
    entry: Path | None = None  # cache directory that holds the arrays

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row_documents(self, i: int) -> list[tuple[int, int]]:
        """[(start, stop)] into the token arrays of each document of row i."""
        first, last = self.row_offsets[i : i + 2].tolist()
        offsets = self.document_offsets[first : last + 1].tolist()
        return list(itertools.pairwise(offsets))

    @cached_property
    def row_lengths(self) -> Tensor:
        """Number of tokens of each row, int64 [num_rows]."""
        return self.document_offsets[self.row_offsets].diff()


class MicroBatch(NamedTuple):
    """The tokens of some rows, concatenated, and which hidden state predicts which token.

    A token without a trained label, and the first token of every document, is nobody's target.
    """

    tokens: Tokens
    target_rows_M: Tensor  # int64, indices into T: hidden state target_rows_M[i] ...
    targets_M: Tensor  # int64, ... predicts token id targets_M[i]


class StepBatch(NamedTuple):
    """One rank's share of one optimizer step."""

    micro_batches: list[MicroBatch]
    # Targets of all ranks and micro-batches. The loss is the mean over these, so that it does not
    # depend on how a step is cut into ranks and micro-batches.
    num_loss_tokens: int
    num_tokens: int  # all tokens of all ranks
    rows: list[int]  # this rank's dataset rows, in order
    epoch: float  # epochs completed after this step


@dataclass(frozen=True)
class RowSchedule:
    """The rows of every step, as a pure function of the step number (from 0).

    The order is Hugging Face Trainer's: epoch e visits a permutation seeded with seed + e, in
    batches of batch_size; rank r of W takes batches r, r + W, ...; `accumulation` of them are one
    optimizer step, and an epoch's last step may be shorter. Not a DataLoader: a resumed run finds
    its rows without replaying earlier steps.
    """

    num_rows: int
    batch_size: int
    accumulation: int
    seed: int
    world: int = 1
    # With weights: (rows, rows drawn from it each epoch) of every source, in the dataset's order.
    shares: tuple[tuple[int, int], ...] = ()

    @property
    def micro_steps_per_epoch(self) -> int:
        """Batches that each rank takes per epoch, the last one possibly missing on some ranks."""
        return math.ceil(math.ceil(self.num_rows / self.batch_size) / self.world)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(self.micro_steps_per_epoch / self.accumulation)

    def rows(self, step: int, rank: int = 0) -> list[list[int]]:
        """The dataset rows of each micro-batch of `step` on `rank`, in visiting order."""
        epoch, first = divmod(step, self.steps_per_epoch)
        seed = self.seed + epoch
        order = mixed_order(self.shares, seed) if self.shares else epoch_order(self.num_rows, seed)
        start = first * self.accumulation
        stop = min(start + self.accumulation, self.micro_steps_per_epoch)
        batches = [(micro * self.world + rank) * self.batch_size for micro in range(start, stop)]
        # The last micro-step of an epoch may have fewer batches than ranks.
        return [order[b : b + self.batch_size] for b in batches if b < self.num_rows]

    def epoch_after(self, step: int) -> float:
        """Epochs completed once `step` is done, as Trainer logs it."""
        epoch, first = divmod(step, self.steps_per_epoch)
        done = min((first + 1) * self.accumulation, self.micro_steps_per_epoch)
        return epoch + done / self.micro_steps_per_epoch


# Two entries: the batch prepared ahead may belong to the next epoch already.
@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int) -> list[int]:
    """torch's random permutation of the rows under that seed (Trainer's order)."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()


@lru_cache(maxsize=2)
def mixed_order(shares: tuple[tuple[int, int], ...], seed: int) -> list[int]:
    """The rows of one epoch of a weighted mixture under that seed, shuffled together.

    shares: (rows, drawn) of each source. A source contributes whole passes over its rows, then a
    random part without repetition, drawn again for every seed.
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

    An epoch has as many rows as all sources together. Raises UserError if a weight is too small
    for one row.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return ()
    exact = [weight * sum(rows) for weight in given]
    drawn = [int(share) for share in exact]
    # Largest remainder first, so that the rounded shares add up to the epoch exactly.
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
    """`batch(step, rank)` returns the tensors of a step, built on the CPU and moved to `device`.

    Rows are concatenated, in order, into as few micro-batches of at most max_tokens tokens as
    possible (a longer row is a micro-batch of its own). The cut changes memory and speed only: loss
    and gradients are those of the mean over the step's trained tokens.
    """

    dataset: TokenizedDataset
    schedule: RowSchedule
    max_tokens: int
    device: torch.device
    dropout: bool = False  # give every token a dropout key
    ahead: bool = False  # worth a thread: the step itself runs on a GPU
    # (dataset, rows of each batch) -> a dataset of the collated rows (minisft.data.collator).
    collate: Callable[[TokenizedDataset, list[list[int]]], TokenizedDataset] | None = None

    @cached_property
    def _trained_per_row(self) -> Tensor:
        return trained_per_row(self.dataset)

    def _share(self, step: int, rank: int) -> tuple[TokenizedDataset, list[int], int]:
        """(dataset, its rows, their number of targets): one rank's part of a step."""
        batches = self.schedule.rows(step, rank)
        if self.collate is not None:
            collated = self.collate(self.dataset, batches)
            return collated, list(range(len(collated))), int(trained_per_row(collated).sum())
        rows = list(itertools.chain(*batches))
        return self.dataset, rows, int(self._trained_per_row[rows].sum())

    def batch(self, step: int, rank: int = 0) -> StepBatch:
        """The micro-batches of one step on one rank. Raises UserError from `collate` only."""
        # Every rank needs the token counts of all ranks for the mean. The schedule is a pure
        # function, so each rank counts them itself, without communication.
        shares = [self._share(step, r) for r in range(self.schedule.world)]
        dataset, rows, _ = shares[rank]
        seed = (self.schedule.seed, step) if self.dropout else None
        return StepBatch(
            micro_batches=[
                make_micro_batch(dataset, part, self.device, dropout_seed=seed)
                for part in cut_by_tokens(rows, dataset.row_lengths[rows].tolist(), self.max_tokens)
            ],
            num_loss_tokens=sum(targets for _, _, targets in shares),
            num_tokens=sum(int(d.row_lengths[own].sum()) for d, own, _ in shares),
            rows=list(itertools.chain(*self.schedule.rows(step, rank))),
            epoch=self.schedule.epoch_after(step),
        )


class Ahead:
    """Prepares batches one step ahead in a thread, so that the device does not wait for the CPU."""

    def __init__(self, batches: Batches, first: int, stop: int):
        self.batches, self.stop = batches, stop
        self.pool = ThreadPoolExecutor(1) if batches.ahead else None
        self.next: tuple[int, Future] | None = None
        self._start(first)

    def batch(self, step: int) -> StepBatch:
        """The batch of `step`. Raises the exception of preparing it, in the caller's thread."""
        if self.next is not None and self.next[0] == step:
            batch = self.next[1].result()
        else:
            batch = self.batches.batch(step)
        self._start(step + 1)
        return batch

    def _start(self, step: int) -> None:
        # A batch is a pure function of its step, so preparing it early changes nothing.
        if self.pool is not None and step < self.stop:
            self.next = (step, self.pool.submit(self.batches.batch, step))


def cut_by_tokens(rows: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Consecutive groups of rows of at most max_tokens tokens each (or one longer row)."""
    groups: list[list[int]] = []
    free = 0
    for row, length in zip(rows, lengths, strict=True):
        if not groups or length > free:
            groups.append([])
            free = max_tokens
        groups[-1].append(row)
        free -= length
    return groups


def trained_per_row(dataset: TokenizedDataset) -> Tensor:
    """Number of targets of each row, int64: labels not IGNORED and not first in a document."""
    if dataset.row_targets is not None:
        return dataset.row_targets
    trained = dataset.labels != IGNORED
    starts = dataset.document_offsets[:-1]
    # Empty documents at the end of the dataset start after its last token.
    trained[starts[starts < len(trained)]] = False
    running = torch.cat((torch.zeros(1, dtype=torch.int64), trained.cumsum(0)))
    return running[dataset.document_offsets[dataset.row_offsets]].diff()


def make_micro_batch(
    dataset: TokenizedDataset,
    rows: list[int],
    device: torch.device,
    *,
    dropout_seed: tuple[int, int] | None = None,
) -> MicroBatch:
    """Concatenate dataset rows. dropout_seed: (seed, step), or None for no dropout."""
    spans = [span for row in rows for span in dataset.row_documents(row) if span[0] < span[1]]
    ids = torch.cat([dataset.input_ids[a:b] for a, b in spans]).long()
    labels = torch.cat([dataset.labels[a:b] for a, b in spans]).long()
    lengths = tuple(b - a for a, b in spans)
    cu = torch.tensor((0, *lengths)).cumsum(0)
    # The token before a document's first one belongs to another document and must not predict it.
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
    """One number per token, int64 [T], that depends on (seed, step, row, position in row) only."""
    keys = []
    for row in rows:
        # blake2b and not `hash`, whose values differ between processes: a resumed run needs these.
        name = ",".join(map(str, (*seed_step, row))).encode()
        base = int.from_bytes(blake2b(name, digest_size=8).digest(), "big", signed=True)
        keys.append(mix64(torch.arange(int(dataset.row_lengths[row])) + base))
    return torch.cat(keys)
