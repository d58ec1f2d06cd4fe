"""Activations in pinned host memory between a layer's forward and backward pass.

Copies run on a stream of their own: out while the next layer computes forward, back while the layer
above computes backward. On a CPU the host is the same memory, and nothing is copied.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minisft.explicit.block import Saved
from minisft.explicit.policy import Policy

# Part of a policy -> field of `Saved`; of "attended", only the output is ever copied.
_FIELDS = {"x": "x_TD", "qkv": "qkv", "mid": "mid_TD", "gate_up": "gate_up"}


@dataclass
class Host:
    """Pinned buffers by (layer, part), and the copies in flight."""

    device: torch.device
    tokens: int  # of the largest micro-batch: rows of every buffer
    buffers: dict[tuple, Tensor] = field(default_factory=dict)
    stream: torch.cuda.Stream | None = None
    copies_out: list[tuple] = field(default_factory=list)  # (event, source tensors) in flight
    # layer -> {part: (its pinned rows, width of the part in columns)}
    stored: dict[int, dict[str, tuple[Tensor, int]]] = field(default_factory=dict)
    copies_in: dict[int, tuple] = field(default_factory=dict)  # layer -> (event, {part: tensor})

    def store(self, i: int, saved: Saved, policy: Policy) -> Saved:
        """Drop what layer i's policy does not keep on the GPU; start copying the host's parts."""
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
        """Wait for all copies to the host, then start copying layer i's parts back."""
        for event, _ in self.copies_out:
            torch.cuda.current_stream().wait_event(event)
        self.copies_out.clear()
        self._copy_in(i)

    def fetch(self, i: int, saved: Saved | None) -> Saved:
        """Return layer i's parts, all on the GPU again; start copying layer i - 1's back."""
        assert saved is not None
        event, parts = self.copies_in.pop(i, (None, {}))
        # Asked for before layer i computes, so that its backward pass hides the copy.
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
        # At most one layer's copies lag behind: until they are done its tensors are on the GPU too.
        while self.copies_out:
            event, _ = self.copies_out.pop(0)
            current.wait_event(event)
        self.stream.wait_stream(current)
        stored = {}
        with torch.cuda.stream(self.stream):
            for name, tensor in parts.items():
                rows = _full_rows(tensor)
                # Never reallocated, and sized for the largest micro-batch: graphs hold its address.
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
        # The tensors are held until the event: freed earlier, their memory could be overwritten.
        self.copies_out.append((event, parts))

    def _copy_in(self, i: int) -> None:
        if i < 0 or i not in self.stored:
            return
        assert self.stream is not None
        stored = self.stored.pop(i)
        # Allocated on the compute stream, which reads and frees them.
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
    """Widen a matrix by the padding between its rows; other tensors are returned as they are."""
    if part.dim() != 2 or part.is_contiguous():
        return part
    # With its padding the matrix is one contiguous piece of memory, so it is one plain copy.
    return part.as_strided((part.shape[0], part.stride(0)), (part.stride(0), 1))
