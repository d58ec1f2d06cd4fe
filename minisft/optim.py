"""Optimizers on flat buffers: gradient clipping, then one of six update rules.

AdamW, SGD and Lion are defined here; the 8-bit rules and Adafactor, in `minisft.variants`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.kernels.adamw import AdamWStep, adamw_
from minisft.lora import Flat, ParamGroup, viewed
from minisft.variants.adafactor import adafactor_, moment_shapes
from minisft.variants.eight_bit import Moment, eight_bit_, import_bitsandbytes, zero_moment

Moments = dict[str, Tensor]  # the optimizer's state, under the names used in checkpoints


class Hyper(NamedTuple):
    """Optimizer settings of one parameter group in one step; the config has betas and epsilon."""

    step: int  # from 1
    learning_rate: float  # after the schedule
    weight_decay: float  # 0 in groups that are not decayed
    norm: Tensor | None = None  # gradient norm that the rule has still to clip by


def clip_(grads: Tensor, norm: Tensor, max_norm: float) -> None:
    """Clip the gradient in place to max_norm, as torch.nn.utils.clip_grad_norm_ does.

    norm: L2 norm of grads, [] float32. max_norm 0 disables clipping.
    """
    if max_norm > 0:
        # A branch on the norm would wait for the device; a clamped factor does not.
        grads.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


def check_optimizer(optim: str, device: torch.device) -> None:
    """Raise UserError if the optimizer cannot run on this device or its package is missing."""
    if optim.startswith("paged_") and device.type != "cuda":
        raise UserError(
            f"--optim {optim} moves its state between a CUDA GPU and the host, but the device is "
            f"{device}; use --optim {optim.removeprefix('paged_')}"
        )
    if optim.endswith("_8bit"):
        import_bitsandbytes()


def init_moments(trainable: Flat, groups: list[ParamGroup], optim: str) -> Moments:
    """Return the state of an optimizer before its first step, on the buffer's device.

    adamw: exp_avg, exp_avg_sq, float32 [n]. 8-bit rules: exp_avg.i and (not lion) exp_avg_sq.i for
    group i; if it is eight_bit, codes, and scales in ….absmax. adafactor: per tensor. sgd: none.
    """
    buffer = trainable.buffer
    if optim == "adamw":
        return {"exp_avg": torch.zeros_like(buffer), "exp_avg_sq": torch.zeros_like(buffer)}
    if optim == "sgd":
        return {}
    if optim == "adafactor":
        return {
            f"{kind}.{name}": view.new_zeros(shape)
            for name, view in trainable.views.items()
            for kind, shape in moment_shapes(view.shape).items()
        }
    moments: Moments = {}
    for i, group in enumerate(groups):
        n = group.stop - group.start
        for kind in _kinds(optim):
            if group.eight_bit:
                codes, scales = zero_moment(n, buffer.device, optim.startswith("paged_"))
                moments |= {f"{kind}.{i}": codes, f"{kind}.{i}.absmax": scales}
            else:
                moments[f"{kind}.{i}"] = torch.zeros(n, device=buffer.device)
    return moments


def _kinds(optim: str) -> tuple[str, ...]:
    return ("exp_avg",) if optim == "lion_8bit" else ("exp_avg", "exp_avg_sq")


def update_(
    trainable: Flat,
    grads: Tensor,
    moments: Moments,
    groups: list[ParamGroup],
    *,
    norm: Tensor,
    step: int,
    config: TrainConfig,
) -> None:
    """Update the parameters (trainable.buffer) and their moments in place by one optimizer step.

    grads: float32 [n], may be overwritten. norm: [] float32, their L2 norm, for clipping. groups:
    with the learning rates of this step. step counts from 1. Weight decay is decoupled.
    """
    optim = config.optim
    # On a GPU the AdamW kernel clips the gradient while reading it, which saves a pass over it.
    clips_itself = optim == "adamw" and grads.is_cuda and config.max_grad_norm > 0
    if not clips_itself:
        clip_(grads, norm, config.max_grad_norm)
    if optim == "adafactor":
        _adafactor_by_tensor_(trainable, grads, moments, groups, step, config)
        return
    for i, group in enumerate(groups):
        part = slice(group.start, group.stop)
        p, g = trainable.buffer[part], grads[part]
        lr, decay = group.learning_rate, config.weight_decay if group.decayed else 0.0
        hyper = Hyper(step, lr, decay, norm if clips_itself else None)
        if optim == "sgd":
            p.sub_(g.add(p, alpha=decay) if decay else g, alpha=lr)
        elif optim == "adamw":
            _adamw_(p, g, moments["exp_avg"][part], moments["exp_avg_sq"][part], hyper, config)
        elif group.eight_bit:
            own = [Moment(moments[f"{k}.{i}"], moments[f"{k}.{i}.absmax"]) for k in _kinds(optim)]
            eight_bit_(p, g, own, config, step, lr, decay)
        elif optim == "lion_8bit":
            _lion_(p, g, moments[f"exp_avg.{i}"], hyper, config)
        else:
            _adamw_(p, g, moments[f"exp_avg.{i}"], moments[f"exp_avg_sq.{i}"], hyper, config)
    if optim.startswith("paged_"):
        # The driver moves paged state between GPU and host, so wait before the host can read it.
        torch.cuda.synchronize(grads.device)


def _adamw_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Hyper, c: TrainConfig) -> None:
    """Update p, m and v in place by one AdamW step (arXiv:1711.05101); all are float32 [n]."""
    step, lr, decay, norm = hyper
    if p.is_cuda:
        betas = (c.adam_beta1, c.adam_beta2)
        settings = AdamWStep(step, lr, *betas, c.adam_epsilon, decay, c.max_grad_norm)
        adamw_(p, g, m, v, settings, norm=norm)
        return
    # Pass step - 1 because torch's adamw increments the step.
    adamw(
        [p], [g], [m], [v], [], [torch.full((), float(step - 1))],
        fused=True, amsgrad=False, beta1=c.adam_beta1, beta2=c.adam_beta2, lr=lr,
        weight_decay=decay, eps=c.adam_epsilon, maximize=False,
    )  # fmt: skip


def _lion_(p: Tensor, g: Tensor, m: Tensor, hyper: Hyper, c: TrainConfig) -> None:
    """Update p and m in place by one Lion step (arXiv:2302.06675); p, g and m are float32 [n]."""
    direction = m.lerp(g, 1 - c.adam_beta1).sign_()
    p.mul_(1 - hyper.learning_rate * hyper.weight_decay).sub_(direction, alpha=hyper.learning_rate)
    m.lerp_(g, 1 - c.adam_beta2)


def _adafactor_by_tensor_(
    flat: Flat, grads: Tensor, moments: Moments, groups: list[ParamGroup], step: int, c: TrainConfig
) -> None:
    # A group may span several tensors, but Adafactor's row and column means are of one matrix.
    start, g_views = 0, viewed(grads, flat.shapes).views
    for name, p in flat.views.items():
        group = next(group for group in groups if group.start <= start < group.stop)
        decay = c.weight_decay if group.decayed else 0.0
        own = {kind: moments[f"{kind}.{name}"] for kind in moment_shapes(p.shape)}
        adafactor_(p, g_views[name], own, step, group.learning_rate, decay)
        start += p.numel()
