// What is asked of memory before it is needed. The processor follows a few sequential streams; a slab is read as several
// rows at once, or four positions at a time, which it does not recognise. Into the L2 cache: rows often lie a power of two
// apart, where the L1 cache holds but a few of them. Included inside an instruction set's namespace, after simd.h.

constexpr uintptr_t kLine = 64;

TSBN_INLINE void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// The line that is `distance` bytes ahead of a vector at p; once where several vectors share a line. It may lie outside
// of the tensor: a prefetch does not fault.
template <int64_t distance, class T>
TSBN_INLINE void prefetch_ahead(const T* p) {
  constexpr uintptr_t bytes = sizeof(T) * kLanes<T>;
  if (bytes >= kLine || reinterpret_cast<uintptr_t>(p) % kLine < bytes) {
    prefetch(reinterpret_cast<const char*>(p) + distance);
  }
}
