"""The calls in the code of a module's forward: told apart while it is traced, and left out where that is asked for.

torchvision's residual blocks call one ``self.relu`` at several places of their forward. Which of these calls follows a
layer, a trace of the model tells; only a change of the code can leave out that call and no other.
"""

from __future__ import annotations
import __future__

import ast
import copy
import hashlib
import inspect
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType, new_class
from typing import Any, NamedTuple

from torch import fx, nn

_MARK, _ORIGIN = "_tsbn_mark", "_tsbn_origin"


class Site(NamedTuple):
    """A call in the forward of a module: which one, in the order of the code."""

    owner: nn.Module
    number: int


def mark(module: nn.Module, names: Collection[str]) -> None:
    """Has the calls in a module's forward put themselves down in what they return, for :func:`site_of`.

    A module stays as it is where the code of its forward uses none of the names, or cannot be read.
    """
    kind, left_out = _origin(module)
    code = getattr(kind.forward, "__code__", None)
    if code is not None and not set(code.co_names).isdisjoint(names):
        module.__class__ = _subclass(kind, left_out, marking=True) or type(module)


def site_of(node: fx.Node, called: nn.Module | None) -> Site | None:
    """The call of a marked forward that a node of one tensor has come from, where that can be left out.

    ``called`` is the module that the node calls, if it calls one.
    """
    site: Site | None = node.meta.get(_MARK)
    if site is None:
        return None
    definition = _definition(_origin(site.owner)[0])
    assert definition is not None
    call = _calls(definition.node.body)[site.number]
    function, arguments = call.func, [*call.args, *(keyword.value for keyword in call.keywords)]
    if not isinstance(function, ast.Attribute):
        fits = node.op == "call_function" and len(call.args) > 0 and definition.resolve(function) is node.target
    elif node.op == "call_module":
        of_self = isinstance(function.value, ast.Name) and function.value.id == definition.itself
        fits = of_self and len(call.args) == len(arguments) == 1 and getattr(site.owner, function.attr, None) is called
    elif node.op == "call_method":
        fits = function.attr == node.target and not arguments
    else:
        fits = len(call.args) > 0 and definition.resolve(function) is node.target
    simple = all(isinstance(argument, (ast.Constant, ast.Name, ast.Attribute)) for argument in arguments[1:])
    return site if fits and simple and not any(isinstance(argument, ast.Starred) for argument in arguments) else None


def leave_out(module: nn.Module, indices: Iterable[int]) -> None:
    """Changes the class of a module to a subclass that does without some calls of its forward.

    The first argument of a call, or the object of a method without arguments, takes its place. The subclass has the
    name of the class; its objects can be copied and pickled.
    """
    kind, left_out = _origin(module)
    changed = _subclass(kind, left_out | frozenset(indices), marking=False)
    assert changed is not None
    module.__class__ = changed


def restore(module: nn.Module) -> bool:
    """Gives a module its own class back; returns whether a call had been left out."""
    kind, left_out = _origin(module)
    if left_out:
        module.__class__ = kind
    return bool(left_out)


def _origin(module: nn.Module) -> tuple[Any, frozenset[int]]:
    origin: tuple[Any, frozenset[int]] = vars(type(module)).get(_ORIGIN, (type(module), frozenset()))
    return origin


class _Definition(NamedTuple):
    """The forward of a class, and where its syntax tree stands in that of its file."""

    function: Any
    node: ast.FunctionDef
    around: ast.Module
    digest: str  # of the source

    @property
    def itself(self) -> str:
        """The name of the module."""
        return (self.node.args.posonlyargs + self.node.args.args)[0].arg

    def resolve(self, expression: ast.expr) -> Any:
        """What a global name, or an attribute of one, stands for; None for any other expression."""
        if isinstance(expression, ast.Attribute):
            return getattr(self.resolve(expression.value), expression.attr, None)
        code = self.function.__code__
        if (
            not isinstance(expression, ast.Name)
            or expression.id in code.co_varnames + code.co_cellvars + code.co_freevars
        ):
            return None
        return self.function.__globals__.get(expression.id)

    def compile(self, body: list[ast.stmt]) -> CodeType | None:
        """The code of the forward with another body."""
        code, own, self.node.body = self.function.__code__, self.node.body, body
        future = code.co_flags & __future__.annotations.compiler_flag  # a notebook has it of an earlier cell
        try:
            compiled = compile(ast.fix_missing_locations(self.around), code.co_filename, "exec", future, True)
        finally:
            self.node.body = own
        return next(
            (c for c in _codes(compiled) if c.co_firstlineno == code.co_firstlineno and c.co_name == code.co_name), None
        )


