"""Store activations in pinned host memory between a layer's forward and backward pass.

Copies run on a separate stream: to the host during the next layer's forward pass, back to the GPU
during the next layer's backward pass. On a CPU all memory is host memory, so nothing is copied.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minisft.explicit.block import Saved
from minisft.explicit.policy import Policy

# Part of a policy -> field of `Saved`. "attended" is missing: only its output is copied.
_FIELDS = {"x": "x_TD", "qkv": "qkv", "mid": "mid_TD", "gate_up": "gate_up"}


@dataclass
class Host:
    """Pinned host buffers, one per layer and part, and the copies in flight."""

    device: torch.device
    tokens: int  # of the largest micro-batch: rows of every buffer
    buffers: dict[tuple, Tensor] = field(default_factory=dict)
    stream: torch.cuda.Stream | None = None
    copies_out: list[tuple] = field(default_factory=list)  # (event, source tensors) in flight
    # layer -> {part: (pinned rows, number of columns of the part)}
    stored: dict[int, dict[str, tuple[Tensor, int]]] = field(default_factory=dict)
    copies_in: dict[int, tuple] = field(default_factory=dict)  # layer -> (event, {part: tensor})

    def store(self, i: int, saved: Saved, policy: Policy) -> Saved:
        """Start copying layer i's host parts; return saved with only the policy's GPU parts."""
        if self.device.type == "cuda" and policy.host:
            assert saved.attended is not None
            parts = {part: getattr(saved, field) for part, field in _FIELDS.items()}
            parts["attended"] = saved.attended.out_TNH
            self._copy_out(i, {name: parts[name] for name in sorted(policy.host)})
            stays = policy.gpu
        else:
            stays = policy.gpu | policy.host
        attended = saved.attended
        if attended is not None and "attended" not in stays:
            on_host = "attended" in policy.host
            attended = attended._replace(out_TNH=None) if on_host else None  # pyright: ignore
        dropped = {field: None for part, field in _FIELDS.items() if part not in stays}
        return saved._replace(attended=attended, **dropped)  # pyright: ignore

    def start_fetching(self, i: int) -> None:
        """Wait for all copies to the host, then start copying layer i's parts back to the GPU."""
        for event, _ in self.copies_out:
            torch.cuda.current_stream().wait_event(event)
        self.copies_out.clear()
        self._copy_in(i)

    def fetch(self, i: int, saved: Saved | None) -> Saved:
        """Return layer i's parts on the GPU; start copying layer i - 1's parts back to the GPU."""
        assert saved is not None
        event, parts = self.copies_in.pop(i, (None, {}))
        # Start copying layer i - 1 now, so that layer i's backward pass hides the copy.
        self._copy_in(i - 1)
        if event is None:
            return saved
        torch.cuda.current_stream().wait_event(event)
        saved = saved._replace(**{_FIELDS[k]: v for k, v in parts.items() if k in _FIELDS})
        if "attended" in parts and saved.attended is not None:
            saved = saved._replace(attended=saved.attended._replace(out_TNH=parts["attended"]))
        return saved

    def _copy_out(self, i: int, parts: dict[str, Tensor]) -> None:
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream()
        # Wait for the previous layer's copies: tensors being copied still occupy GPU memory.
        while self.copies_out:
            event, _ = self.copies_out.pop(0)
            current.wait_event(event)
        self.stream.wait_stream(current)
        stored = {}
        with torch.cuda.stream(self.stream):
            for name, tensor in parts.items():
                rows = _full_rows(tensor)
                # Allocate once, for the largest micro-batch: captured graphs contain the address.
                if (i, name) not in self.buffers:
                    numel = rows.numel() // rows.shape[0] * self.tokens
                    buffer = torch.empty(numel, dtype=rows.dtype, pin_memory=True)
                    self.buffers[i, name] = buffer
                pinned = self.buffers[i, name][: rows.numel()].view(rows.shape)
                stored[name] = pinned, tensor.shape[1]
                pinned.copy_(rows, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.stored[i] = stored
        # Reference the tensors until the event: freed memory could be overwritten during the copy.
        self.copies_out.append((event, parts))

    def _copy_in(self, i: int) -> None:
        if i < 0 or i not in self.stored:
            return
        assert self.stream is not None
        stored = self.stored.pop(i)
        # Allocate on the compute stream, which also reads and frees these tensors.
        tensors = {
            name: torch.empty(pinned.shape, dtype=pinned.dtype, device=self.device)
            for name, (pinned, _) in stored.items()
        }
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for name, tensor in tensors.items():
                tensor.copy_(stored[name][0], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.copies_in[i] = (event, {n: t[:, : stored[n][1]] for n, t in tensors.items()})


def _full_rows(part: Tensor) -> Tensor:
    """Return a view of a matrix that includes the padding of its rows; other tensors unchanged."""
    if part.dim() != 2 or part.is_contiguous():
        return part
    # A matrix with its padding is contiguous, so that one plain memory copy is enough.
    return part.as_strided((part.shape[0], part.stride(0)), (part.stride(0), 1))
