"""Ways to the gradients of one call, all of which must give the same, and its second derivative."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fuzz.tensors import LAYOUTS, laid_out, normal
from tsbn_kernels import recompute_outputs

Function = Callable[..., Tensor]
WAYS = ("backward", "backward", "backward", "checkpoint", "recompute", "autocast", "batched")
TRANSFORMS = ("pulled", "ensemble")  # of torch.func: in half precision they round more than once


def upstream(y: Tensor, rng: random.Random) -> Tensor:
    """The gradient of an output, in any layout."""
    return laid_out(rng, normal(rng, tuple(y.shape)).to(y.dtype), rng.choice(LAYOUTS))


def differentiate(
    way: str, function: Function, tensors: Sequence[Tensor], rng: random.Random
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """``y = function(*tensors)``, its upstream gradient and those of the tensors."""
    if way == "pulled":
        y, pull = torch.func.vjp(function, *(tensor.detach() for tensor in tensors))
        dy = upstream(y, rng)
        return y, dy, pull(dy)
    if way == "ensemble":  # of two, of which the other one has no gradient
        pairs = [torch.stack([tensor.detach() + 1, tensor.detach()]).requires_grad_() for tensor in tensors]
        y = torch.func.vmap(function)(*pairs)[1]
        dy = upstream(y, rng)
        both = torch.autograd.grad(y, pairs, dy)
        return y, dy, [gradient[1] for gradient in both]
    if way == "checkpoint":
        y = checkpoint(function, *tensors, use_reentrant=False)
    elif way == "recompute":
        with recompute_outputs():
            y = function(*tensors)
            dy = upstream(y, rng).contiguous().requires_grad_()
            product = y * dy  # saves y, whose gradient of dy is y computed again
        again, *gradients = torch.autograd.grad(product, [dy, *tensors], torch.ones_like(product))
        return again, dy.detach(), gradients
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            y = function(*tensors)
    dy = upstream(y, rng)
    if way == "batched":
        both = torch.autograd.grad(y, tensors, torch.stack([dy + 1, dy]), is_grads_batched=True)
        return y, dy, [gradient[1] for gradient in both]
    return y, dy, torch.autograd.grad(y, tensors, dy)


def second_derivatives(
    function: Function, tensors: Sequence[Tensor], dy: Tensor, directions: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Gradients of ``sum(direction * gradient)``, of the tensors and of dy."""
    dy = dy.detach().clone().requires_grad_()
    gradients = torch.autograd.grad(function(*tensors), tensors, dy, create_graph=True)
    total = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    return torch.autograd.grad(total, [*tensors, dy], allow_unused=True, materialize_grads=True)
