"""Reading PTX text: modules, kernels, variables and instructions, each with its line."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

_TOKEN = re.compile(r'"[^"]*"|[%$.\w]+(?:::[%$.\w]+)*|\S')
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "b32": 4, "u32": 4,
          "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16}
_INTEGER = re.compile(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


class PTXError(ValueError):
    """PTX text that cannot be read, or an instruction that is not known; the message names the line."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"PTX line {line}: {message}")
        self.line = line


@dataclass(frozen=True)
class Token:
    text: str
    line: int


@dataclass(frozen=True)
class Location:
    """A place in the source, as `.loc` gives it, and the place that it was inlined into."""

    file: int
    line: int
    inlined_at: tuple[int, int] | None = None


@dataclass(frozen=True)
class Value:
    """A register, special register, symbol or literal."""

    text: str
    negated: bool = False


@dataclass(frozen=True)
class Vector:
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Address:
    base: Value
    offset: int


Operand = Value | Vector | Address


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: Value | None = None
    also: Value | None = None  # q in `setp.lt.f32 p|q, a, b`
    location: Location | None = None


@dataclass
class Variable:
    """A variable of a state space, or a parameter. An `extern` array has no size: the launch gives it."""

    name: str
    space: str
    type: str
    align: int
    size: int
    data: bytes = b""


@dataclass
class Kernel:
    name: str
    line: int
    params: list[Variable] = field(default_factory=list)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    registers: set[str] = field(default_factory=set)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class Module:
    text: str
    target: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)

    def kernel(self, name: str) -> Kernel:
        """The kernel of this name; of a C++ kernel the plain name will do where it is unambiguous."""
        found = [k for k in self.kernels if k == name] or [k for k in self.kernels if f"{len(name)}{name}" in k]
        if len(found) != 1:
            raise KeyError(f"{len(found) or 'no'} kernels match {name!r}; the text has {', '.join(self.kernels) or 'none'}")
        return self.kernels[found[0]]

    def describe(self, location: Location | None) -> str:
        """`file:line` of a location, with the place that it was inlined into."""
        if location is None:
            return ""
        name = PurePath(self.files.get(location.file, "?")).name
        text = f"{name}:{location.line}"
        if location.inlined_at:
            file, line = location.inlined_at
            text += f" (inlined at {PurePath(self.files.get(file, '?')).name}:{line})"
        return text


def parse(text: str) -> Module:
    """Reads a PTX text."""
    return _Parser(text).module()


