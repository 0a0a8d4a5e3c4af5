// Large outputs on huge pages, mapped before they are written: the page faults of a fresh gradient
// of 155 MB, 38 000 of them at 4 KiB, take longer than computing it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fpg {

// For the huge pages that lie wholly in [begin, begin + bytes). Only advice: it may be declined.
// To be called by one thread: where memory is fragmented, two that fault at once were seen to wait
// for each other for a quarter of a second.
inline void map_huge_pages(void* begin, size_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~(kHugePage - 1);
  if (first >= last) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace fpg
