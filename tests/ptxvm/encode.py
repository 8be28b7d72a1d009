"""From a parsed kernel to the core's program: registers, constants and symbols become numbered slots."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from .build import core
from .ptx import Instruction, Kernel, Module, PTXError, Variable, literal

GLOBAL_VARIABLES = 1 << 43  # where module variables lie in the kernel's address space


@dataclass
class Encoded:
    """A kernel that the core can run; what depends on the launch is not in it."""

    kernel: Kernel
    program: Any
    layout: dict[str, Any]  # the part of the core's launch options that the text decides
    param_size: int
    params: list[tuple[Variable, int]]
    globals: list[tuple[Variable, int]]


def _place(variables: list[Variable]) -> tuple[dict[str, int], int]:
    """Addresses of variables one after the other, and the end."""
    places, end = {}, 0
    for variable in variables:
        places[variable.name] = -(-end // variable.align) * variable.align
        end = places[variable.name] + variable.size
    return places, end


def encode(module: Module, kernel: Kernel) -> Encoded:
    """Lays out the variables of a kernel and encodes its instructions."""
    variables = module.variables + kernel.variables
    shared = sorted((v for v in variables if v.space == "shared"), key=lambda v: v.size == 0)  # dynamic ones at the end
    shared_places, shared_size = _place(shared)
    local_places, local_size = _place([v for v in variables if v.space == "local"])
    params, param_size = _place(kernel.params)
    globals_ = [(v, GLOBAL_VARIABLES + (k << 32)) for k, v in enumerate(variables) if v.space in ("global", "const")]
    slots = _Slots(kernel, shared_places | local_places | params | {v.name: address for v, address in globals_})
    program = core().Program()
    for instruction in kernel.instructions:
        try:
            slots.add(program, instruction)
        except ValueError as error:
            raise PTXError(instruction.line, f"{error}, in `{instruction.text}`") from None
    slots.add(program, Instruction(kernel.line, "the end of the kernel", "exit", ()))
    layout = {
        "shared_size": shared_size, "local_size": local_size, "registers": len(kernel.registers), "slots": slots.count,
        "constants": [(slot, value) for value, slot in slots.constants.items()],
        "specials": [(slot, name) for name, slot in slots.specials.items()],
    }  # fmt: skip
    return Encoded(kernel, program, layout, param_size, [(p, params[p.name]) for p in kernel.params], globals_)


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

    def slot(self, name: str, opcode: str) -> int:
        if name in self.registers:
            return self.registers[name]
        if name == "_":
            return self.sink
        if name[0] == "%":
            if name not in self.specials:
                core().check_special(name)
                self.specials[name] = self._new()
            return self.specials[name]
        number = 32 if name == "WARP_SZ" else self.symbols.get(name, literal(name))
        if isinstance(number, float):
            code, bits = ("<f", "<I") if opcode.endswith("f32") else ("<d", "<Q")
            number = struct.unpack(bits, struct.pack(code, number))[0]
        if number is None:
            raise ValueError(f"unknown symbol {name!r}")
        return self.constant(number)

    def add(self, program: Any, instruction: Instruction) -> None:
        opcode, operands, target = _name_move(instruction), instruction.operands, 0
        if opcode.split(".")[0] == "bra":
            label = operands[0].names[0] if operands else ""
            if label not in self.kernel.labels:
                raise ValueError(f"unknown label {label!r}")
            target, operands = self.kernel.labels[label], ()
        names = [name for operand in operands for name in operand.names]
        core().check_instruction(opcode, len(names))
        if instruction.guard and instruction.guard not in self.registers:
            raise ValueError(f"register {instruction.guard} is not declared")
        guard = self.registers[instruction.guard] if instruction.guard else -1
        also = self.slot(instruction.also, opcode) if instruction.also else -1
        offset, negated = sum(o.offset for o in operands), any(o.negated for o in operands)
        slots = [self.slot(name, opcode) for name in names]
        program.add(opcode, slots, guard, instruction.negated, also, offset, target, negated)


def _name_move(instruction: Instruction) -> str:
    """`mov` with a vector takes a register apart or puts one together: the core calls these unpack and pack."""
    name, _, kind = instruction.opcode.partition(".")
    vectors = [(k, o) for k, o in enumerate(instruction.operands) if o.kind == "vector"]
    if name != "mov" or not vectors:
        return instruction.opcode
    position, vector = vectors[0]
    return f"{'pack' if position else 'unpack'}.v{len(vector.names)}.{kind}"
