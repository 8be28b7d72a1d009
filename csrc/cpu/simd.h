// Vectors of one instruction set. Included once per instruction set, inside a namespace of its own and after a
// `#pragma GCC target`; nothing here may pull in a standard header (its inline code would be compiled for that target).
// TSBN_VECTOR_BYTES is the register width; arithmetic is GCC's and Clang's vector extension, lane by lane.

using f32 = float;
using f64 = double;
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

template <class T> struct AccumulateIn { using type = float; };
template <> struct AccumulateIn<f64> { using type = double; };
template <class T> using Acc = typename AccumulateIn<T>::type;  // sums of fp16, bf16 and fp32 are kept in fp32

constexpr int kFloats = TSBN_VECTOR_BYTES / 4, kDoubles = TSBN_VECTOR_BYTES / 8;
typedef float F __attribute__((vector_size(TSBN_VECTOR_BYTES)));
typedef double D __attribute__((vector_size(TSBN_VECTOR_BYTES)));
typedef uint32_t U __attribute__((vector_size(TSBN_VECTOR_BYTES)));
typedef uint16_t H __attribute__((vector_size(TSBN_VECTOR_BYTES / 2)));

template <class A> struct VectorOf { using type = F; };
template <> struct VectorOf<double> { using type = D; };
template <class T> using Vec = typename VectorOf<Acc<T>>::type;
template <class T> constexpr int kLanes = TSBN_VECTOR_BYTES / int(sizeof(Acc<T>));

#define TSBN_INLINE inline __attribute__((always_inline))

template <class V, class P> TSBN_INLINE V load_bits(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class P> TSBN_INLINE void store_bits(P* p, V v) { __builtin_memcpy(p, &v, sizeof(V)); }

template <class To, class From> TSBN_INLINE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &v, sizeof(To));
  return to;
}

// ---- conversions: storage bits to fp32 and back, to nearest even -------------------------------------------------

// GCC 12 makes five instructions of __builtin_convertvector where one does.
TSBN_INLINE U zero_extend(H h) {
#if TSBN_VECTOR_BYTES == 64
  return (U)_mm512_cvtepu16_epi32((__m256i)h);
#elif TSBN_VECTOR_BYTES == 32
  return (U)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, U);
#endif
}
TSBN_INLINE H truncate(U u) {
#if TSBN_VECTOR_BYTES == 64
  return (H)_mm512_cvtepi32_epi16((__m512i)u);
#else
  return __builtin_convertvector(u, H);
#endif
}

// The bits of bfloat16 are the upper half of float32's.
#if TSBN_VECTOR_BYTES == 64
typedef int16_t W __attribute__((vector_size(64)));
TSBN_INLINE F widen(H h, bf16*) {
  constexpr W word = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return (F)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, (__m512i)word, _mm512_castsi256_si512((__m256i)h));
}
#else
TSBN_INLINE F widen(H h, bf16*) { return bit_cast<F>(zero_extend(h) << 16); }
#endif

TSBN_INLINE H round_to_bf16(F f) {
  const U bits = bit_cast<U>(f);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U quiet_nan = (bits >> 16) | 0x40u;
  return truncate(f == f ? rounded : quiet_nan);
}
#ifdef TSBN_HAS_BF16
TSBN_INLINE H narrow(F f, bf16*) {
  constexpr int kSubnormal = 0x20;  // the instruction takes them for zero
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)f, kSubnormal) != 0, 0)) return round_to_bf16(f);
  return (H)_mm512_cvtneps_pbh((__m512)f);
}
#else
TSBN_INLINE H narrow(F f, bf16*) { return round_to_bf16(f); }
#endif

#ifdef TSBN_HAS_F16C
TSBN_INLINE F widen(H h, f16*) {
#if TSBN_VECTOR_BYTES == 64
  return (F)_mm512_cvtph_ps((__m256i)h);
#else
  return (F)_mm256_cvtph_ps((__m128i)h);
#endif
}
TSBN_INLINE H narrow(F f, f16*) {
#if TSBN_VECTOR_BYTES == 64
  return (H)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (H)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}
