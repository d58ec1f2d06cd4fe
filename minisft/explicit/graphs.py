"""Capture a function of a `StaticBatch` as one CUDA graph per bucket, and replay the graphs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from minisft.explicit.buckets import StaticBatch

Function = Callable[[StaticBatch], None]
# If there are more buckets than this, the others run without a graph, kernel by kernel.
_MAX_GRAPHS = 32


@dataclass
class Graphs:
    """CUDA graphs of one function, one per bucket."""

    device: torch.device
    inputs: dict[tuple, StaticBatch] = field(default_factory=dict)  # what a graph reads
    captured: dict[tuple, torch.cuda.CUDAGraph] = field(default_factory=dict)
    # All work uses one stream, because cuBLAS allocates a workspace per stream.
    stream: torch.cuda.Stream | None = None
    # All graphs share one memory pool, because only one graph runs at a time.
    pool: Any = None

    def run_(self, function: Function, batch: StaticBatch) -> None:
        """Run function(batch): the first batch of a bucket eagerly, later batches as a CUDA graph.

        batch: on the CPU. The function must not read values from the device, nor depend on Python
        values outside the bucket (`StaticBatch.key`). For a model on the CPU there is no graph.
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
                # Do not capture the first call: Triton compiles and cuBLAS allocates during it.
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
        # Release the caching allocator's free blocks, which the graphs' memory pool cannot use.
        torch.cuda.empty_cache()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, pool=self.pool, stream=self.stream):
            function(inputs)
        return captured
