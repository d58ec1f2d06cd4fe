"""Optimizers over flat buffers, written out: clipping, then one of six update rules.

AdamW is one pass over the buffers of each group, on a GPU with clipping in it. The 8-bit rules keep
their moments as codes with a scale per 256 entries and are bitsandbytes' kernels, called on slices
of the flat buffer. Norms, biases, embeddings and heads keep float32 moments under every rule.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.kernels.adamw import AdamWStep, adamw_, global_norm
from minisft.lora import Flat, ParamGroup

Moments = dict[str, Tensor]  # the optimizer's state under the names that a checkpoint gives it

_BLOCK = 256  # entries per scale of 8-bit moments


def clip_(grads: Tensor, norm: Tensor, max_norm: float) -> None:
    """Scale the gradient so that its norm is at most max_norm; max_norm 0 leaves it as it is.

    The factor is max_norm / (norm + 1e-6), at most 1, as torch.nn.utils.clip_grad_norm_ has it.
    """
    if max_norm > 0:
        grads.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


def check_optimizer(optim: str, device: torch.device) -> None:
    """UserError where the rule cannot run on this device, or its package is missing."""
    if optim.startswith("paged_") and device.type != "cuda":
        raise UserError(
            f"--optim {optim} moves its state between a CUDA GPU and the host, but the device is "
            f"{device}; use --optim {optim.removeprefix('paged_')}"
        )
    if optim.endswith("_8bit"):
        _bitsandbytes()


def init_moments(trainable: Flat, groups: list[ParamGroup], optim: str) -> Moments:
    """The state of an optimizer before its first step, on the device of the buffer.

    adamw: exp_avg and exp_avg_sq, float32 [n]. 8-bit rules: per group, named after its place in the
    list, codes uint8 and scales float32, or float32 moments where the group keeps them. adafactor:
    per tensor, means over its rows and columns. sgd: nothing.
    """
    buffer = trainable.buffer
    if optim == "adamw":
        return {"exp_avg": torch.zeros_like(buffer), "exp_avg_sq": torch.zeros_like(buffer)}
    if optim == "sgd":
        return {}
    if optim == "adafactor":
        return _adafactor_moments(trainable)
    paged = optim.startswith("paged_") and buffer.is_cuda
    moments: Moments = {}
    for i, group in enumerate(groups):
        kinds = ("exp_avg",) if optim == "lion_8bit" else ("exp_avg", "exp_avg_sq")
        for kind in kinds:
            moments |= _group_moment(f"{kind}.{i}", group, buffer.device, paged)
    return moments


def update_(
    trainable: Flat,
    grads: Tensor,
    moments: Moments,
    groups: list[ParamGroup],
    *,
    norm: Tensor,
    step: int,
    factor: float,
    config: TrainConfig,
) -> None:
    """One optimizer step in place: parameters float32 [n] and moments.

    norm: of grads, which are clipped by it, in place or as they are read. step counts from 1.
    factor: the schedule's, on the learning rate of each group. Weight decay is decoupled and scaled
    by the rate, in the groups that are decayed.
    """
    params, optim = trainable.buffer, config.optim
    clips_itself = optim == "adamw" and grads.is_cuda and config.max_grad_norm > 0
    if not clips_itself:
        clip_(grads, norm, config.max_grad_norm)
    if optim == "adafactor":
        _adafactor_(trainable, grads, moments, groups, step, factor, config.weight_decay)
        return
    for i, group in enumerate(groups):
        part = slice(group.start, group.stop)
        lr = group.learning_rate * factor
        decay = config.weight_decay if group.decayed else 0.0
        p, g = params[part], grads[part]
        if optim == "sgd":
            p.sub_(g.add(p, alpha=decay) if decay else g, alpha=lr)
        elif optim == "adamw":
            m, v = moments["exp_avg"][part], moments["exp_avg_sq"][part]
            _adamw_(p, g, m, v, step, lr, decay, config, norm if clips_itself else None)
        elif not group.eight_bit and optim == "lion_8bit":
            _lion_(p, g, moments[f"exp_avg.{i}"], lr, decay, config)
        elif not group.eight_bit:
            m, v = moments[f"exp_avg.{i}"], moments[f"exp_avg_sq.{i}"]
            _adamw_(p, g, m, v, step, lr, decay, config)
        else:
            _eight_bit_(_eight_bit(params.device), optim, p, g, moments, i, step, lr, decay, config)
    if optim.startswith("paged_"):
        torch.cuda.synchronize(params.device)  # the driver moves paged state behind our back


def _adamw_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    decay: float,
    c: TrainConfig,
    clip: Tensor | None = None,
) -> None:
    """AdamW (arXiv:1711.05101), one pass over p, g, m, v: float32 [n] each.

    clip: the norm that g is yet to be clipped by, on a GPU alone.
    """
    if p.is_cuda:
        betas = (c.adam_beta1, c.adam_beta2)
        settings = AdamWStep(step, lr, *betas, c.adam_epsilon, decay, c.max_grad_norm)
        adamw_(p, g, m, v, settings, norm=clip)
        return
    count = torch.full((), float(step - 1))  # adamw counts on
    adamw(
        [p], [g], [m], [v], [], [count],
        fused=True, amsgrad=False, beta1=c.adam_beta1, beta2=c.adam_beta2, lr=lr,
        weight_decay=decay, eps=c.adam_epsilon, maximize=False,
    )  # fmt: skip


def _lion_(p: Tensor, g: Tensor, m: Tensor, lr: float, decay: float, c: TrainConfig) -> None:
    """Lion (arXiv:2302.06675): a step of lr along the sign of the interpolated momentum."""
    direction = m.lerp(g, 1 - c.adam_beta1).sign_()
    p.mul_(1 - lr * decay).sub_(direction, alpha=lr)
    m.lerp_(g, 1 - c.adam_beta2)


# ------------------------------------------------------------------------------------------- 8 bit


def _group_moment(name: str, group: ParamGroup, device: torch.device, paged: bool) -> Moments:
    n = group.stop - group.start
    if not group.eight_bit:
        return {name: torch.zeros(n, device=device)}
    codes = torch.zeros(n, dtype=torch.uint8, device=device)
    if paged:
        functional = _bitsandbytes()
        codes = functional.get_paged(n, dtype=torch.uint8, device=codes.device)
        functional.fill(codes, 0)
    return {name: codes, f"{name}.absmax": torch.zeros(-(-n // _BLOCK), device=device)}


def _bitsandbytes() -> Any:
    """bitsandbytes' functions; UserError where they cannot be imported."""
    # On a CPU it looks for PyPI's package `kernels`, finds this project's, and warns of it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except (ImportError, OSError, RuntimeError) as e:
        raise UserError(
            f"--optim: the 8-bit optimizers need bitsandbytes, which cannot be imported ({e}); "
            "install it, or use --optim adamw"
        ) from None
    return functional


