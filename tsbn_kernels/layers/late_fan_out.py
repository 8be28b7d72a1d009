"""Fan-out as late as the gates allow: after the activation and the pooling, or in the weights of a convolution."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import TABLE, Name
from tsbn_kernels.definition.plain import is_plain, leaf_call
from tsbn_kernels.functional import task_batch_norm
from tsbn_kernels.layers import concurrent
from tsbn_kernels.layers.batch_norm import STATISTICS, FusedTSigmaBN, FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d
from tsbn_kernels.layers.task_specific import tell_gates
from tsbn_kernels.operator import checks, runs

HOMOGENEOUS = (None, *(name for name, row in TABLE.items() if row.homogeneous))
# pool(k * x) = k * pool(x) for k > 0
_POOLINGS = (
    nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (FusedTSigmaBN, FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d)


class LateFanOut(nn.Module):
    """The first task-specific layer of a shared backbone, with what follows it, run once for all tasks.

    A gate ``s = sigmoid(weight[t, c])`` is positive, so a positively homogeneous activation and a pooling let it pass::

        pool(act(s * xhat)) = s * pool(act(xhat))        conv(W, diag(s) r) = conv(W diag(s), r)

    Normalisation, activation and pooling run on the one shared stream; T streams appear where they part: as the pooled
    activation times the gates, or where ``conv`` is given as its output, by one convolution with ``T*C_out`` outputs.
    Until then there is no activation of T streams, neither in memory nor for the backward pass. Equal to
    ``conv(pool(act(layer(x))))`` with a layer that fans out, to rounding, with gradients for gates and weights.

    Gates are taken out of, or into, what PyTorch defines alone. Before a pooling or convolution that is of a subclass,
    parametrized or pruned, or has hooks or a forward of its own, the streams part: the same values for more memory.

    In the backbone of a :class:`~tsbn_kernels.MultiTaskModel` it must be the layer where the streams part: the model
    gets one input for all tasks, or runs a task alone. The statistics are those of what all tasks share, whichever run.

    Args:
        num_tasks, num_features, eps, momentum, track_running_stats, device, dtype: as in :class:`FusedTSigmaBN2d`; the
            statistics are those of the one stream, ``[1, C]``.
        activation: None, or one that lets positive factors pass: ``"relu"``, or ``"leaky_relu"`` with
            ``negative_slope``.
        pool: a max or average pooling of ``torch.nn``, or None.
        conv: the ``nn.Conv1d``, ``2d`` or ``3d`` (of one group) that follows. Its own bias is added after the gates.
        stacking: of the streams. ``conv`` writes sample-major; ``"task_major"`` costs a copy behind it.

    Shape:
        ``[N, C, *]`` to ``[T*N, C, *]`` or ``[T*N, C_out, *]``, stacked.

    Raises:
        ValueError: the gates do not commute with the activation, the pooling or the convolution, or an option is
            unknown.
        TypeError: an option is of another type.
    """

    gate: ClassVar[str] = "sigmoid"
    _routers: tuple[runs.Router, ...] = ()  # of the models that it is in the backbone of

    def __init__(
        self,
        num_tasks: int,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        activation: Name | None = "relu",
        negative_slope: float = 0.01,
        pool: nn.Module | None = None,
        conv: nn.Module | None = None,
        stacking: Literal["task_major", "sample_major"] = "task_major",
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_tasks, num_features = checks.count("num_tasks", num_tasks), checks.count("num_features", num_features)
        checks.check_layer_stacking(stacking)
        _check(activation, pool, conv, num_features)
        self.norm = FusedTSigmaBN(
            1,
            num_features,
            eps,
            momentum,
            gate="identity",
            activation=activation,
            negative_slope=negative_slope,
            track_running_stats=track_running_stats,
            device=device,
            dtype=dtype,
        )
        ones = self.norm.weight.detach()
        del self.norm.weight  # nothing to learn, and nothing to keep
        self.norm.register_buffer("weight", ones, persistent=False)
        self.pool = pool
        self.conv = conv
        self.num_tasks = num_tasks
        self.stacking = stacking
        self.weight = nn.Parameter(torch.zeros(num_tasks, num_features, device=device, dtype=dtype))

    @classmethod
    def from_layer(
        cls, layer: FusedTSigmaBN, pool: nn.Module | None = None, conv: nn.Module | None = None
    ) -> LateFanOut:
        """Builds what equals a layer that fans out, with its gates and statistics, followed by ``pool`` and ``conv``.

        Raises:
            ValueError: the layer has a bias or gates that may be negative, which do not commute with what follows, or
                its tasks have seen different inputs.
        """
        if not is_plain(layer, _LAYERS):
            raise ValueError(
                f"layer must be a FusedTSigmaBN without hooks or methods of its own, got {type(layer).__name__}: what "
                f"these do would be lost. Use fan_out=True"
            )
        if layer.gate != "sigmoid" or layer.bias is not None:
            raise ValueError(
                f"late fan-out needs positive gates and no bias (gate='sigmoid', bias=False): what follows does not "
                f"commute with others; got gate={layer.gate!r} and bias={layer.bias is not None}. Use fan_out=True"
            )
        late = cls(
            layer.num_tasks,
            layer.num_features,
            layer.eps,
            layer.momentum,
            activation=layer.activation,
            negative_slope=layer.negative_slope,
            pool=pool,
            conv=conv,
            stacking=layer.stacking,
            track_running_stats=layer.running_mean is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        late.norm.process_group = layer.process_group
        with torch.no_grad():
            late.weight.copy_(layer.weight)
            for name in STATISTICS:
                rows = getattr(layer, name)
                if rows is None:
                    continue
                if not (rows == rows[:1]).all():
                    raise ValueError(
                        f"the tasks of the layer have a different {name}, so they did not share one input; only one "
                        f"that did can fan out late"
                    )
                getattr(late.norm, name).copy_(rows[:1])
        return late.train(layer.training)

    @property
    def gates(self) -> Tensor:
        """The factors of the normalised activation, ``[T, C]``."""
        return concurrent.sigmoid(self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Lets a state tell gates from other tensors, as other layers do."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tell_gates(destination, prefix, self.gate)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return leaf_call(self, x)
        weight = self._routed(x) if self._routers else self.weight
        r: Tensor = self.norm(x)
        modules = [module for module in (self.pool, self.conv) if module is not None]
        if modules and is_plain(modules[0], _POOLINGS):
            r = modules.pop(0)(r)
        if modules and is_plain(modules[0], _CONVOLUTIONS):
            return self._convolve(r, modules[0], weight)
        # By mean 0 and variance 1 the layer only multiplies: one read of r, T writes.
        zeros, ones = torch.zeros_like(weight), torch.ones_like(weight)
        r = task_batch_norm(
            r,
            weight,
            None,
            zeros,
            ones,
            num_tasks=weight.shape[0],
            training=False,
            eps=0.0,
            stacking=self.stacking,
            fan_out=True,
        )
        for module in modules:  # of which the gates are not known to let themselves be taken out
            r = module(r)
        return r

    def _routed(self, x: Tensor) -> Tensor:
        """The rows of the weight of the tasks that a model runs.

        Raises:
            ValueError: the input is the streams of several tasks.
        """
        weight: Tensor = self.weight
        for router in self._routers:
            if (found := router.route(self, x)) is not None:
                tasks, fan_out = found
                weight = self.weight if tasks is None else concurrent.rows(self.weight, tasks)
                if not fan_out and weight.shape[0] > 1:
                    raise ValueError(
                        f"late fan-out needs one input for all tasks, got the streams of {weight.shape[0]} in an input "
                        f"of shape {list(x.shape)}; use FusedTSigmaBN2d, or give the model one tensor"
                    )
        return weight

    def _convolve(self, r: Tensor, conv: nn.Module, weight: Tensor) -> Tensor:
        kernel: Tensor = conv.weight  # type: ignore[assignment]
        bias: Tensor | None = conv.bias  # type: ignore[assignment]
        gates = concurrent.sigmoid(weight).view(len(weight), 1, -1, *(1,) * (kernel.dim() - 2)).to(kernel.dtype)
        folded = {"weight": (kernel * gates).flatten(0, 1)}
        if bias is not None:
            folded["bias"] = bias.repeat(len(weight))
        out: Tensor = torch.func.functional_call(conv, folded, (r,))
        streams = out.unflatten(1, (len(weight), -1))
        return layout.stacked(streams.transpose(0, 1), self.stacking)

    def extra_repr(self) -> str:
        return f"{self.num_tasks}, stacking={self.stacking!r}"


def _check(activation: str | None, pool: nn.Module | None, conv: nn.Module | None, features: int) -> None:
    if activation not in HOMOGENEOUS:
        raise ValueError(
            f"late fan-out needs an activation that lets positive factors pass, one of "
            f"{', '.join(map(str, HOMOGENEOUS))}; got {activation!r}. Use FusedTSigmaBN2d(..., fan_out=True)"
        )
    if pool is not None and (not isinstance(pool, _POOLINGS) or getattr(pool, "return_indices", False)):
        raise ValueError(f"pool must be a max or average pooling of torch.nn that returns no indices, got {pool}")
    if conv is None:
        return
    if not isinstance(conv, _CONVOLUTIONS) or conv.groups != 1:
        raise ValueError(f"conv must be an nn.Conv1d, 2d or 3d of one group, got {conv}")
    if conv.in_channels != features:
        raise ValueError(f"conv must take the {features} channels of the layer, got in_channels={conv.in_channels}")
