// The Python module: decode, and run a launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "machine.hpp"

namespace py = pybind11;

using Sizes = std::array<u32, 3>;
static Dim to_dim(const Sizes& sizes) { return {sizes[0], sizes[1], sizes[2]}; }

// `regions`: name, address, size, host address of the bytes, host address of their states, readonly, host address for
// the number of writes to each byte or 0.
using RegionArgument = std::tuple<std::string, u64, u64, u64, u64, bool, u64>;

static py::dict run(std::vector<Inst> code, const Sizes& grid, const Sizes& block, const Sizes& cluster,
                    py::dict options, const std::vector<RegionArgument>& regions, py::bytes params) {
  Machine m;
  m.code = std::move(code);
  for (u32 k = 0; k < m.code.size(); ++k) m.code[k].index = k;
  Launch& l = m.launch;
  l.grid = to_dim(grid), l.block = to_dim(block), l.cluster = to_dim(cluster);
  const auto get = [&options](const char* name, auto& field) {
    field = options[name].cast<std::decay_t<decltype(field)>>();
  };
  get("shared_size", l.shared_size), get("dynamic_shared", l.dynamic_shared), get("local_size", l.local_size);
  get("resident", l.resident), get("explicit_cluster", l.explicit_cluster);
  get("stores_may_collide", l.stores_may_collide);
  get("order", l.order), get("seed", l.seed), get("patience", l.patience), get("grid_workspace", l.grid_workspace);
  get("registers", l.registers), get("slots", l.slots), get("constants", l.constants), get("specials", l.specials);
  for (const auto& [name, base, size, data, state, readonly, counts] : regions) {
    m.regions.push_back({name, base, size, reinterpret_cast<u8*>(data), reinterpret_cast<u8*>(state),
                         reinterpret_cast<u8*>(counts), readonly});
    if (!readonly) m.regions.back().track();
  }
  std::string bytes = params, states(bytes.size(), char(written));
  m.params = {"the parameters", 0, bytes.size(), reinterpret_cast<u8*>(bytes.data()),
              reinterpret_cast<u8*>(states.data()), nullptr, true};
  py::dict result;
  try {
    m.run();
  } catch (const Violation& v) {
    result["violation"] = py::make_tuple(v.kind, v.message, v.inst, v.other_inst, v.block, v.thread, v.address);
  }
  result["counters"] = py::bytes(reinterpret_cast<const char*>(m.counters.data()), m.counters.size() * sizeof(Counter));
  return result;
}

PYBIND11_MODULE(ptxvm_core, module) {
  declare_arithmetic();
  declare_conversions();
  declare_memory();
  declare_control();
  py::class_<Inst>(module, "Inst")
      .def_readwrite("op", &Inst::op).def_readwrite("also", &Inst::also).def_readwrite("offset", &Inst::offset)
      .def_readwrite("guard", &Inst::guard).def_readwrite("guard_negated", &Inst::guard_negated)
      .def_readwrite("negated", &Inst::negated).def_readwrite("target", &Inst::target)
      .def_readonly("kind", &Inst::kind)
      .def_property_readonly("space", [](const Inst& i) {
        const char* spaces[] = {"", "global", "shared", "local", "param"};  // "": of generic addresses
        return spaces[int(i.space)];
      });
  module.def("decode", &decode);
  module.def("check_special", [](const std::string& name) { special(name); });
  module.def("run", &run);
}
