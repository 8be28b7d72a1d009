#include "pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>

namespace tsbn::cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

size_t round_up(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

size_t default_limit() {
  if (const char* text = std::getenv("TSBN_POOL_LIMIT_MB")) {
    char* end = nullptr;
    const long long megabytes = std::strtoll(text, &end, 10);
    if (end != text && *end == '\0' && megabytes >= 0) return size_t(megabytes) << 20;
  }
  return size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)) / 4;
}

// `bytes` at a huge-page boundary: maps one page more and unmaps what lies outside.
void* map_aligned(size_t bytes) {
  void* raw = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(raw);
  char* data = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(begin)));
  if (data > begin) munmap(begin, size_t(data - begin));
  char* tail = data + bytes;
  char* end = begin + bytes + kHugePage;
  if (end > tail) munmap(tail, size_t(end - tail));
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);  // advice: small pages work too
#endif
  return data;
}

}  // namespace

BlockPool::BlockPool() { set_limit(default_limit()); }

BlockPool& BlockPool::instance() {
  static BlockPool* pool = new BlockPool;
  return *pool;
}

void* BlockPool::allocate(size_t bytes) {
  bytes = round_up(bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  auto best = idle_.end();
  for (auto it = idle_.begin(); it != idle_.end(); ++it) {
    if (it->second >= bytes && (best == idle_.end() || it->second < best->second)) best = it;
  }
  if (best != idle_.end()) {
    const auto [data, size] = *best;
    idle_.erase(best);
    if (size > bytes) idle_.emplace(data + bytes, size - bytes);
    idle_bytes_ -= bytes;
    return data;
  }
  trim_locked(idle_bytes_ > bytes ? idle_bytes_ - bytes : 0);
  void* data = map_aligned(bytes);
  if (data == nullptr && trim_locked(0) > 0) data = map_aligned(bytes);
  return data;
}

void BlockPool::release(void* data, size_t bytes) {
  bytes = round_up(bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  idle_bytes_ += bytes;
  auto it = idle_.emplace(static_cast<char*>(data), bytes).first;
  const auto next = std::next(it);
  if (next != idle_.end() && it->first + it->second == next->first) {
    it->second += next->second;
    idle_.erase(next);
  }
  if (it != idle_.begin()) {
    const auto previous = std::prev(it);
    if (previous->first + previous->second == it->first) {
      previous->second += it->second;
      idle_.erase(it);
    }
  }
  trim_locked(limit_);
}

size_t BlockPool::trim(size_t keep) {
  std::lock_guard<std::mutex> lock(mutex_);
  return trim_locked(keep);
}

size_t BlockPool::trim_locked(size_t keep) {
  size_t freed = 0;
  while (idle_bytes_ > keep) {
    const auto last = std::prev(idle_.end());
    const size_t bytes = std::min(last->second, round_up(idle_bytes_ - keep));
    last->second -= bytes;
    munmap(last->first + last->second, bytes);
    if (last->second == 0) idle_.erase(last);
    idle_bytes_ -= bytes;
    freed += bytes;
  }
  return freed;
}

size_t BlockPool::idle_bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  return idle_bytes_;
}

size_t BlockPool::limit() {
  std::lock_guard<std::mutex> lock(mutex_);
  return limit_;
}

void BlockPool::set_limit(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes / kHugePage * kHugePage;
  trim_locked(limit_);
}

}  // namespace tsbn::cpu
