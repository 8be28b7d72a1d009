// Elements and slots: how 16 bytes (or one element) of storage become values of the accumulate type, and back.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace tsbn::cuda {

template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };
template <class T> using Acc = typename Accumulate<T>::type;

// Two neighbours at once: one instruction rounds a pair of halves.
__device__ inline float2 widen(__half2 v) { return __half22float2(v); }
__device__ inline float2 widen(__nv_bfloat162 v) { return __bfloat1622float2(v); }
__device__ inline void narrow(float a, float b, __half2& v) { v = __floats2half2_rn(a, b); }
__device__ inline void narrow(float a, float b, __nv_bfloat162& v) { v = __floats2bfloat162_rn(a, b); }

template <class T> struct PairOf;
template <> struct PairOf<__half> { using type = __half2; };
template <> struct PairOf<__nv_bfloat16> { using type = __nv_bfloat162; };

// V elements of storage. A vector is held as words, for which the compiler emits one 16-byte access.
template <class T, int V> struct Slot {
  static_assert(V * sizeof(T) == 16);
  uint4 words;

  __device__ const T* elements() const { return reinterpret_cast<const T*>(&words); }
  __device__ void get(Acc<T> (&v)[V]) const {
    if constexpr (sizeof(T) == 2) {
      const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 pair = widen(reinterpret_cast<const typename PairOf<T>::type&>(w[k]));
        v[2 * k] = pair.x;
        v[2 * k + 1] = pair.y;
      }
    } else if constexpr (sizeof(T) == 4) {
      v[0] = __uint_as_float(words.x), v[1] = __uint_as_float(words.y);
      v[2] = __uint_as_float(words.z), v[3] = __uint_as_float(words.w);
    } else {
      v[0] = __hiloint2double(words.y, words.x), v[1] = __hiloint2double(words.w, words.z);
    }
  }
  __device__ void set(const Acc<T> (&v)[V]) {
    if constexpr (sizeof(T) == 2) {
      uint32_t w[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        narrow(v[2 * k], v[2 * k + 1], reinterpret_cast<typename PairOf<T>::type&>(w[k]));
      }
      words = {w[0], w[1], w[2], w[3]};
    } else if constexpr (sizeof(T) == 4) {
      words = {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
    } else {
      words = {unsigned(__double2loint(v[0])), unsigned(__double2hiint(v[0])), unsigned(__double2loint(v[1])),
               unsigned(__double2hiint(v[1]))};
    }
  }
  __device__ void load(const T* p) { words = *reinterpret_cast<const uint4*>(p); }
  // Written past what will be read again: the second pass wants its x in L2.
  __device__ void store(T* p) const { __stcs(reinterpret_cast<uint4*>(p), words); }

  // Of a slot that a run does not fill. Elements out of [low, high) are neither read nor written, and are 0.
  __device__ void load(const T* p, int low, int high) {
    T e[V];
#pragma unroll
    for (int v = 0; v < V; ++v) e[v] = low <= v && v < high ? p[v] : T(0.0f);
    memcpy(&words, e, sizeof(words));
  }
  __device__ void store(T* p, int low, int high) const {
    T e[V];
    memcpy(e, &words, sizeof(words));
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (low <= v && v < high) p[v] = e[v];
    }
  }
};

template <class T> struct Slot<T, 1> {
  T value;
  __device__ void get(Acc<T> (&v)[1]) const { v[0] = Acc<T>(value); }
  __device__ void set(const Acc<T> (&v)[1]) { value = T(v[0]); }
  __device__ void load(const T* p) { value = *p; }
  __device__ void store(T* p) const { *p = value; }
  __device__ void load(const T* p, int, int) { load(p); }
  __device__ void store(T* p, int, int) const { store(p); }
};

template <class T, class A, int V> __device__ Slot<T, V> slot_of(const A (&v)[V]) {
  Slot<T, V> slot;
  slot.set(v);
  return slot;
}

// ---- parameters: [T, C] vectors of any dtype ---------------------------------------------------------------------

template <class A> __device__ A load_parameter(const void* data, const Vector& v, int64_t t, int64_t c) {
  const int64_t i = t * v.t + c * v.c;
  switch (v.dtype) {
    case f32: return A(static_cast<const float*>(data)[i]);
    case f64: return A(static_cast<const double*>(data)[i]);
    case f16: return A(__half2float(static_cast<const __half*>(data)[i]));
    default: return A(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]));
  }
}

template <class A> __device__ void store_parameter(void* data, int64_t dtype, int64_t i, A value) {
  switch (dtype) {
    case f32: static_cast<float*>(data)[i] = float(value); break;
    case f64: static_cast<double*>(data)[i] = double(value); break;
    case f16: static_cast<__half*>(data)[i] = __float2half_rn(float(value)); break;
    default: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(float(value));
  }
}

template <class A> __device__ A load_bias(const Params& p, int64_t t, int64_t c) {
  return p.bias_data != nullptr ? load_parameter<A>(p.bias_data, p.n.bias, t, c) : A(0);
}

// The gate and its derivative. 1 - sigmoid(w) is sigmoid(-w): the difference would lose all digits for large w.
template <class A> struct Gate {
  A value, slope;
  __device__ Gate(A w, bool sigmoid) : value(w), slope(1) {
    if (!sigmoid) return;
    const A e = exp(-abs(w)), near = A(1) / (A(1) + e), far = e * near;
    value = w < A(0) ? far : near;
    slope = near * far;
  }
};

}  // namespace tsbn::cuda
