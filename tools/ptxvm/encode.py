"""From a parsed kernel to the core's program: registers, constants and symbols become numbered slots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .build import core
from .ptx import Instruction, Kernel, Module, PTXError, Variable, literal

GLOBAL_VARIABLES = 1 << 43  # where module variables lie in the kernel's address space


@dataclass
class Encoded:
    """A kernel that the core can run; what depends on the launch is not in it."""

    kernel: Kernel
    code: list[Any]
    layout: dict[str, Any]  # the part of the core's launch options that the text decides
    param_size: int
    params: list[tuple[Variable, int]]
    globals: list[tuple[Variable, int]]
    module: Module

    @cached_property
    def heads(self) -> list[tuple[int, str, str, str, str, str]]:
        """What rows of a report say of each instruction before its counts: those of all launches say the same."""
        return [
            (i.line, i.text, self.module.describe(i.location), i.opcode, inst.kind, inst.space)
            for i, inst in zip(self.kernel.instructions, self.code, strict=False)
        ]


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
    symbols = shared_places | local_places | params | {v.name: address for v, address in globals_}
    encoder = _Encoder(kernel, symbols)
    for instruction in kernel.instructions:
        try:
            encoder.add(instruction)
        except ValueError as error:
            raise PTXError(instruction.line, f"{error}, in `{instruction.text}`") from None
    encoder.add(Instruction(kernel.line, "the end of the kernel", "exit", ()))
    registers, slots = len(kernel.registers), list(encoder.slots.items())
    constants = [(slot, value) for value, slot in slots if isinstance(value, int)]
    specials = [(slot, name) for name, slot in slots[registers:] if isinstance(name, str) and name != "_"]
    layout = {
        "shared_size": shared_size,
        "local_size": local_size,
        "registers": registers,
        "slots": len(slots),
        "constants": constants,
        "specials": specials,
    }
    passed = [(p, params[p.name]) for p in kernel.params]
    return Encoded(kernel, encoder.code, layout, param_size, passed, globals_, module)


class _Encoder:
    def __init__(self, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.kernel, self.symbols = kernel, symbols
        self.code: list[Any] = []
        # By name, or by value for constants: registers come first.
        self.slots: dict[str | int, int] = {name: k for k, name in enumerate(sorted(kernel.registers))}

    def slot(self, name: str, opcode: str) -> int:
        """The slot of a register, a special register, `_` as a destination, a symbol or a literal."""
        if name[0] == "%" and name not in self.slots:
            core().check_special(name)
        if name in self.slots or name == "_" or name[0] == "%":
            return self.slots.setdefault(name, len(self.slots))
        number = 32 if name == "WARP_SZ" else self.symbols.get(name, literal(name, opcode[-3:]))
        if number is None:
            raise ValueError(f"unknown symbol {name!r}")
        return self.slots.setdefault(number % (1 << 64), len(self.slots))

    def add(self, i: Instruction) -> None:
        opcode, operands, target = _name_move(i), i.operands, 0
        if opcode.split(".")[0] == "bra":
            label = operands[0][0] if operands else ""
            if label not in self.kernel.labels:
                raise ValueError(f"unknown label {label!r}")
            target, operands = self.kernel.labels[label], ()
        names = [name for operand in operands for name in operand]
        inst = core().decode(opcode, len(names))
        if i.guard and i.guard not in self.slots:
            raise ValueError(f"register {i.guard} is not declared")
        if i.guard:
            inst.guard, inst.guard_negated = self.slots[i.guard], i.guard_negated
        if i.also:
            inst.also = self.slot(i.also, opcode)
        inst.op = [self.slot(name, opcode) for name in names] + [0] * (len(inst.op) - len(names))
        inst.offset, inst.target, inst.negated = i.offset, target, i.negated
        self.code.append(inst)


def _name_move(instruction: Instruction) -> str:
    """`mov` with a vector takes a register apart or puts one together: the core calls these unpack and pack."""
    name, _, kind = instruction.opcode.partition(".")
    sizes = [len(operand) for operand in instruction.operands]
    if name != "mov" or max(sizes) == 1:
        return instruction.opcode
    return f"{'pack' if sizes[0] == 1 else 'unpack'}.v{max(sizes)}.{kind}"
