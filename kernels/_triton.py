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
    """Return x unchanged; PIN stops Triton from computing x more than once.

    A store and a tl.dot need x in different layouts, and Triton would compute x for each of them.
    After an opaque `mov` Triton converts the layout instead, which is cheaper.
    """
    if PIN:
        # the `mov` is 32 bits wide: one `mov` copies two 16-bit values
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        # is_pure=False: Triton would repeat a pure `mov`, and what computes x, at every use
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK
        )
    return x


@triton.jit
def wait_at_the_end():
    """Call gdc_wait in the last program, so that this launch ends after the preceding kernel.

    For a kernel with a 1-D grid that shares no memory with its predecessor. Without the wait, this
    launch could end first, and the next kernel would start while the predecessor still runs.
    """
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.extra.cuda.gdc_wait()


@functools.cache
def pdl_option(device: torch.device) -> dict[str, bool]:
    """Return the launch option for programmatic dependent launch (PDL), or {} if unsupported.

    A kernel launched with PDL starts while its predecessor still runs. The kernel must call
    gdc_wait before it reads what the predecessor writes, and before its first store. Exception: if
    the predecessor calls gdc_wait before gdc_launch_dependents, all kernels before it have ended;
    memory that the predecessor does not use is then free to write (see `wait_at_the_end`).
    """
    if device.type != "cuda" or torch.version.hip:
        return {}
    # gdc_wait and gdc_launch_dependents are instructions of compute capability 9.0 and later
    return {"launch_pdl": True} if torch.cuda.get_device_capability(device) >= (9, 0) else {}


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the GPU's number of streaming multiprocessors; 2 on a CPU (Triton's interpreter)."""
    if device.type != "cuda":
        # more than one, so that CPU tests cover how persistent kernels divide the work
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program can use; on a CPU, those of an H100."""
    if device.type != "cuda":
        return 232448
    properties = torch.cuda.get_device_properties(device)
    # torch does not expose this property on AMD GPUs, which have 64 KiB
    return getattr(properties, "shared_memory_per_block_optin", 64 << 10)


def stages(device: torch.device, rank: int) -> int:
    """Return how many pipeline stages of tiles fit into shared memory at this padded rank.

    Shared memory: 227 KiB on an H100, 163 on an A100, 99 on desktop GPUs (compute capability 8.6,
    8.9, 12.0).
    """
    if shared_memory(device) >= 160 << 10:
        return 3
    # the limits come from the kernels compiled for 8.0, 8.9, 9.0 and 12.0
    return 2 if rank <= 64 and shared_memory(device) >= 99 << 10 else 1


def padded_rank(rank: int) -> int:
    """Return the rank rounded up to a width that tl.dot accepts: a power of two, at least 16."""
    # tl.dot requires an inner dimension of at least 16 in half precision
    return max(16, triton.next_power_of_2(max(1, rank)))


def rows_per_split(num_rows: int, splits: int) -> int:
    """Return the rows per split if num_rows are divided into `splits`; a multiple of 64."""
    # `split_rows` of low_rank/reference.py must agree: both then compute the same partial sums
    return triton.cdiv(triton.cdiv(num_rows, splits), 64) * 64
