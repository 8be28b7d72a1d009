// A decoded kernel: instructions with their handlers, and the table that maps PTX text to handlers.
#pragma once
#include <array>
#include <string>
#include <vector>

#include "numbers.hpp"

struct Warp;
struct Inst;
using Handler = void (*)(Warp&, const Inst&);

enum class Space : u8 { generic, global, shared, local, param };
enum class Scope : u8 { weak, block, cluster, grid };  // weak: an ordinary access, no synchronisation

// Relations of two values, as bits, so that a comparison is a set of accepted relations.
enum Relation : u8 { less = 1, equal = 2, greater = 4, unordered = 8 };

struct Inst {
  Handler run;
  const char* kind;              // its class, for the report
  s32 guard = -1;                // slot of the guard predicate
  bool guard_negated = false;    // @!p
  s32 also = -1;                 // slot of the second result in `d|p`
  std::array<s32, 12> op{};      // slots of the operands, vectors flattened, in the order of the text
  u8 operands = 0;
  u32 index = 0;                 // position in the program
  u32 target = 0;                // of a branch
  s64 offset = 0;                // of an address operand
  // The modifiers
  u8 vec = 1;
  u8 accepts = 0;                // relations that make a comparison true
  u8 function = 0;               // and or xor: 1 2 3; up down bfly idx: 0 1 2 3
  bool ftz = false, sat = false, relu = false, absolute = false;
  bool integral = false;         // round to an integer (.rni ...)
  bool largest = false, keeps_nan = false;  // max, not min; .NaN
  bool left = false, wrap = false;          // of shf
  bool negated = false;          // a predicate operand written `!c`
  bool transposed = false;       // matrices
  bool constant = false;         // ld.nc: the memory must not change during the launch
  bool acquires = false, releases = false, relaxed = false;
  bool aligned = false;          // a barrier that all lanes reach together
  bool arrives = false, reduces = false;    // bar.arrive, bar.red
  Rounding rounding = Rounding::nearest;
  Space space = Space::generic;
  Scope scope = Scope::weak;
};

// Declares one form of instruction. The pattern is the ISA's syntax: the opcode and its modifiers in order, `a|b` for
// a choice and a final `?` for one that may be missing: "min|max ftz? NaN? f32".
// `operands` counts a vector as one; `optional` more may follow.
void on(const std::string& pattern, int operands, Handler run, int optional = 0);

// The class of the instructions that the following `on` calls declare.
void section(const char* kind);

// The instruction set, by chapter.
void declare_arithmetic();   // integers, bits, floats, comparisons
void declare_conversions();  // cvt, mov, address arithmetic
void declare_memory();       // ld, st, atom, red, fences
void declare_control();      // branches, barriers, shuffles, votes

// Finds the handler of an instruction and reads its modifiers; throws std::invalid_argument for an unknown one.
Inst decode(const std::string& opcode, int operands);
