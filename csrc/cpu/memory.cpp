#include "cpu/memory.hpp"

#include <cstdlib>
#include <mutex>
#include <new>

#include "base.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ito::cpu {
namespace {

constexpr size_t kKept = size_t(8) << 20;  // enough for small batches, where it matters
constexpr size_t kHuge = size_t(2) << 20;

std::mutex kept_mutex;
void* kept_block = nullptr;  // the block that no Arena is using

void* map(size_t bytes) {
#if defined(__linux__)
  // Aligned to a huge page: what is too much at the ends is unmapped again.
  void* raw = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                   0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t data = round_up(begin, kHuge);
  if (data > begin) munmap(raw, data - begin);
  if (begin + kHuge > data) munmap(reinterpret_cast<void*>(data + bytes), begin + kHuge - data);
  madvise(reinterpret_cast<void*>(data), bytes, MADV_HUGEPAGE);
  return reinterpret_cast<void*>(data);
#else
  void* data = std::aligned_alloc(64, bytes);
  if (!data) throw std::bad_alloc();
  return data;
#endif
}

void unmap(void* data, size_t bytes) {
#if defined(__linux__)
  munmap(data, bytes);
#else
  (void)bytes;
  std::free(data);
#endif
}

}  // namespace

Arena::Arena() {
  const std::lock_guard<std::mutex> lock(kept_mutex);
  kept_ = kept_block ? kept_block : map(kKept);
  kept_block = nullptr;
}

Arena::~Arena() {
  for (const Mapping& m : mapped_) unmap(m.data, m.bytes);
  const std::lock_guard<std::mutex> lock(kept_mutex);
  if (kept_block)
    unmap(kept_, kKept);
  else
    kept_block = kept_;
}

void* Arena::allocate(size_t bytes) {
  bytes = round_up(bytes, size_t(64));
  if (used_ + bytes <= kKept) {
    void* p = static_cast<char*>(kept_) + used_;
    used_ += bytes;
    return p;
  }
  bytes = round_up(bytes, size_t(4096));
  mapped_.push_back({map(bytes), bytes});
  return mapped_.back().data;
}

void Arena::release(const void* p) {
  for (Mapping& m : mapped_)
    if (m.data == p) {
      unmap(m.data, m.bytes);
      m = mapped_.back();
      mapped_.pop_back();
      return;
    }
}

void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(data), kHuge);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (data && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace ito::cpu
