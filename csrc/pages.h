// Large outputs on huge pages: a fresh gradient of 155 MB costs 38 000 page faults of 4 KiB, which
// take longer than computing it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fpg {

// Asks for huge pages where [begin, begin + bytes) covers whole ones. Only advice: it may be
// declined.
inline void advise_huge_pages(void* begin, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace fpg