def literal(text: str) -> int | float | None:
    """The value of a literal, an int (for 0f and 0d the bits) or a decimal float; None if it is none."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", digits):
        return int(digits[2:], 16)
    if found := _INTEGER.match(digits):
        number = found.group(1)
        octal = len(number) > 1 and number.isdigit() and number[0] == "0"
        return sign * (int(number, 8) if octal else int(number, 0))
    if re.fullmatch(r"\d+\.\d*([eE]\d+)?", digits):
        return sign * float(digits)
    return None


class _Scope:
    """The registers that a block `{ ... }` declares. Names in the program are unique: inner ones get a suffix."""

    def __init__(self, outer: _Scope | None, suffix: str) -> None:
        self.outer, self.suffix = outer, suffix
        self.names: dict[str, int | None] = {}  # name, or prefix and count for `%r<9>`

    def resolve(self, name: str) -> str | None:
        stem = name.rstrip("0123456789")
        count = self.names.get(stem)
        if name in self.names or (count is not None and name != stem and int(name[len(stem) :]) < count):
            return name + self.suffix
        return self.outer.resolve(name) if self.outer else None


class _Parser:
    def __init__(self, text: str) -> None:
        clean = _COMMENT.sub(lambda m: "\n" * m.group().count("\n"), text)
        self.tokens = [Token(t, n) for n, line in enumerate(clean.splitlines(), 1) for t in _TOKEN.findall(line)]
        self.at = 0
        self.result = Module(text)

    # Tokens

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].text if self.at + ahead < len(self.tokens) else ""

    def line(self) -> int:
        return self.tokens[min(self.at, len(self.tokens) - 1)].line if self.tokens else 0

    def next(self) -> str:
        if self.at >= len(self.tokens):
            raise PTXError(self.line(), "the text ends too early")
        self.at += 1
        return self.tokens[self.at - 1].text

    def expect(self, text: str) -> None:
        line, found = self.line(), self.next()
        if found != text:
            raise PTXError(line, f"expected {text!r}, not {found!r}")

    def accept(self, text: str) -> bool:
        if self.peek() == text:
            self.at += 1
            return True
        return False

    def rest_of_line(self) -> list[str]:
        line, words = self.line(), []
        while self.at < len(self.tokens) and self.tokens[self.at].line == line:
            words.append(self.next())
        return words

    def integer(self) -> int:
        line, text = self.line(), self.next()
        if text in "+-":
            return (-1 if text == "-" else 1) * self.integer()
        value = literal(text)
        if not isinstance(value, int):
            raise PTXError(line, f"expected an integer, not {text!r}")
        return value

    def integers(self) -> tuple[int, ...]:
        numbers = [self.integer()]
        while self.accept(","):
            numbers.append(self.integer())
        return tuple(numbers)

    def skip_block(self) -> None:
        self.expect("{")
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(self.next(), 0)

    # Modules

    def module(self) -> Module:
        while self.at < len(self.tokens):
            line, word = self.line(), self.next()
            if word in (".version", ".address_size"):
                self.rest_of_line()
            elif word == ".target":
                self.result.target = self.next()
                self.rest_of_line()
            elif word == ".file":
                self.file()
            elif word == ".section":
                self.next()
                self.skip_block()
            elif word in (".visible", ".extern", ".weak", ".common"):
                continue
            elif word == ".entry":
                self.kernel()
            elif word == ".func":  # only calls would need it, and a call is an unknown instruction
                while self.peek() not in ("{", ";"):
                    self.next()
                if not self.accept(";"):
                    self.skip_block()
            elif word in (".global", ".const", ".shared"):
                self.result.variables.append(self.variable(word[1:]))
                self.expect(";")
            else:
                raise PTXError(line, f"unknown directive {word!r}")
        return self.result

    def file(self) -> None:
        words = self.rest_of_line()
        self.result.files[int(words[0])] = words[1].strip('"')

    def variable(self, space: str) -> Variable:
        """`.align 4 .b8 name[16] = {1, 2}`, also of parameters, whose `.ptr` part is skipped."""
        align, kind = 0, ""
        while self.peek().startswith("."):
            word = self.next()[1:]
            if word == "align":
                stated = self.integer()
                align = align if kind else stated  # after the type it is the alignment of what a pointer points to
            elif word in _SIZES:
                kind = word
            elif word not in ("ptr", "global", "shared", "const", "local", "visible", "attribute"):
                raise PTXError(self.line(), f"unknown type {word!r}")
        line, name = self.line(), self.next()
        if kind not in _SIZES:
            raise PTXError(line, f"variable {name} has no type")
        count = 1
        while self.accept("["):
            count *= 0 if self.peek() == "]" else self.integer()
            self.expect("]")
        size = _SIZES[kind]
        data = self.initialiser(kind) if self.accept("=") else b""
        return Variable(name, space, kind, align or size, count * size, data.ljust(count * size, b"\0") if data else b"")

    def initialiser(self, kind: str) -> bytes:
        line = self.line()
        if self.accept("{"):
            data = self.initialiser(kind)
            while self.accept(","):
                data += self.initialiser(kind)
            self.expect("}")
            return data
        sign = "-" if self.accept("-") else ""
        value = literal(sign + self.next())
        if isinstance(value, float):
            return struct.pack("<f" if kind == "f32" else "<d", value)
        if value is None:
            raise PTXError(line, "initialisers with addresses are not supported")
        return (value % (1 << 8 * _SIZES[kind])).to_bytes(_SIZES[kind], "little")

    def kernel(self) -> None:
        kernel = Kernel(self.next(), self.line())
        if self.accept("("):
            while not self.accept(")"):
                self.expect(".param")
                kernel.params.append(self.variable("param"))
                self.accept(",")
        while self.peek() != "{":
            line, word = self.line(), self.next()
            if word in (".explicitcluster", ".blocksareclusters"):
                kernel.directives[word[1:]] = ()
            elif word in (".reqntid", ".maxntid", ".minnctapersm", ".maxnreg", ".maxnctapersm", ".reqnctapercluster", ".maxclusterrank"):
                kernel.directives[word[1:]] = self.integers()
            elif word == ".pragma":
                self.rest_of_line()
            else:
                raise PTXError(line, f"unknown directive {word!r} of a kernel")
        _Body(self, kernel).read()
        self.result.kernels[kernel.name] = kernel


class _Body:
    """The statements of one kernel."""

    def __init__(self, parser: _Parser, kernel: Kernel) -> None:
        self.parser, self.kernel = parser, kernel
        self.location: Location | None = None
        self.scopes = 0
        self.scope = _Scope(None, "")

    def read(self) -> None:
        p = self.parser
        p.expect("{")
        depth = 1
        while depth:
            line, word = p.line(), p.next()
            if word == "{":
                depth += 1
                self.scopes += 1
                self.scope = _Scope(self.scope, f"#{self.scopes}")
            elif word == "}":
                depth -= 1
                if self.scope.outer:
                    self.scope = self.scope.outer
            elif word == ".reg":
                self.declare_registers()
            elif word in (".shared", ".local", ".global", ".const"):
                self.kernel.variables.append(p.variable(word[1:]))
                p.expect(";")
            elif word == ".loc":
                self.loc(p.rest_of_line())
            elif word == ".pragma":
                p.rest_of_line()
            elif word == ".file":
                p.file()
            elif word == ";":
                continue
            elif word.startswith("."):
                raise PTXError(line, f"unknown directive {word!r}")
            elif p.accept(":"):
                self.kernel.labels[word] = len(self.kernel.instructions)
            else:
                self.instruction(line, word)

    def loc(self, words: list[str]) -> None:
        inlined = None
        if "inlined_at" in words:
            at = words.index("inlined_at")
            inlined = (int(words[at + 1]), int(words[at + 2]))
        self.location = Location(int(words[0]), int(words[1]), inlined)

    def declare_registers(self) -> None:
        p = self.parser
        p.next()  # the type: operations have types, registers need none
        while True:
            name = p.next()
            count = None
            if p.accept("<"):
                count = p.integer()
                p.expect(">")
            self.scope.names[name] = count
            if not p.accept(","):
                break
        p.expect(";")

    def instruction(self, line: int, word: str) -> None:
        p, guard, start = self.parser, None, self.parser.at
        if word == "@":
            negated = p.accept("!")
            guard = Value(self.register(line, p.next()), negated)
            line, word = p.line(), p.next()
        operands: list[Operand] = []
        also = None
        while not p.accept(";"):
            operands.append(self.operand())
            if p.accept("|"):
                also = self.value()
            if p.peek() != ";":
                p.expect(",")
        head = f"@{'!' if guard.negated else ''}{guard.text} {word}" if guard else word
        tail = "".join(t.text for t in p.tokens[start + bool(guard) * (2 + guard.negated if guard else 0) : p.at])
        text = f"{head} {tail}".replace(",", ", ").replace(" ;", ";")
        self.kernel.instructions.append(Instruction(line, text, word, tuple(operands), guard, also, self.location))

    def operand(self) -> Operand:
        p = self.parser
        if p.accept("{"):
            items = [self.value()]
            while p.accept(","):
                items.append(self.value())
            p.expect("}")
            return Vector(tuple(items))
        if p.accept("["):
            base, offset = self.value(), 0
            while p.peek() in ("+", "-"):
                offset += p.integer()
            p.expect("]")
            return Address(base, offset)
        return self.value()

    def value(self) -> Value:
        p = self.parser
        negated, sign, line = p.accept("!"), "-" if p.accept("-") else "", p.line()
        text = sign + p.next()
        return Value(self.register(line, text) if text[0] == "%" or self.scope.resolve(text) else text, negated)

    def register(self, line: int, name: str) -> str:
        if (unique := self.scope.resolve(name)) is not None:
            self.kernel.registers.add(unique)
            return unique
        if name[0] == "%":
            return name  # a special register
        raise PTXError(line, f"register {name} is not declared")


def walk(operands: tuple[Operand, ...]) -> Iterator[Value]:
    """The values of operands, those of vectors and addresses included, in the order of the text."""
    for operand in operands:
        if isinstance(operand, Vector):
            yield from operand.items
        else:
            yield operand.base if isinstance(operand, Address) else operand