#else
TSBN_INLINE F widen(H h, f16*) {
  const U u = zero_extend(h), magnitude = u & 0x7fffu;
  // The fp16 exponent and mantissa read as fp32 are 2^112 too small, subnormals included.
  const F scaled = bit_cast<F>(magnitude << 13) * 0x1p112f;
  const U special = (magnitude << 13) | 0x7f800000u;
  return bit_cast<F>((magnitude >= 0x7c00u ? special : bit_cast<U>(scaled)) | ((u & 0x8000u) << 16));
}
TSBN_INLINE H narrow(F f, f16*) {
  const U bits = bit_cast<U>(f), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves the fp16 subnormal, rounded to nearest even, in the low mantissa bits.
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
  const U nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  U half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? U{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? nan : half;
  return truncate(half | sign);
}
#endif

// ---- loads and stores --------------------------------------------------------------------------------------------

TSBN_INLINE F load(const f32* p) { return load_bits<F>(p); }
TSBN_INLINE D load(const f64* p) { return load_bits<D>(p); }
template <class T> TSBN_INLINE F load(const T* p) { return widen(load_bits<H>(p), (T*)nullptr); }

TSBN_INLINE void store(f32* p, F v) { store_bits(p, v); }
TSBN_INLINE void store(f64* p, D v) { store_bits(p, v); }
template <class T> TSBN_INLINE void store(T* p, F v) { store_bits(p, narrow(v, (T*)nullptr)); }

// The nearest value of storage type T. x - origin of such an origin is exact for most halves: with a full fp32 origin
// all differences share their low bits, and every add of a sum rounds the same way.
template <class T> TSBN_INLINE F rounded(F v) { return widen(narrow(v, (T*)nullptr), (T*)nullptr); }
template <> TSBN_INLINE F rounded<f32>(F v) { return v; }
template <class T> TSBN_INLINE D rounded(D v) { return v; }

// Streaming stores write whole cache lines past the caches: the line is not read first. `p` is aligned to the store.
#if TSBN_VECTOR_BYTES == 64
TSBN_INLINE void stream_bits(void* p, F v) { _mm512_stream_ps((float*)p, (__m512)v); }
TSBN_INLINE void stream_bits(void* p, D v) { _mm512_stream_pd((double*)p, (__m512d)v); }
TSBN_INLINE void stream_bits(void* p, H v) { _mm256_stream_si256((__m256i*)p, (__m256i)v); }
#elif TSBN_VECTOR_BYTES == 32
TSBN_INLINE void stream_bits(void* p, F v) { _mm256_stream_ps((float*)p, (__m256)v); }
TSBN_INLINE void stream_bits(void* p, D v) { _mm256_stream_pd((double*)p, (__m256d)v); }
TSBN_INLINE void stream_bits(void* p, H v) { _mm_stream_si128((__m128i*)p, (__m128i)v); }
#else
template <class V> TSBN_INLINE void stream_bits(void* p, V v) { store_bits(p, v); }
#endif

TSBN_INLINE void stream(f32* p, F v) { stream_bits(p, v); }
TSBN_INLINE void stream(f64* p, D v) { stream_bits(p, v); }
template <class T> TSBN_INLINE void stream(T* p, F v) { stream_bits(p, narrow(v, (T*)nullptr)); }

// The first `count` < lanes elements; the other lanes get `fill`.
#if TSBN_VECTOR_BYTES == 64
TSBN_INLINE F load_first(const f32* p, int count, F fill) {
  return (F)_mm512_mask_loadu_ps((__m512)fill, __mmask16((1u << count) - 1), p);
}
TSBN_INLINE D load_first(const f64* p, int count, D fill) {
  return (D)_mm512_mask_loadu_pd((__m512d)fill, __mmask8((1u << count) - 1), p);
}
template <class T> TSBN_INLINE F load_first(const T* p, int count, F fill) {
  const __mmask16 mask = __mmask16((1u << count) - 1);
  const F v = widen((H)_mm256_maskz_loadu_epi16(mask, p), (T*)nullptr);
  return (F)_mm512_mask_mov_ps((__m512)fill, mask, (__m512)v);
}
TSBN_INLINE void store_first(f32* p, int count, F v) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
}
TSBN_INLINE void store_first(f64* p, int count, D v) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
}
template <class T> TSBN_INLINE void store_first(T* p, int count, F v) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)narrow(v, (T*)nullptr));
}
#elif TSBN_VECTOR_BYTES == 32
TSBN_INLINE __m256i first_lanes(const float*, int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TSBN_INLINE __m256i first_lanes(const double*, int count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
TSBN_INLINE F load_first(const f32* p, int count, F fill) {
  const __m256i mask = first_lanes(p, count);
  return (F)_mm256_blendv_ps((__m256)fill, _mm256_maskload_ps(p, mask), (__m256)mask);
}
TSBN_INLINE D load_first(const f64* p, int count, D fill) {
  const __m256i mask = first_lanes(p, count);
  return (D)_mm256_blendv_pd((__m256d)fill, _mm256_maskload_pd(p, mask), (__m256d)mask);
}
TSBN_INLINE void store_first(f32* p, int count, F v) { _mm256_maskstore_ps(p, first_lanes(p, count), (__m256)v); }
TSBN_INLINE void store_first(f64* p, int count, D v) { _mm256_maskstore_pd(p, first_lanes(p, count), (__m256d)v); }

// Halves have no masks. A word that ends with the last one overlaps the word in front of it.
template <class T> TSBN_INLINE F load_first(const T* p, int count, F fill) {
  const auto end = [&](auto word) TSBN_LAMBDA { return uint64_t(load_bits<decltype(word)>(p + count - sizeof(word) / 2)); };
  uint64_t words[2] = {};
  if (count >= 4) {
    words[0] = load_bits<uint64_t>(p);
    words[1] = count == 4 ? 0 : end(uint64_t()) >> (16 * (8 - count));
  } else {
    words[0] = load_bits<uint16_t>(p) | (count < 2 ? 0 : end(uint32_t()) << (16 * (count - 2)));
  }
  const F v = widen(load_bits<H>(words), (T*)nullptr);
  return (F)_mm256_blendv_ps((__m256)fill, (__m256)v, (__m256)first_lanes((const float*)nullptr, count));
}
template <class T> TSBN_INLINE void store_first(T* p, int count, F v) {
  uint64_t words[2];
  store_bits(words, narrow(v, (T*)nullptr));
  const char* last = reinterpret_cast<const char*>(words) + 2 * count;
  if (count >= 4) {
    store_bits(p, words[0]);
    store_bits(p + count - 4, load_bits<uint64_t>(last - 8));
  } else if (count >= 2) {
    store_bits(p, uint32_t(words[0]));
    store_bits(p + count - 2, load_bits<uint32_t>(last - 4));
  } else if (count == 1) {
    store_bits(p, uint16_t(words[0]));
  }
}
#else
// Loops, seldom run and too long to be copied into each kernel.
template <class T> __attribute__((noinline)) Vec<T> load_first(const T* p, int count, Vec<T> fill) {
  T values[kLanes<T>] = {};
  for (int i = 0; i < count; ++i) values[i] = p[i];
  const Vec<T> v = load(values);
  Acc<T> lanes[kLanes<T>], rest[kLanes<T>];
  store(lanes, v);
  store(rest, fill);
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i < count ? lanes[i] : rest[i];
  return load(lanes);
}
template <class T> __attribute__((noinline)) void store_first(T* p, int count, Vec<T> v) {
  T values[kLanes<T>];
  store(values, v);
  for (int i = 0; i < count; ++i) p[i] = values[i];
}
#endif

template <class T> TSBN_INLINE Vec<T> load_up_to(const T* p, int count, Vec<T> fill) {
  return count == kLanes<T> ? load(p) : load_first(p, count, fill);
}

template <class T> TSBN_INLINE void store_up_to(T* p, int count, Vec<T> v) {
  if (count == kLanes<T>) store(p, v);
  else store_first(p, count, v);
}

// Stores to an output: whole vectors past the caches where `streams`, a bool or a constant.
template <class T, class Bool> TSBN_INLINE void write(T* p, int count, Vec<T> v, Bool streams) {
  if (count < kLanes<T>) store_first(p, count, v);
  else if (streams) stream(p, v);
  else store(p, v);
}
template <bool value> struct Constant {
  TSBN_INLINE constexpr operator bool() const { return value; }
};

#if TSBN_VECTOR_BYTES == 64
TSBN_INLINE double sum_of_lanes(D v) { return _mm512_reduce_add_pd((__m512d)v); }
TSBN_INLINE double sum_of_lanes(F v) {
  const __m256 low = _mm512_castps512_ps256((__m512)v), high = _mm512_extractf32x8_ps((__m512)v, 1);
  return _mm512_reduce_add_pd(_mm512_cvtps_pd(low) + _mm512_cvtps_pd(high));
}
#else
template <class V> TSBN_INLINE double sum_of_lanes(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  double values[lanes];
  for (int i = 0; i < lanes; ++i) values[i] = double(v[i]);
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  }
  return values[0];
}
#endif
