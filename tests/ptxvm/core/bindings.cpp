// The Python module: decode, and run a launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "instructions.hpp"
#include "machine.hpp"

namespace py = pybind11;
using namespace ptxvm;

namespace {

struct Program {
  std::vector<Inst> code;

  void add(const std::string& opcode, const std::vector<s32>& operands, s32 guard, bool negated, s32 also, s64 offset, u32 target,
           bool negated_c) {
    Inst inst = decode(opcode, int(operands.size()));
    std::copy(operands.begin(), operands.end(), inst.op.begin());
    inst.guard = guard, inst.negated = negated, inst.also = also, inst.offset = offset, inst.target = target;
    inst.negated_c = negated_c;
    inst.index = u32(code.size());
    code.push_back(inst);
  }
};

Dim to_dim(const std::array<u32, 3>& sizes) { return {sizes[0], sizes[1], sizes[2]}; }

// `regions`: name, address, size, host address of the bytes, host address of their states, readonly, host address for
// the number of writes to each byte or 0.
using RegionArgument = std::tuple<std::string, u64, u64, u64, u64, bool, u64>;

py::dict run(const Program& program, const std::array<u32, 3>& grid, const std::array<u32, 3>& block, const std::array<u32, 3>& cluster,
             py::dict options, const std::vector<RegionArgument>& regions, py::bytes params) {
  Machine m;
  m.code = program.code;
  Launch& l = m.launch;
  l.grid = to_dim(grid), l.block = to_dim(block), l.cluster = to_dim(cluster);
  l.shared_size = options["shared_size"].cast<u64>();
  l.dynamic_shared = options["dynamic_shared"].cast<u64>();
  l.local_size = options["local_size"].cast<u64>();
  l.cooperative = options["cooperative"].cast<bool>();
  l.explicit_cluster = options["explicit_cluster"].cast<bool>();
  l.lanes_may_collide = options["lanes_may_collide"].cast<bool>();
  l.order = options["order"].cast<int>();
  l.seed = options["seed"].cast<u64>();
  l.patience = options["patience"].cast<u64>();
  l.registers = options["registers"].cast<u32>();
  l.slots = options["slots"].cast<u32>();
  l.constants = options["constants"].cast<std::vector<std::pair<u32, u64>>>();
  l.specials = options["specials"].cast<std::vector<std::pair<u32, std::string>>>();
  l.grid_workspace = options["grid_workspace"].cast<u64>();
  for (const auto& [name, base, size, data, state, readonly, counts] : regions) {
    Region r;
    r.name = name, r.base = base, r.size = size, r.readonly = readonly;
    r.data = reinterpret_cast<u8*>(data), r.state = reinterpret_cast<u8*>(state);
    if (!readonly) r.track();
    m.regions.push_back(std::move(r));
  }
  std::string bytes = params;
  std::vector<u8> states(bytes.size(), written);
  m.params.name = "the parameters", m.params.size = bytes.size(), m.params.readonly = true;
  m.params.data = reinterpret_cast<u8*>(bytes.data()), m.params.state = states.data();

  py::dict result;
  try {
    m.run();
  } catch (const Violation& v) {
    result["violation"] = py::make_tuple(v.kind, v.what(), v.inst, v.other_inst, v.block, v.thread, v.address);
  }
  for (size_t k = 0; k < regions.size(); ++k) {
    const Region& r = m.regions[k];
    u8* counts = reinterpret_cast<u8*>(std::get<6>(regions[k]));
    if (!counts) continue;
    for (u64 byte = 0; byte < r.size; ++byte) counts[byte] = u8(std::min<u32>(255, r.cells[byte / r.granule].writes));
  }
  py::list counters;
  for (const Counter& c : m.counters) counters.append(py::make_tuple(c.warps, c.threads, c.requests, c.bytes, c.sectors, c.conflicts, c.divergent, c.collisions));
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
      .def("add", &Program::add)
      .def("kinds", [](const Program& p) {
        std::vector<std::string> names;
        for (const Inst& i : p.code) names.push_back(class_names[int(i.kind)]);
        return names;
      })
      .def("spaces", [](const Program& p) {
        static const char* const names[] = {"generic", "global", "shared", "local", "param"};
        std::vector<std::string> spaces;
        for (const Inst& i : p.code) spaces.push_back(names[int(i.space)]);
        return spaces;
      });
  module.def("check_instruction", [](const std::string& opcode, int operands) { decode(opcode, operands); });
  module.def("check_special", [](const std::string& name) { special(name); });
  module.def("run", &run);
}
