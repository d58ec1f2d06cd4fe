"""Activations that wait in pinned host memory between a layer's forward and backward pass.

Copies run on a stream of their own, one layer behind the forward pass and one ahead of the backward
pass. On a CPU, "host" is the same memory, and nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minisft.explicit.attention import Attended
from minisft.explicit.block import Saved
from minisft.explicit.policy import PARTS, Policy


@dataclass
class Host:
    """Pinned buffers by (layer, part), and the copies under way. tokens: of the largest batch."""

    device: torch.device
    tokens: int
    buffers: dict[tuple, Tensor] = field(default_factory=dict)
    leaving: list[tuple] = field(default_factory=list)  # (event, tensors) still being copied out
    coming: dict[int, tuple] = field(default_factory=dict)  # layer -> (event, parts)
    waiting: dict[int, dict[str, tuple[Tensor, int]]] = field(
        default_factory=dict
    )  # layer -> pinned parts, and the columns of each that are its own
    stream: torch.cuda.Stream | None = None

    def keep(self, i: int, saved: Saved, policy: Policy) -> Saved:
        """`saved` with only what the policy keeps on the GPU; the host's parts are on their way."""
        parts = _parts(saved)
        if self.device.type == "cuda" and policy.host:
            self._send(i, {name: parts[name] for name in sorted(policy.host)})
            stays = policy.gpu
        else:
            stays = policy.gpu | policy.host
        attended = saved.attended
        if attended is not None and "attended" not in stays:
            moved = "attended" in policy.host  # the small tensors of attention stay on the GPU
            attended = attended._replace(out_TNH=None) if moved else None  # pyright: ignore
        return Saved(
            saved.x_TD if "x" in stays else None,
            saved.qkv if "qkv" in stays else None,
            attended,
            saved.mid_TD if "mid" in stays else None,
            saved.gate_up if "gate_up" in stays else None,
            saved.small,
        )

    def start_fetching(self, i: int) -> None:
        """All copies out are done before anything comes back; layer i is asked for."""
        for event, _ in self.leaving:
            torch.cuda.current_stream().wait_event(event)
        self.leaving.clear()
        self._ask(i)

    def fetch(self, i: int, kept: Saved | None) -> Saved:
        """What layer i kept, on the GPU again; layer i - 1 is asked for."""
        assert kept is not None
        event, parts = self.coming.pop(i, (None, {}))
        self._ask(i - 1)
        if event is None:
            return kept
        torch.cuda.current_stream().wait_event(event)
        names = {"x": "x_TD", "mid": "mid_TD", "qkv": "qkv", "gate_up": "gate_up"}
        kept = kept._replace(**{names[k]: v for k, v in parts.items() if k in names})
        if "attended" in parts and kept.attended is not None:
            kept = kept._replace(attended=kept.attended._replace(out_TNH=parts["attended"]))
        return kept

    def _send(self, i: int, parts: dict[str, Tensor]) -> None:
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream()
        while self.leaving:  # one layer's copies lag behind, no more
            event, _ = self.leaving.pop(0)
            current.wait_event(event)
        self.stream.wait_stream(current)
        waiting = {}
        with torch.cuda.stream(self.stream):
            for name, tensor in parts.items():
                whole = _whole_rows(tensor)
                pinned = self._buffer(i, name, whole)
                waiting[name] = pinned, tensor.shape[1]
                pinned.copy_(whole, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.waiting[i] = waiting
        self.leaving.append((event, parts))

    def _ask(self, i: int) -> None:
        if i < 0 or i not in self.waiting:
            return
        assert self.stream is not None
        waiting = self.waiting.pop(i)
        wholes = {
            n: torch.empty(t.shape, dtype=t.dtype, device=self.device)
            for n, (t, _) in waiting.items()
        }
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for name, whole in wholes.items():
                whole.copy_(waiting[name][0], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.coming[i] = (event, {n: w[:, : waiting[n][1]] for n, w in wholes.items()})

    def _buffer(self, i: int, name: str, tensor: Tensor) -> Tensor:
        """Pinned memory of that shape, kept for the run: a graph holds its address."""
        key = (i, name)
        if key not in self.buffers:
            numel = tensor.numel() // tensor.shape[0] * self.tokens
            self.buffers[key] = torch.empty(numel, dtype=tensor.dtype, pin_memory=True)
        return self.buffers[key][: tensor.numel()].view(tensor.shape)


def _whole_rows(part: Tensor) -> Tensor:
    """A matrix with what lies unused between its rows: one piece of memory. Other parts as is."""
    if part.dim() != 2 or part.is_contiguous():
        return part
    return part.as_strided((part.shape[0], part.stride(0)), (part.stride(0), 1))


def _parts(saved: Saved) -> dict[str, Tensor]:
    whole: Attended | None = saved.attended
    tensors = (
        saved.x_TD, saved.qkv, None if whole is None else whole.out_TNH, saved.mid_TD, saved.gate_up
    )  # fmt: skip
    return {n: t for n, t in zip(PARTS, tensors, strict=True) if t is not None}
