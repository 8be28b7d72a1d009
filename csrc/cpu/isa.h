// The kernels of one instruction set. A source file sets TSBN_ISA and TSBN_VECTOR_BYTES (and the target pragma), then
// includes this once. All standard headers come before the pragma: see simd.h.

#define TSBN_LAMBDA __attribute__((always_inline))

namespace tsbn::cpu::TSBN_ISA {
namespace {
#include "simd.h"
#include "prefetch.h"
#include "elementary.h"
#include "../formulas.h"
#include "activation.h"
#include "rows.h"
#include "columns.h"
#include "coefficients.h"
#include "layer_norm_rows.h"
#include "layer_norm_tiles.h"

template <class Rows>
constexpr LayerKernels layer_of{Rows::forward, Rows::template backward<false>, Rows::template backward<true>};

template <class Slabs, template <class> class Act>
constexpr EpilogueKernels epilogue() {
  if constexpr (Act<F>::kInverts) {
    return {nullptr, Slabs::template products<Act, false>, nullptr, Slabs::template backward<Act>};
  } else {
    return {Slabs::template forward<Act>, Slabs::template products<Act, false>, Slabs::template products<Act, true>,
            Slabs::template backward<Act>};
  }
}

#define TSBN_EPILOGUE(name, Act) epilogue<Slabs, Act>(),
template <class Slabs>
constexpr SlabKernels slabs_of{Slabs::moments, Slabs::template forward<Identity>, Slabs::finish_shared,
                               Slabs::double_sums, Slabs::double_backward, {TSBN_ACTIVATIONS(TSBN_EPILOGUE)}};
#undef TSBN_EPILOGUE

template <template <class> class Slabs, class T>
constexpr Kernels kernels_of{slabs_of<Slabs<T>>, Coefficients<T>::kernels, layer_of<LayerRows<T>>, layer_of<LayerTiles<T>>,
                             LayerRows<T>::double_backward, kLanes<T>};
}  // namespace

#ifdef TSBN_HAS_BF16  // the other dtypes gain nothing by it
const Kernels& kernels(Family family) {
  static constexpr Kernels table[kFamilies] = {kernels_of<Rows, bf16>, kernels_of<Columns, bf16>};
  return table[int(family)];
}
#else
const Kernels& kernels(Family family, DType dtype) {
  static constexpr Kernels table[kFamilies][kDTypes] = {
      {kernels_of<Rows, f32>, kernels_of<Rows, f64>, kernels_of<Rows, f16>, kernels_of<Rows, bf16>},
      {kernels_of<Columns, f32>, kernels_of<Columns, f64>, kernels_of<Columns, f16>, kernels_of<Columns, bf16>}};
  return table[int(family)][int(dtype)];
}
#endif
}  // namespace tsbn::cpu::TSBN_ISA