@lru_cache(maxsize=1024)
def _definition(kind: Any) -> _Definition | None:
    """The forward of a class, where compiling what is said to be its source gives the code that it has."""
    function = inspect.getattr_static(kind, "forward")
    if not isinstance(function, FunctionType):
        return None
    try:
        lines, first = inspect.findsource(function)
        tree = ast.parse("".join(lines))
    except (OSError, TypeError, SyntaxError):
        return None
    node = next((n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.lineno == first + 1), None)
    if node is None or node.decorator_list or not (node.args.posonlyargs + node.args.args):
        return None
    # The imports matter: what is called of an imported module is compiled in another way than a method.
    kept = [
        part
        for part in tree.body
        if not isinstance(part, (ast.ClassDef, ast.FunctionDef)) or part.lineno <= first + 1 <= (part.end_lineno or 0)
    ]
    source = "".join(lines[first : node.end_lineno])
    definition = _Definition(function, node, ast.Module(kept, []), hashlib.sha256(source.encode()).hexdigest())
    return definition if definition.compile(node.body) == function.__code__ else None


def _calls(body: list[ast.stmt]) -> list[ast.Call]:
    return [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Call)]


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


@lru_cache(maxsize=1024)
def _subclass(kind: Any, left_out: frozenset[int], *, marking: bool) -> type[nn.Module] | None:
    """A subclass whose forward leaves out some calls, and marks the others if that is asked for."""
    definition = _definition(kind)
    if definition is None or kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__:
        return None
    function, body = definition.function, copy.deepcopy(definition.node.body)
    indices = {call: index for index, call in enumerate(_calls(body))}
    editor = _Editor(indices, left_out, definition.itself if marking else None)
    code = definition.compile([editor.visit(statement) for statement in body])
    assert code is not None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in code.co_freevars)
    forward = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    for name in ("__kwdefaults__", "__annotations__", "__qualname__", "__doc__", "__module__"):
        setattr(forward, name, getattr(function, name))

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        state = super(changed, self).__reduce_ex__(protocol)[2:]
        return _new, (kind, definition.digest, tuple(left_out)), *state

    members = {
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        _ORIGIN: (kind, left_out),
        _MARK: _mark,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    try:
        changed: Any = new_class(kind.__name__, (kind,), {}, lambda namespace: namespace.update(members))
    except Exception:  # a class may refuse to be subclassed, in any way
        return None
    return changed  # type: ignore[no-any-return]


class _Editor(ast.NodeTransformer):
    """Leaves out calls, or marks them with the name that the forward has for its module."""

    def __init__(self, indices: dict[ast.Call, int], left_out: frozenset[int], itself: str | None) -> None:
        self.indices, self.left_out, self.itself = indices, left_out, itself

    def visit_Call(self, node: ast.Call) -> ast.expr:
        index = self.indices[node]
        self.generic_visit(node)
        if index in self.left_out:
            return node.args[0] if node.args else node.func.value  # type: ignore[attr-defined]
        if self.itself is None:
            return node
        marker = ast.Attribute(ast.Name(self.itself, ast.Load()), _MARK, ast.Load())
        return ast.copy_location(ast.Call(marker, [ast.Constant(index), node], []), node)


def _mark(self: nn.Module, index: int, value: Any) -> Any:
    """The call that is nearest to where a value was made is the first that marks it."""
    if isinstance(value, fx.Proxy):
        value.node.meta.setdefault(_MARK, Site(self, index))
    return value


def _new(kind: Any, digest: str, left_out: tuple[int, ...]) -> nn.Module:
    """An object without content, for copy and pickle."""
    definition = _definition(kind)
    changed = _subclass(kind, frozenset(left_out), marking=False)
    if definition is None or changed is None or definition.digest != digest:
        raise RuntimeError(
            f"the forward of {kind.__qualname__} is not what it was when activations were fused into the layers of a "
            f"model; convert the plain model again, and load the state dict of the old one"
        )
    return changed.__new__(changed)
