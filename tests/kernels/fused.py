"""What the tests of the fused kernels share: device, dtypes, random inputs, the 3x rule.

Triton's interpreter rounds bfloat16 its own way: on a CPU the kernels run in float32 and float16.
"""

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if GPU else (torch.float32, torch.float16)


def rand(*shape, dtype=torch.float32, seed=0, scale=1.0):
    """Normal numbers of that dtype; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def poisoned(*shape, dtype=torch.float32):
    """NaN everywhere: what a kernel leaves unwritten is found."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def wide(x, extra=5):
    """The same rows, strided: as columns of a wider matrix whose other columns are NaN."""
    out = poisoned(x.shape[0], x.shape[1] + extra, dtype=x.dtype)
    out[:, : x.shape[1]] = x
    return out[:, : x.shape[1]]


def close(kernel, reference, truth, what=""):
    """The kernel is at most 3 times as far from the truth as plain torch in the same dtype.

    And plain torch is near itself, so that a wrong reference allows nothing.
    """
    truth = truth.double()
    error, own = (kernel.double() - truth).norm(), (reference.double() - truth).norm()
    limit = 0.02 * truth.norm() + 1e-5
    assert own <= limit, f"{what}: the reference itself is off by {own:.3g} of {truth.norm():.3g}"
    allowed = 3 * own + 1e-6 * truth.norm() + 1e-9
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
