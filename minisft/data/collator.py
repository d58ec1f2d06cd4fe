"""Apply a user's `batch_fn` (data collator) to rows of a TokenizedDataset."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minisft.batches import IGNORED, TokenizedDataset
from minisft.config.errors import UserError

# A data collator takes a micro-batch's rows, [{"input_ids", "labels", "attention_mask"}, ...], and
# returns the same three keys as [rows, length] tensors or lists, padded where the mask is 0 (no
# mask: no padding), like transformers' DataCollatorForSeq2Seq or DataCollatorForLanguageModeling(
# mlm=False). Its result must depend on its input only; otherwise resuming changes the run.
BatchFn = Callable[[list[dict[str, list[int]]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Collator:
    """Adapt a batch_fn to `Batches.collate`, which passes a dataset and the rows of each batch."""

    batch_fn: BatchFn
    vocab_size: int  # the ids and labels that batch_fn returns must be below it

    def __call__(self, dataset: TokenizedDataset, batches: list[list[int]]) -> TokenizedDataset:
        """Return the rows that batch_fn makes of all batches, in order, with the padding removed.

        Raises UserError that states the problem if batch_fn fails, or returns a malformed batch or
        ids that the model does not have.
        """
        rows: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            examples = []
            for row in batch:
                start, stop = dataset.document_offsets[dataset.row_offsets[row : row + 2]].tolist()
                ids, labels = (a[start:stop].tolist() for a in (dataset.input_ids, dataset.labels))
                mask = [1] * (stop - start)
                examples.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
            ids, labels, mask = _tensors(_call(self.batch_fn, examples), self.vocab_size)
            # Rows are concatenated in a micro-batch, so remove the padding that batch_fn added.
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


def _call(batch_fn: BatchFn, examples: list[dict[str, list[int]]]) -> Mapping[str, Any]:
    try:
        try:
            return batch_fn(examples)
        except ValueError:
            # DataCollatorForLanguageModeling creates labels and cannot pad labels in its input. If
            # every token is trained, the labels equal the ids, so call it again without labels.
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


def _tensors(made: Mapping[str, Any], vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Convert batch_fn's result to (input_ids, labels, bool attention_mask), all [rows, length]."""
    try:
        ids = torch.as_tensor(made["input_ids"])
        labels = torch.as_tensor(made["labels"])
        mask = torch.as_tensor(made.get("attention_mask", torch.ones_like(ids))).bool()
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(
            f"batch_fn must return a batch of input_ids and labels [rows, length] ({e!r})"
        ) from None
    if not ids.shape == labels.shape == mask.shape or ids.dim() != 2:
        raise UserError(
            f"batch_fn returned input_ids {tuple(ids.shape)}, labels {tuple(labels.shape)} and "
            f"attention_mask {tuple(mask.shape)}; expected three of one shape [rows, length]"
        )
    trained = labels[mask & (labels != IGNORED)]
    values = [*ids[mask].tolist(), *trained.tolist()]
    if wrong := [value for value in values if not 0 <= value < vocab_size]:
        raise UserError(
            f"batch_fn returned the id or label {wrong[0]}; expected 0 to {vocab_size - 1}, or "
            f"{IGNORED} for a label that is not trained"
        )
    return ids, labels, mask
