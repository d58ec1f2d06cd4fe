"""CUDA graphs: one function of a `StaticBatch`, captured once per bucket and replayed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from minisft.explicit.buckets import StaticBatch

Function = Callable[[StaticBatch], None]
# Batches of further buckets are launched kernel by kernel.
_MAX_GRAPHS = 32


@dataclass
class Graphs:
    """The graphs of one function, by bucket."""

    device: torch.device
    inputs: dict[tuple, StaticBatch] = field(default_factory=dict)  # what a graph reads
    captured: dict[tuple, torch.cuda.CUDAGraph] = field(default_factory=dict)
    # One stream for all work: cuBLAS allocates a workspace per stream.
    stream: torch.cuda.Stream | None = None
    # All graphs share one memory pool, as only one of them runs at a time.
    pool: Any = None

    def run_(self, function: Function, batch: StaticBatch) -> None:
        """Call function(batch): by kernels the first time its bucket is seen, then as a graph.

        batch: on the CPU. The function must neither read back from the device nor depend on Python
        values that the bucket does not fix. On a CPU this is a plain call.
        """
        if self.device.type != "cuda":
            function(batch)
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
            self.pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            key = batch.key()
            if key not in self.inputs:
                # Not captured yet: Triton compiles and cuBLAS allocates during this first call.
                inputs = batch.to(self.device)
                if len(self.inputs) < _MAX_GRAPHS:
                    self.inputs[key] = inputs
                function(inputs)
            else:
                batch.copy_into(self.inputs[key])
                if key not in self.captured:
                    self.captured[key] = self._capture(function, self.inputs[key])
                self.captured[key].replay()
        current.wait_stream(self.stream)

    def _capture(self, function: Function, inputs: StaticBatch) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        # The caching allocator's free blocks are of no use to the graphs' own pool: release them.
        torch.cuda.empty_cache()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, pool=self.pool, stream=self.stream):
            function(inputs)
        return captured
