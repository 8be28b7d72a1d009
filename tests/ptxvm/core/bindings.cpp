// The Python module: decode, and run a launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "machine.hpp"

namespace py = pybind11;
using namespace ptxvm;

namespace {

struct Program {
  std::vector<Inst> code;

  void add(const std::string& opcode, const std::vector<s32>& operands, s32 guard, bool negated, s32 also, s64 offset,
           u32 target, bool negated_c) {
    Inst inst = decode(opcode, int(operands.size()));
    std::copy(operands.begin(), operands.end(), inst.op.begin());
    inst.guard = guard, inst.negated = negated, inst.also = also, inst.offset = offset, inst.target = target;
    inst.negated_c = negated_c;
    inst.index = u32(code.size());
    code.push_back(inst);
  }
};

using Sizes = std::array<u32, 3>;
Dim to_dim(const Sizes& sizes) { return {sizes[0], sizes[1], sizes[2]}; }

// `regions`: name, address, size, host address of the bytes, host address of their states, readonly, host address for
// the number of writes to each byte or 0.
using RegionArgument = std::tuple<std::string, u64, u64, u64, u64, bool, u64>;

py::dict run(const Program& program, const Sizes& grid, const Sizes& block, const Sizes& cluster, py::dict options,
             const std::vector<RegionArgument>& regions, py::bytes params) {
  Machine m;
  m.code = program.code;
  Launch& l = m.launch;
  l.grid = to_dim(grid), l.block = to_dim(block), l.cluster = to_dim(cluster);
  const auto get = [&options](const char* name, auto& field) {
    field = options[name].cast<std::decay_t<decltype(field)>>();
  };
  get("shared_size", l.shared_size), get("dynamic_shared", l.dynamic_shared), get("local_size", l.local_size);
  get("cooperative", l.cooperative), get("explicit_cluster", l.explicit_cluster);
  get("stores_may_collide", l.stores_may_collide);
  get("order", l.order), get("seed", l.seed), get("patience", l.patience), get("grid_workspace", l.grid_workspace);
  get("registers", l.registers), get("slots", l.slots), get("constants", l.constants), get("specials", l.specials);
  for (const auto& [name, base, size, data, state, readonly, counts] : regions) {
    Region r{name, base, size, reinterpret_cast<u8*>(data), reinterpret_cast<u8*>(state), readonly};
    if (!readonly) r.track();
    m.regions.push_back(std::move(r));
  }
  std::string bytes = params, states(bytes.size(), char(written));
  m.params = {"the parameters", 0, bytes.size(), reinterpret_cast<u8*>(bytes.data()),
              reinterpret_cast<u8*>(states.data()), true};
  py::dict result;
  try {
    m.run();
  } catch (const Violation& v) {
    result["violation"] = py::make_tuple(v.kind, v.message, v.inst, v.other_inst, v.block, v.thread, v.address);
  }
  for (size_t k = 0; k < regions.size(); ++k) {
    const Region& r = m.regions[k];
    u8* counts = reinterpret_cast<u8*>(std::get<6>(regions[k]));
    if (!counts) continue;
    for (u64 byte = 0; byte < r.size; ++byte) counts[byte] = u8(std::min<u32>(255, r.cells[byte / r.granule].writes));
  }
  py::list counters;
  for (size_t k = 0; k < m.code.size(); ++k) {
    const Counter& c = m.counters[k];
    static const char* const spaces[] = {"generic", "global", "shared", "local", "param"};
    const char* space = spaces[int(m.code[k].space)];
    if (m.code[k].space == Space::generic) space = c.sectors ? "global" : "shared";  // where the accesses went
    const char* kind = class_names[int(m.code[k].kind)];
    counters.append(py::make_tuple(kind, space, c.warps, c.threads, c.requests, c.bytes, c.sectors, c.conflicts,
                                   c.divergent, c.collisions));
  }
  result["counters"] = counters;
  return result;
}

}  // namespace

PYBIND11_MODULE(ptxvm_core, module) {
  declare_arithmetic();
  declare_conversions();
  declare_memory();
  declare_control();
  py::class_<Program>(module, "Program")
      .def(py::init<>())
      .def("add", &Program::add);
  module.def("check_instruction", [](const std::string& opcode, int operands) { decode(opcode, operands); });
  module.def("check_special", [](const std::string& name) { special(name); });
  module.def("run", &run);
}
