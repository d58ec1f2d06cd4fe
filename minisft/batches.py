"""Choose the rows of each training step and build their tensors, both from (seed, step) alone."""

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

# Label of a token that is not a training target; the same value as in Hugging Face libraries.
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
        """Return (start, stop) in the token arrays for each document of row i."""
        first, last = self.row_offsets[i : i + 2].tolist()
        offsets = self.document_offsets[first : last + 1].tolist()
        return list(itertools.pairwise(offsets))

    @cached_property
    def row_lengths(self) -> Tensor:
        """Return the number of tokens of each row, int64 [num_rows]."""
        return self.document_offsets[self.row_offsets].diff()


class MicroBatch(NamedTuple):
    """The tokens of some rows, concatenated, and which hidden state predicts which token.

    The first token of every document and tokens labelled IGNORED are not prediction targets.
    """

    tokens: Tokens
    target_rows_M: Tensor  # int64, indices into T: hidden state target_rows_M[i] ...
    targets_M: Tensor  # int64, ... predicts token id targets_M[i]


class StepBatch(NamedTuple):
    """The micro-batches that one rank processes in one optimizer step, and the step's counts."""

    micro_batches: list[MicroBatch]
    # Targets of all ranks and micro-batches. The loss is the mean over all targets of the step, so
    # that it does not depend on how the step is cut into ranks and micro-batches.
    num_loss_tokens: int
    num_tokens: int  # all tokens of all ranks
    rows: list[int]  # this rank's dataset rows, in order
    epoch: float  # epochs completed after this step


@dataclass(frozen=True)
class RowSchedule:
    """Computes the dataset rows of any step from its number, counted from 0.

    The order is Hugging Face Trainer's: epoch e visits a permutation seeded with seed + e, in
    batches of batch_size. Rank r of W takes batches r, r + W, ... `accumulation` batches make one
    optimizer step; the last step of an epoch may have fewer. A resumed run computes its rows
    directly, whereas a DataLoader would have to replay the earlier steps.
    """

    num_rows: int
    batch_size: int
    accumulation: int
    seed: int
    world: int = 1
    # If sources have weights: (rows, rows drawn each epoch) of every source, in dataset order.
    shares: tuple[tuple[int, int], ...] = ()

    @property
    def micro_steps_per_epoch(self) -> int:
        """Return the batches per rank and epoch; some ranks may have one fewer."""
        return math.ceil(math.ceil(self.num_rows / self.batch_size) / self.world)

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimizer steps per epoch."""
        return math.ceil(self.micro_steps_per_epoch / self.accumulation)

    def rows(self, step: int, rank: int = 0) -> list[list[int]]:
        """Return the dataset rows of each batch of `step` on `rank`, in visiting order."""
        epoch, first = divmod(step, self.steps_per_epoch)
        seed = self.seed + epoch
        order = mixed_order(self.shares, seed) if self.shares else epoch_order(self.num_rows, seed)
        start = first * self.accumulation
        stop = min(start + self.accumulation, self.micro_steps_per_epoch)
        batches = [(micro * self.world + rank) * self.batch_size for micro in range(start, stop)]
        # The last micro-step of an epoch may have fewer batches than ranks.
        return [order[b : b + self.batch_size] for b in batches if b < self.num_rows]

    def epoch_after(self, step: int) -> float:
        """Return the epochs completed after `step`, a fraction as in Trainer's log."""
        epoch, first = divmod(step, self.steps_per_epoch)
        done = min((first + 1) * self.accumulation, self.micro_steps_per_epoch)
        return epoch + done / self.micro_steps_per_epoch


# Cache two epochs: the batch that is prepared in advance may already belong to the next epoch.
@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int) -> list[int]:
    """Return torch's random permutation of the rows for a seed, the order that Trainer uses."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()


@lru_cache(maxsize=2)
def mixed_order(shares: tuple[tuple[int, int], ...], seed: int) -> list[int]:
    """Return the shuffled rows of one epoch of a weighted mixture, for a seed.

    shares: (rows, rows drawn) of each source. A source contributes all its rows drawn // rows
    times, then a random sample of drawn % rows of them, without repetition.
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
    """Return (rows, rows drawn each epoch) of every source; () without weights.

    The rows drawn add up to the total number of rows. Raises UserError if a weight gives its
    source less than one row.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return ()
    exact = [weight * sum(rows) for weight in given]
    drawn = [int(share) for share in exact]
    # Give the missing rows to the largest remainders, so that the counts add up to the total.
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
    """Builds the tensors of any step on the CPU and moves them to `device`.

    Rows are concatenated, in order, into as few micro-batches of at most max_tokens tokens as
    possible; a longer row becomes one micro-batch. How rows are cut affects memory and speed only:
    the loss is the mean over all targets of the step.
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
        """Return one rank's part of a step: (dataset, row numbers in it, number of targets)."""
        batches = self.schedule.rows(step, rank)
        if self.collate is not None:
            collated = self.collate(self.dataset, batches)
            return collated, list(range(len(collated))), int(trained_per_row(collated).sum())
        rows = list(itertools.chain(*batches))
        return self.dataset, rows, int(self._trained_per_row[rows].sum())

    def batch(self, step: int, rank: int = 0) -> StepBatch:
        """Return the micro-batches of one step on one rank. Only `collate` can raise UserError."""
        # The mean loss needs the target counts of all ranks. The schedule is a pure function, so
        # each rank computes the counts of the others without communication.
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
        """Return the batch of `step`, and re-raise here what the preparing thread raised."""
        if self.next is not None and self.next[0] == step:
            batch = self.next[1].result()
        else:
            batch = self.batches.batch(step)
        self._start(step + 1)
        return batch

    def _start(self, step: int) -> None:
        # A batch depends on its step number only, so it may be prepared before training reaches it.
        if self.pool is not None and step < self.stop:
            self.next = (step, self.pool.submit(self.batches.batch, step))


def cut_by_tokens(rows: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Split rows into consecutive groups of at most max_tokens tokens, or one longer row each."""
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
    """Return the targets per row, int64: labels that are not IGNORED and not a document's first."""
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
    """Concatenate dataset rows into a MicroBatch. dropout_seed: (seed, step); None: no dropout."""
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
    """Return a dropout key per token, int64 [T], hashed from seed, step, row, position in row."""
    keys = []
    for row in rows:
        # blake2b: the values of `hash` differ between processes, and a resumed run needs the same.
        name = ",".join(map(str, (*seed_step, row))).encode()
        base = int.from_bytes(blake2b(name, digest_size=8).digest(), "big", signed=True)
        keys.append(mix64(torch.arange(int(dataset.row_lengths[row])) + base))
    return torch.cat(keys)
