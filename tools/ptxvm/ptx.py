"""Reading PTX text: modules, kernels, variables and instructions, each with its line."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import PurePath
from typing import NamedTuple

_SPACE = re.compile(r"\s*")
_STRING_OR_COMMENT = re.compile(r"(\"[^\"]*\")|//[^\n]*|/\*.*?\*/", re.DOTALL)
_STATEMENT = re.compile(
    r"""(?P<directive>\.(?:version|address_size|target|file|loc|pragma)\b)(?P<rest>[^\n;]*);?
    | \.section\s+\S+\s*\{[^}]*\}
    | (?:\.\w+\s+)*\.func\b[^;{]*;
    | (?:\.\w+\s+)*\.entry\s+(?P<entry>[\w$]+)\s*(?:\((?P<params>[^)]*)\))?(?P<attributes>[^{]*)\{
    | (?P<brace>[{}])
    | (?P<label>[\w$%.]+)\s*:(?!:)
    | (?:\.\w+\s+)*\.(?P<space>reg|shared|local|global|const|param)\b(?P<variable>[^;]*);
    | (?P<statement>[^;{}][^;]*)(?P<end>;)?""",
    re.VERBOSE,
)
_VARIABLE = re.compile(
    r"\s*(?P<attributes>(?:\.\w+(?:\s+\d+)?\s+)*)(?P<name>[\w$%]+)(?P<sizes>(?:\s*\[\d*\])*)\s*(?:=\s*(?P<data>.*))?\s*$",
    re.DOTALL,
)
_INSTRUCTION = re.compile(
    r"(?:@(?P<negated>!?)\s*(?P<guard>[\w$%]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*)$", re.DOTALL
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_NAME = re.compile(r"-?[\w$%.]+$")
_ATTRIBUTES = re.compile(
    r"reqntid|maxntid|minnctapersm|maxnreg|reqnctapercluster|maxclusterrank|explicitcluster|blocksareclusters|pragma"
)


class PTXError(ValueError):
    """PTX text that cannot be read, or an instruction that is not known; the message names the line."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"PTX line {line}: {message}")
        self.line = line


class Location(NamedTuple):
    """A place in the source, as `.loc` gives it, and the place that it was inlined into."""

    file: int
    line: int
    inlined_at: tuple[int, int] | None = None


class Instruction(NamedTuple):
    """One instruction as the text has it."""

    line: int
    text: str
    opcode: str
    operands: tuple[tuple[str, ...], ...]  # registers, symbols, literals: one, or those of a vector `{a, b}`
    offset: int = 0  # of the address
    negated: bool = False  # one of the operands is a predicate `!p`
    guard: str | None = None
    guard_negated: bool = False  # @!p
    also: str | None = None  # q in `setp.lt.f32 p|q, a, b`
    location: Location | None = None


@dataclass(frozen=True)
class Variable:
    """A variable of a state space, or a parameter. An `extern` array has size 0: the launch gives it."""

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
    attributes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    registers: set[str] = field(default_factory=set)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class Module:
    target: str = ""
    kernels: dict[str, Callable[[], Kernel]] = field(default_factory=dict)  # each reads its part of the text
    variables: list[Variable] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)
    _described: dict[Location, str] = field(default_factory=dict, repr=False)  # every launch asks for all of them

    def kernel(self, name: str) -> Kernel:
        """Reads the kernel of this name; of a C++ kernel the plain name will do where it is unambiguous."""
        found = [k for k in self.kernels if k == name] or [k for k in self.kernels if f"{len(name)}{name}" in k]
        if len(found) != 1:
            there = ", ".join(self.kernels) or "none"
            raise KeyError(f"{len(found) or 'no'} kernels match {name!r}; the text has {there}")
        return self.kernels[found[0]]()

    def describe(self, location: Location | None) -> str:
        """`file:line` of a location, with the place that it was inlined into."""
        if location is None:
            return ""
        if location in self._described:
            return self._described[location]
        places = [(location.file, location.line)] + ([location.inlined_at] if location.inlined_at else [])
        texts = [f"{PurePath(self.files.get(file, '?')).name}:{line}" for file, line in places]
        described = texts[0] + "".join(f" (inlined at {text})" for text in texts[1:])
        return self._described.setdefault(location, described)


def literal(text: str, kind: str = "f64") -> int | None:
    """The value of a literal, for a float its bits (those of a decimal fraction as this kind of float); or None."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", digits):
        return int(digits[2:], 16)
    if re.fullmatch(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", digits):
        number = digits.rstrip("U")
        return sign * (int(number, 8) if re.fullmatch(r"0\d+", number) else int(number, 0))
    if re.fullmatch(r"\d+\.\d*", digits):
        return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", sign * float(digits)), "little")
    return None


def size_of(kind: str) -> int:
    """The bytes of a type: 4 for `f32`, 8 for `b64`, 4 for `f16x2`."""
    found = re.fullmatch(r"(?:[busf]|bf)(8|16|32|64|128)(x2)?", kind)
    if not found:
        raise ValueError(f"unknown type {kind!r}")
    return int(found[1]) // 8 * (2 if found[2] else 1)


@lru_cache(maxsize=64)
def parse(text: str) -> Module:
    """Reads a PTX text but for what its kernels do: of hundreds, few are asked for."""
    clean = _STRING_OR_COMMENT.sub(lambda m: m[1] or "\n" * m.group().count("\n"), text)
    module = Module()
    _Parser(module, clean).read(0, len(clean), 1)
    return module


class _Parser:
    """Reads what stands outside of kernels, or within one."""

    def __init__(self, module: Module, text: str, kernel: Kernel | None = None) -> None:
        self.module, self.text, self.kernel = module, text, kernel
        self.location: Location | None = None
        # The registers of the blocks that are open, by name or by prefix and count for `%r<9>`, and a suffix that
        # makes names unique.
        self.scopes: list[tuple[dict[str, int | None], str]] = [({}, "")]

    def read(self, at: int, end: int, line: int) -> None:
        """Reads from one place to another; the first is in this line."""
        blocks, text = 0, self.text
        while found := _STATEMENT.match(text, _SPACE.match(text, at, end).end(), end):  # type: ignore[union-attr]
            line += text.count("\n", at, found.start())
            try:
                blocks += found["brace"] == "{"
                self.statement(line, found, f"#{blocks}")
            except ValueError as error:
                raise PTXError(line, str(error)) from None
            at = self.closing(found.end()) + 1 if found["entry"] else found.end()
            line += text.count("\n", found.start(), at)

    def closing(self, at: int) -> int:
        """Finds the brace that closes the one before this place."""
        depth = 1
        for brace in re.compile("[{}]").finditer(self.text, at):
            depth += 1 if brace.group() == "{" else -1
            if not depth:
                return brace.start()
        raise PTXError(self.text.count("\n") + 1, "the text ends too early")

    def body(self, kernel: Kernel, at: int, line: int) -> Kernel:
        _Parser(self.module, self.text, kernel).read(at, self.closing(at), line)
        return kernel

    def statement(self, line: int, found: re.Match[str], suffix: str) -> None:
        variables = self.kernel.variables if self.kernel else self.module.variables
        if found["directive"]:
            self.directive(found["directive"], found["rest"])
        elif found["entry"]:
            kernel = Kernel(found["entry"], line)
            params = [p.replace(".param", "", 1) for p in (found["params"] or "").split(",") if p.strip()]
            kernel.params = [variable("param", p) for p in params]
            for name, numbers in re.findall(r"\.(\w+)([\s\d,]*)", found["attributes"]):
                if not _ATTRIBUTES.fullmatch(name):
                    raise ValueError(f"unknown directive '.{name}' of a kernel")
                kernel.attributes[name] = tuple(int(n) for n in re.findall(r"\d+", numbers))
            within = line + found.group().count("\n")
            self.module.kernels[kernel.name] = cache(partial(self.body, kernel, found.end(), within))
        elif found["brace"] == "{":
            self.scopes.append(({}, suffix))
        elif found["brace"] == "}":
            self.scopes.pop()
        elif found["label"] and self.kernel:
            self.kernel.labels[found["label"]] = len(self.kernel.instructions)
        elif found["space"] == "reg":
            for name, count in re.findall(r"([\w$%]+)(?:<(\d+)>)?\s*(?:,|$)", found["variable"].split(None, 1)[1]):
                self.scopes[-1][0][name] = int(count) if count else None
        elif found["space"]:
            variables.append(variable(found["space"], found["variable"]))
        elif found["statement"]:
            if not self.kernel or found["statement"].startswith("."):
                raise ValueError(f"unknown directive {found['statement'].split()[0]!r}")
            if not found["end"]:
                raise ValueError("the text ends too early")
            self.instruction(self.kernel, line, found["statement"])

    def directive(self, name: str, rest: str) -> None:
        words = rest.split()
        if name == ".target":
            self.module.target = words[0].rstrip(",")
        elif name == ".file":
            self.module.files[int(words[0])] = rest.split('"')[1]
        elif name == ".loc":
            at = words.index("inlined_at") + 1 if "inlined_at" in words else 0
            self.location = Location(int(words[0]), int(words[1]), (int(words[at]), int(words[at + 1])) if at else None)

    def instruction(self, kernel: Kernel, line: int, text: str) -> None:
        found = _INSTRUCTION.match(text)
        if not found:
            raise ValueError(f"cannot read {text!r}")
        line += text[: found.start("opcode")].count("\n")
        texts = [operand.strip() for operand in _OPERAND.findall(found["operands"])]
        first, _, also = texts[0].partition("|") if texts else ("", "", "")
        operands: list[tuple[str, ...]] = []
        offset = 0
        for operand in [first, *texts[1:]][: len(texts)]:
            if operand[0] == "[":
                base, *terms = re.findall(r"[-+\s]*[^-+\s]+", operand[1:-1])
                operands.append((self.resolve(base),))
                for term in terms:
                    if (number := literal(term.strip("-+ \t"))) is None:
                        raise ValueError(f"cannot read the address {operand}")
                    offset += number * (-1) ** term.count("-")
            else:
                operands.append(tuple(self.resolve(name) for name in operand.strip("{!}").split(",")))
        guard, second = (self.resolve(name) if name else None for name in (found["guard"], also))
        negated, guard_negated = any(o[0] == "!" for o in texts), found["negated"] == "!"
        plain = " ".join(text.split()) + ";"
        kernel.instructions.append(
            Instruction(
                line,
                plain,
                found["opcode"],
                tuple(operands),
                offset,
                negated,
                guard,
                guard_negated,
                second,
                self.location,
            )
        )

    def resolve(self, name: str) -> str:
        """The unique name of a register; other names are returned as they are."""
        name = name.strip()
        if not _NAME.match(name):
            raise ValueError(f"cannot read the operand {name!r}")
        stem = name.rstrip("0123456789")
        for names, suffix in reversed(self.scopes):
            count = names.get(stem)
            if name in names or (count is not None and name != stem and int(name[len(stem) :]) < count):
                assert self.kernel
                self.kernel.registers.add(name + suffix)
                return name + suffix
        return name


def variable(space: str, text: str) -> Variable:
    """`.align 4 .b8 name[16] = {1, 2}`; for a parameter what follows `.ptr` is about what it points to."""
    found = _VARIABLE.match(text)
    if not found:
        raise ValueError(f"cannot read the variable {text.strip()!r}")
    words = found["attributes"].split(".ptr")[0].replace(".", " ").split()
    kind = words[-1] if words else ""
    size = size_of(kind)
    data = b""
    for value in re.findall(r"[^{},\s]+", found["data"] or ""):
        if (number := literal(value, kind)) is None:
            raise ValueError(f"cannot initialise a variable with {value!r}")
        data += (number % (1 << 8 * size)).to_bytes(size, "little")
    align = int(words[words.index("align") + 1]) if "align" in words else size
    size *= math.prod(int(n or 0) for n in re.findall(r"\[(\d*)\]", found["sizes"]))
    return Variable(found["name"], space, kind, align, size, data.ljust(size, b"\0") if data else b"")
