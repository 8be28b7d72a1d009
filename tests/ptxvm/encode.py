"""From a parsed kernel to the core's program: registers, constants and symbols become numbered slots."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

from .build import core
from .ptx import Address, Instruction, Kernel, Module, Operand, PTXError, Value, Variable, Vector, literal, walk

GLOBAL_VARIABLES = 1 << 43  # where module variables lie in the kernel's address space
_BRANCHES = ("bra",)


@dataclass
class Encoded:
    """A kernel that the core can run; what depends on the launch is not in it."""

    kernel: Kernel
    program: Any
    registers: int
    slots: int
    constants: list[tuple[int, int]]
    specials: list[tuple[int, str]]
    shared_size: int
    local_size: int
    param_size: int
    params: list[tuple[Variable, int]]
    globals: list[tuple[Variable, int]]
    kinds: list[str] = field(default_factory=list)
    spaces: list[str] = field(default_factory=list)


def _place(variables: list[Variable], base: int = 0) -> tuple[dict[str, int], int]:
    """Addresses of variables one after the other, and the end."""
    places = {}
    for variable in variables:
        base = -(-base // variable.align) * variable.align
        places[variable.name] = base
        base += variable.size
    return places, base


def encode(module: Module, kernel: Kernel) -> Encoded:
    """Lays out the variables of a kernel and encodes its instructions."""
    variables = module.variables + kernel.variables
    shared = sorted((v for v in variables if v.space == "shared"), key=lambda v: v.size == 0)  # dynamic ones at the end
    in_global = [v for v in variables if v.space in ("global", "const")]
    places, shared_size = _place(shared)
    locals_, local_size = _place([v for v in variables if v.space == "local"])
    params, param_size = _place(kernel.params)
    globals_ = {v.name: GLOBAL_VARIABLES + (k << 32) for k, v in enumerate(in_global)}
    symbols = places | locals_ | params | globals_
    slots = _Slots(kernel, symbols)
    program = core().Program()
    for instruction in kernel.instructions:
        try:
            slots.add(program, instruction)
        except ValueError as error:
            if isinstance(error, PTXError):
                raise
            raise PTXError(instruction.line, f"{error}, in `{instruction.text}`") from None
    if not kernel.instructions or kernel.instructions[-1].opcode not in ("ret", "exit", "bra", "bra.uni", "trap", "ret.uni"):
        slots.add(program, Instruction(kernel.line, "the end of the kernel", "exit", ()))
    return Encoded(kernel, program, len(kernel.registers), slots.count, slots.constant_values(), slots.special_names(), shared_size,
                   local_size, param_size, [(p, params[p.name]) for p in kernel.params], [(v, globals_[v.name]) for v in in_global],
                   program.kinds(), program.spaces())


class _Slots:
    def __init__(self, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.kernel, self.symbols = kernel, symbols
        self.registers = {name: k for k, name in enumerate(sorted(kernel.registers))}
        self.constants: dict[int, int] = {}
        self.specials: dict[str, int] = {}
        self.count = len(self.registers)
        self.sink = self._new()  # `_` as a destination

    def _new(self) -> int:
        self.count += 1
        return self.count - 1

    def constant(self, value: int) -> int:
        value &= (1 << 64) - 1
        if value not in self.constants:
            self.constants[value] = self._new()
        return self.constants[value]

    def constant_values(self) -> list[tuple[int, int]]:
        return [(slot, value) for value, slot in self.constants.items()]

    def special_names(self) -> list[tuple[int, str]]:
        return [(slot, name) for name, slot in self.specials.items()]

    def slot(self, value: Value, opcode: str) -> int:
        text = value.text
        if text in self.registers:
            return self.registers[text]
        if text == "_":
            return self.sink
        if text == "WARP_SZ":
            return self.constant(32)
        if text[0] == "%":
            if text not in self.specials:
                core().check_special(text)
                self.specials[text] = self._new()
            return self.specials[text]
        if text in self.symbols:
            return self.constant(self.symbols[text])
        number = literal(text)
        if isinstance(number, float):
            code, bits = ("<f", "<I") if opcode.endswith("f32") else ("<d", "<Q")
            number = struct.unpack(bits, struct.pack(code, number))[0]
        if number is None:
            raise ValueError(f"unknown symbol {text!r}")
        return self.constant(number)

    def add(self, program: Any, instruction: Instruction) -> None:
        opcode, operands, target = instruction.opcode, instruction.operands, 0
        if opcode.split(".")[0] in _BRANCHES:
            label = operands[0].text if len(operands) == 1 and isinstance(operands[0], Value) else ""
            if label not in self.kernel.labels:
                raise ValueError(f"unknown label {label!r}")
            target, operands = self.kernel.labels[label], ()
        opcode = _split_moves(opcode, operands)
        values = list(walk(operands))
        core().check_instruction(opcode, len(values))
        offset = sum(o.offset for o in operands if isinstance(o, Address))
        guard = instruction.guard
        if len(values) > 12:
            raise ValueError("too many operands")
        program.add(
            opcode,
            [self.slot(v, opcode) for v in values],
            self.registers[guard.text] if guard else -1,
            bool(guard and guard.negated),
            self.slot(instruction.also, opcode) if instruction.also else -1,
            offset,
            target,
            any(v.negated for v in values),
        )


def _split_moves(opcode: str, operands: tuple[Operand, ...]) -> str:
    """`mov` with a vector takes a register apart or puts one together: the core calls these unpack and pack."""
    name, _, kind = opcode.partition(".")
    vectors = [isinstance(o, Vector) for o in operands]
    if name != "mov" or not any(vectors):
        return opcode
    at = vectors.index(True)
    vector = operands[at]
    assert isinstance(vector, Vector)
    return f"{'pack' if at else 'unpack'}.v{len(vector.items)}.{kind}"
