"""How a normalisation's operators become ``torch.ops.tsbn.*``, and which backend computes a call of them.

All but the ``tracked`` ones are functional, and the forward ones differentiable. Their arguments are flat; a backend
takes some of them as one (options, what is saved, which gradients are needed). Each normalisation has an adapter for
each of its operators, which makes the one of the other, and a class that knows the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from tsbn_kernels import backends
from tsbn_kernels.backends import choice, cpu, cuda, triton
from tsbn_kernels.backends.fallback import guarded
from tsbn_kernels.definition import reference

library = torch.library.Library("tsbn", "DEF")
BackendT = TypeVar("BackendT")
Adapter = Callable[..., Any]

# Inductor may pass any strides, and spares the copies that the traced ones would cost.
_TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)

# The kernels for the CPU are registered in C++, and serve the operators that are declared after them too.
cuda.load()
cpu.load()
backends.force_from_environment()


class Operator(NamedTuple):
    """An operator of a normalisation.

    Attributes:
        schema: its arguments and results, as ``torch.library`` reads them.
        adapter: calls the function of a backend, which is the first argument, with the options, the second, and with
            the other flat arguments by their names; returns flat results.
    """

    schema: str
    adapter: Adapter


class Signature:
    """The flat arguments of an operator.

    Args:
        name: of the operator.
        options: takes the options out of arguments by their names.
        defaults: values of options that the operator does not ask for.

    Attributes:
        names: of all of them, in their order.
    """

    def __init__(self, name: str, options: Callable[[dict[str, Any]], Any], defaults: Mapping[str, Any]) -> None:
        arguments = getattr(torch.ops.tsbn, name).default._schema.arguments
        self.names = tuple(argument.name for argument in arguments)
        own = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        self._options, self._defaults = options, {**defaults, **own}

    def read(self, arguments: Sequence[Any], **more: Any) -> tuple[dict[str, Any], Any]:
        """The arguments by their names, and the options among them. PyTorch leaves out defaults at the end."""
        given = {**self._defaults, **dict(zip(self.names, arguments, strict=False)), **more}
        return given, self._options(given)


class Normalization(Generic[BackendT]):
    """The operators of one normalisation, declared and registered.

    Args:
        kind: makes a backend of its functions, in the order of ``operators``: a tuple with their names.
        operators: by their names.
        options, defaults: see :class:`Signature`.
        dispatched: makes a backend of the flat functions, in the same tuple.
        fake: the backend that allocates its results; they tell shapes, dtypes and strides.
        general: what computes a call on the devices for which no backend registers kernels of its own. None: the
            reference, and on GPUs Triton and CUDA C++ before it.

    Attributes:
        signatures: of the operators, by their names.
        dispatched, of_reference: backends below autograd, which has an ``autograd.Function`` of its own in eager mode;
        cuda, triton: those of these backends.
        direct: those that the dispatcher finds for a key, by keys.
    """

    def __init__(
        self,
        kind: Callable[..., Any],
        operators: Mapping[str, Operator],
        options: Callable[[dict[str, Any]], Any],
        defaults: Mapping[str, Any],
        dispatched: Callable[[Any], BackendT],
        fake: BackendT,
        general: BackendT | None = None,
    ) -> None:
        self._kind, self._operators, self._general = kind, operators, general
        for name, operator in operators.items():
            library.define(name + operator.schema, tags=_TAGS)
        self.signatures = {name: Signature(name, options, defaults) for name in operators}
        for name in operators:
            self._register(name)
        for name, function in zip(operators, self.flat(fake), strict=True):
            torch.library.register_fake(f"tsbn::{name}", function, lib=library)
        declared = [getattr(torch.ops.tsbn, name).default for name in operators]
        self._in_graphs: BackendT = self.complete(dispatched(kind(*declared)))
        self.dispatched: BackendT = self.complete(dispatched(kind(*map(_below_autograd, declared))))
        self.of_reference: BackendT = kind(*map(_below_autograd, self.complete(reference)))
        self.cuda: BackendT = self.complete(cuda)
        self.triton: Callable[[], BackendT] = cache(lambda: kind(*map(triton.operator, operators)))
        self.direct = {key: self._direct(key) for key in triton.DISPATCH_KEYS}

    def _register(self, name: str) -> None:
        """Registers the reference for every device for which no backend registers kernels of its own."""
        definition = getattr(self._general or reference, name)
        library.impl(name, self._flattened(name, definition), "CompositeExplicitAutograd")
        for key in triton.DISPATCH_KEYS:
            found = self._on_gpu(name, key, definition)
            if found is not definition:
                library.impl(name, self._flattened(name, found), key)

    def _on_gpu(self, name: str, key: str, otherwise: Adapter) -> Adapter:
        """An operator for the GPUs of a dispatch key, ``otherwise`` where no backend has kernels for them."""
        return chained(name, key, otherwise)

    def _direct(self, key: str) -> BackendT:
        """The operators that the dispatcher finds for the GPUs of a key, without it."""
        found: BackendT = self._kind(
            *(self._on_gpu(name, key, _below_autograd(getattr(reference, name))) for name in self._operators)
        )
        return found

    def _flattened(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        signature, adapter = self.signatures[name], self._operators[name].adapter

        def call(*arguments: Any, **more: Any) -> Any:
            given, options = signature.read(arguments, **more)
            return adapter(run, options, **given)

        return call

    def complete(self, backend: Any) -> Any:
        """The operators of a backend, and those of the reference where it has none."""
        return self._kind(*(getattr(backend, name, getattr(reference, name)) for name in self._operators))

    def flat(self, backend: Any) -> Any:
        """The operators of a backend, or of the reference, as functions of flat arguments."""
        return self._kind(*map(self._flattened, self._operators, self.complete(backend)))

    def operators(self, backend: str | None) -> BackendT:
        """The operators of a backend; of the one that the dispatcher picks where it is None.

        Those for a graph are differentiable. It holds the reference's formulas, or operators, of which the dispatcher
        picks the kernels when they run.

        Raises:
            RuntimeError: in a graph the dispatcher would not pick the backend.
        """
        if torch.compiler.is_compiling():
            if backend == "cuda" and triton.available:
                raise RuntimeError(
                    "inside torch.compile and torch.export the backend 'cuda' runs only where Triton is not installed; "
                    "compile without TSBN_BACKEND and use_backend, or call the layer outside of the compiled function"
                )
            plain = backend == "reference" or torch.onnx.is_in_onnx_export()  # ONNX knows none of our operators
            return self.complete(reference) if plain else self._in_graphs
        return self.eager(backend)

    def eager(self, backend: str | None) -> BackendT:
        """The operators of a backend outside of graphs; see :func:`tsbn_kernels.operator.direct.backend_of`."""
        if backend is None:
            return self.dispatched
        if backend in self.direct:
            return self.direct[backend]
        if backend == "reference":
            return self.of_reference
        if backend == "cuda":
            return self.cuda
        return self.triton() if backend == "triton" else self.dispatched


class MixedNormalization(Normalization[BackendT]):
    """The operators of a normalisation of mixed batches: the kernels of equal tasks serve where there are no others.

    Args:
        parts: makes the operators of those of equal tasks, by the name of a backend, or None: below autograd.
        fits: whether kernels of their own compute a call on a GPU, from its arguments.
        described: what :class:`Normalization` takes before ``general``.
    """

    def __init__(self, parts: Callable[[str | None], BackendT], fits: Callable[..., bool], *described: Any) -> None:
        self._parts, self._fits = parts, fits
        super().__init__(*[*described, parts(None)])

    def _on_gpu(self, name: str, key: str, otherwise: Adapter) -> Adapter:
        chain = chained(name, key, otherwise)
        return otherwise if chain is otherwise else self._either(chain, otherwise)

    def _direct(self, key: str) -> BackendT:
        parts = self._parts(key)
        found: BackendT = self._kind(*(self._on_gpu(name, key, getattr(parts, name)) for name in self._operators))
        return found

    def _either(self, own: Adapter, general: Adapter) -> Adapter:
        def call(*arguments: Any) -> Any:
            return (own if self._fits(*arguments) else general)(*arguments)

        return call

    def eager(self, backend: str | None) -> BackendT:
        """The operators of a backend outside of graphs; of one for GPUs, by its kernels for equal tasks.

        For what fits by kernels of its own, where it has some.
        """
        if backend not in ("cuda", "triton"):
            return super().eager(backend)
        parts = self._parts(backend)

        def either(name: str) -> Adapter:
            general = getattr(parts, name)
            own = getattr(cuda, name, general) if backend == "cuda" else triton.operator(name)
            return self._either(own, general)

        found: BackendT = self._kind(*map(either, self._operators))
        return found


def chained(name: str, key: str, definition: Adapter) -> Adapter:
    """An operator for the GPUs of a dispatch key: by Triton, by CUDA C++ or by the definition, see fallback.py.

    Where both have kernels the plan of a call tells which come first.
    """
    by_triton = partial(guarded, triton.health, name, triton.operator)
    by_cuda = partial(guarded, cuda.health, name, partial(getattr, cuda))
    has_cuda = cuda.available and key == cuda.DISPATCH_KEY and hasattr(cuda, name)
    chain = by_cuda(definition) if has_cuda else definition
    if not triton.available:
        return chain
    chain = by_triton(chain)
    if has_cuda and hasattr(choice, name):
        return choice.planned(getattr(choice, name), {"triton": chain, "cuda": by_cuda(by_triton(definition))})
    return chain


def _below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autograd.

    The results of the reference are then no views of each other, so that they may be changed in place.
    """

    def call(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return function(*arguments)

    return call


def or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """What an operator returns for a gradient that is not needed: an empty tensor."""
    return like.new_empty(0) if gradient is None else gradient
