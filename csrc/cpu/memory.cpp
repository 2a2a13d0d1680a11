#include "cpu/memory.hpp"

#include <cstdlib>
#include <mutex>
#include <new>

#include "base.hpp"

// Under a sanitizer memory comes from malloc: the sanitizer sees what lies beyond a request's end,
// and what is read after it was given back.
#if defined(__linux__) && !defined(ITO_SANITIZED)
#define ITO_HUGE_PAGES
#include <sys/mman.h>
#endif

namespace ito::cpu {
namespace {

constexpr size_t kHuge = size_t(2) << 20;
#ifdef ITO_SANITIZED  // every request has an allocation of its own
constexpr size_t kSlab = 0, kKept = 0, kUnit = 1, kPage = 1;
#else
constexpr size_t kSlab = size_t(8) << 20;  // enough for small batches
// At N = 4096, D = 512 a call uses 90 MiB, of which 64 are the tile cache.
constexpr size_t kKept = size_t(128) << 20;
constexpr size_t kUnit = 64, kPage = 4096;  // what requests are rounded up to
#endif

std::mutex kept_mutex;

// The blocks that no Arena is using, the one given back last at the end. Never destroyed: a thread
// may still run when the process ends.
std::vector<MemoryBlock>& kept_blocks() {
  static auto* const blocks = new std::vector<MemoryBlock>;
  return *blocks;
}

void* map(size_t bytes) {
#ifdef ITO_HUGE_PAGES
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
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
  return data;
#endif
}

void unmap(void* data, size_t bytes) {
#ifdef ITO_HUGE_PAGES
  munmap(data, bytes);
#else
  (void)bytes;
  std::free(data);
#endif
}

// The smallest kept block of at least this size, unless more than half of it would be unused.
MemoryBlock take(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(kept_mutex);
    std::vector<MemoryBlock>& kept = kept_blocks();
    size_t best = kept.size();
    for (size_t i = 0; i < kept.size(); ++i)
      if (kept[i].bytes >= bytes && (best == kept.size() || kept[i].bytes < kept[best].bytes))
        best = i;
    if (best < kept.size() && kept[best].bytes <= 2 * bytes) {
      const MemoryBlock found = kept[best];
      kept.erase(kept.begin() + best);
      return found;
    }
  }
  return {map(bytes), bytes};
}

void give_back(const MemoryBlock& block) {
  std::vector<MemoryBlock> surplus;
  {
    const std::lock_guard<std::mutex> lock(kept_mutex);
    std::vector<MemoryBlock>& kept = kept_blocks();
    size_t total = block.bytes;
    for (const MemoryBlock& b : kept) total += b.bytes;
    if (block.bytes > kKept) {
      surplus.push_back(block);
    } else {
      kept.push_back(block);
      for (; total > kKept; kept.erase(kept.begin())) {
        surplus.push_back(kept[0]);
        total -= kept[0].bytes;
      }
    }
  }
  for (const MemoryBlock& b : surplus) unmap(b.data, b.bytes);
}

}  // namespace

Arena::Arena() : slab_(take(kSlab)) {}

Arena::~Arena() {
  for (const MemoryBlock& block : blocks_) give_back(block);
  give_back(slab_);
}

void* Arena::allocate(size_t bytes) {
  bytes = round_up(bytes, kUnit);
  if (used_ + bytes <= kSlab) {
    void* p = static_cast<char*>(slab_.data) + used_;
    used_ += bytes;
    return p;
  }
  blocks_.push_back(take(round_up(bytes, kPage)));
  return blocks_.back().data;
}

void Arena::release(const void* p) {
  for (MemoryBlock& block : blocks_)
    if (block.data == p) {
      give_back(block);
      block = blocks_.back();
      blocks_.pop_back();
      return;
    }
}

void prefer_huge_pages(void* data, size_t bytes) {
#ifdef ITO_HUGE_PAGES
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(data), kHuge);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (data && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace ito::cpu
