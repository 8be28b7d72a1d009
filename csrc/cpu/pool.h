// Large outputs come from huge-page blocks that are reused once their tensor is gone.
//
// A fresh output costs more in page faults (one per 4 KiB, each zeroed) than the arithmetic that fills it. The pool
// asks for 2 MiB pages and keeps freed blocks, up to a limit. Idle neighbours are joined, blocks are split to fit, and
// a new mapping replaces as many idle bytes: live and idle blocks together stay near the most that was ever live.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>

namespace tsbn::cpu {

class BlockPool {
 public:
  // Never destroyed: tensors may outlive static destruction.
  static BlockPool& instance();

  // Tensors below this many bytes use PyTorch's allocator.
  static constexpr size_t kSmallest = size_t(1) << 20;

  // A block of at least `bytes`, aligned to a huge page; nullptr when the system has none left.
  void* allocate(size_t bytes);
  void release(void* data, size_t bytes);

  // Gives idle memory back to the system until at most `keep` bytes are idle. Returns the bytes freed.
  size_t trim(size_t keep);
  size_t idle_bytes();
  size_t limit();
  // In whole blocks of 2 MiB. 0: no reuse, and large outputs use PyTorch's allocator.
  void set_limit(size_t bytes);

 private:
  BlockPool();
  size_t trim_locked(size_t keep);

  std::mutex mutex_;
  std::map<char*, size_t> idle_;  // start and bytes; no two are adjacent
  size_t idle_bytes_ = 0, limit_ = 0;
};

// Memory for the length of a scope: from the pool, or from the heap where the pool is off or the system has none.
class PooledMemory {
 public:
  static constexpr size_t kSmallest = size_t(64) << 10;  // the heap keeps smaller ones without page faults

  explicit PooledMemory(size_t bytes) : bytes_(bytes) {
    if (bytes >= kSmallest && BlockPool::instance().limit() > 0) pooled_ = BlockPool::instance().allocate(bytes);
    data_ = pooled_ != nullptr ? pooled_ : ::operator new(bytes, std::align_val_t(64));
  }
  ~PooledMemory() {
    if (pooled_ != nullptr) BlockPool::instance().release(pooled_, bytes_);
    else ::operator delete(data_, std::align_val_t(64));
  }
  PooledMemory(const PooledMemory&) = delete;
  PooledMemory& operator=(const PooledMemory&) = delete;
  void* data() const { return data_; }

 private:
  size_t bytes_;
  void *pooled_ = nullptr, *data_;
};

}  // namespace tsbn::cpu
