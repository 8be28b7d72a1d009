// The activations: name and formula (see formulas.h). All that C++ knows of them by name is made of these rows, which are
// those of EPILOGUES in tsbn_kernels/definition/activations.py, in its order.
#pragma once
#include <cstdint>

#define TSBN_ACTIVATIONS(row) \
  row(none, None)             \
  row(relu, Relu)             \
  row(leaky_relu, LeakyRelu)  \
  row(silu, Silu)             \
  row(gelu, Gelu)             \
  row(gelu_tanh, GeluTanh)    \
  row(hardswish, Hardswish)   \
  row(relu6, Clamp)           \
  row(hardtanh, Clamp)        \
  row(inverse_leaky_relu, InverseLeakyRelu)

namespace tsbn {

#define TSBN_ENUMERATOR(name, Act) name,
enum class Activation : int64_t { TSBN_ACTIVATIONS(TSBN_ENUMERATOR) };
#undef TSBN_ENUMERATOR

#define TSBN_STRING(name, Act) #name,
inline constexpr const char* kActivationNames[] = {TSBN_ACTIVATIONS(TSBN_STRING)};
#undef TSBN_STRING
inline constexpr int kActivations = sizeof(kActivationNames) / sizeof(kActivationNames[0]);

}  // namespace tsbn