@functools.cache
def _eight_bit(device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """bitsandbytes' functions, and its code tables for signed and for unsigned values."""
    functional = _bitsandbytes()
    signed = functional.create_dynamic_map(signed=True).to(device)
    unsigned = functional.create_dynamic_map(signed=False).to(device)
    return functional, signed, unsigned


def _eight_bit_(
    eight_bit: tuple[Any, Tensor, Tensor],
    optim: str,
    p: Tensor,
    g: Tensor,
    moments: Moments,
    i: int,
    step: int,
    lr: float,
    decay: float,
    config: TrainConfig,
) -> None:
    functional, signed, unsigned = eight_bit
    rule = "lion" if optim == "lion_8bit" else "adam"
    m, m_scale = moments[f"exp_avg.{i}"], moments[f"exp_avg.{i}.absmax"]
    v, v_scale = moments.get(f"exp_avg_sq.{i}"), moments.get(f"exp_avg_sq.{i}.absmax")
    functional.optimizer_update_8bit_blockwise(
        rule, g, p, m, v, config.adam_beta1, config.adam_beta2, 0.0, 0.0, config.adam_epsilon,
        step, lr, signed, None if v is None else unsigned, m_scale, v_scale, weight_decay=decay,
    )  # fmt: skip


# --------------------------------------------------------------------------------------- Adafactor


def _adafactor_moments(trainable: Flat) -> Moments:
    moments: Moments = {}
    for name, view in trainable.views.items():
        if view.dim() == 2:
            moments[f"exp_avg_sq_row.{name}"] = view.new_zeros(view.shape[0])
            moments[f"exp_avg_sq_col.{name}"] = view.new_zeros(view.shape[1])
        else:
            moments[f"exp_avg_sq.{name}"] = torch.zeros_like(view)
    return moments


def _adafactor_(
    trainable: Flat,
    grads: Tensor,
    moments: Moments,
    groups: list[ParamGroup],
    step: int,
    factor: float,
    weight_decay: float,
) -> None:
    """Adafactor (arXiv:1804.04235) with the run's own learning rate and no first moment.

    The mean square of a matrix is kept as its means over rows and columns; decay 1 - t^-0.8, an
    update whose root mean square is above 1 is scaled down to 1.
    """
    beta2 = 1.0 - step**-0.8
    start, index = 0, 0
    for name, p in trainable.views.items():
        while start >= groups[index].stop:
            index += 1
        g = grads[start : start + p.numel()].view(p.shape)
        start += p.numel()
        square = g.square().add_(1e-30)
        if p.dim() == 2:
            row, col = moments[f"exp_avg_sq_row.{name}"], moments[f"exp_avg_sq_col.{name}"]
            row.lerp_(square.mean(1), 1 - beta2)
            col.lerp_(square.mean(0), 1 - beta2)
            step_ = g * (row / row.mean()).rsqrt().unsqueeze(1) * col.rsqrt()
        else:
            mean = moments[f"exp_avg_sq.{name}"].lerp_(square, 1 - beta2)
            step_ = g * mean.rsqrt()
        step_.div_((global_norm(step_.flatten()) / math.sqrt(p.numel())).clamp(min=1.0))
        lr = groups[index].learning_rate * factor
        p.mul_(1 - lr * (weight_decay if groups[index].decayed else 0.0)).sub_(step_, alpha=lr)
