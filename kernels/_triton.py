"""Launch helpers shared by all Triton ops: device limits, launch options, padding, jit helpers.

Import this from kernel modules only: an op.py must load where triton is not installed.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def materialized_once(x, PIN: tl.constexpr):
    """Return x; with PIN the compiler cannot rematerialise it.

    Triton computes x once per layout that its users want (a store and a product, say). After an
    opaque `mov` it converts the layout instead, which is cheaper.
    """
    if PIN:
        # 16-bit values go through the 32-bit register in pairs
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        # is_pure=False: a pure statement would be copied together with the arithmetic
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK
        )
    return x


@triton.jit
def wait_at_the_end():
    """Wait for the preceding kernel in the last program only. The grid has one dimension.

    For a kernel that shares no memory with its predecessor. Without the wait this launch could end
    first, and a kernel that waits for this one would start while the predecessor still runs.
    """
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.extra.cuda.gdc_wait()


@functools.cache
def pdl_option(device: torch.device) -> dict[str, bool]:
    """Return the launch option for programmatic dependent launch (PDL), or {} if unsupported.

    A kernel launched with it starts while its predecessor still runs. It must call gdc_wait before
    it reads what the predecessor writes, and before it writes at all. Exception: if the predecessor
    called gdc_wait before it let this kernel start, only the predecessor is still running; memory
    that the predecessor neither reads nor writes is then free to use (see `wait_at_the_end`).
    """
    if device.type != "cuda" or torch.version.hip:
        return {}
    # gdc_wait and gdc_launch_dependents are instructions of compute capability 9.0 and later
    return {"launch_pdl": True} if torch.cuda.get_device_capability(device) >= (9, 0) else {}


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; 2 without a GPU, for the interpreter."""
    if device.type != "cuda":
        # two: the interpreter then tests how persistent kernels share the work
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory available to one program; an H100's without a GPU."""
    if device.type != "cuda":
        return 232448
    properties = torch.cuda.get_device_properties(device)
    # torch does not expose this property on AMD GPUs, which have 64 KiB
    return getattr(properties, "shared_memory_per_block_optin", 64 << 10)


def stages(device: torch.device, rank: int) -> int:
    """Return the number of pipeline stages whose tiles fit into shared memory at a padded rank.

    Shared memory: 227 KiB on an H100, 163 on an A100, 99 on desktop GPUs (compute capability 8.6,
    8.9, 12.0).
    """
    if shared_memory(device) >= 160 << 10:
        return 3
    # limits read from the kernels compiled for 8.0, 8.9, 9.0 and 12.0
    return 2 if rank <= 64 and shared_memory(device) >= 99 << 10 else 1


def padded_rank(rank: int) -> int:
    """Return the width of the tensor-core product that holds the rank: a power of two, >= 16."""
    # tl.dot wants an inner dimension of at least 16 in half precision
    return max(16, triton.next_power_of_2(max(1, rank)))


def rows_per_split(num_rows: int, splits: int) -> int:
    """Return the rows of each of `splits` parts that cover num_rows; a multiple of 64."""
    # as `split_rows` of low_rank/reference.py: kernel and reference add the same partial sums
    return triton.cdiv(triton.cdiv(num_rows, splits), 64) * 64
