#include "engine/failing_memory.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace weightlift::engine::test {

Heap heap;

}  // namespace weightlift::engine::test

using weightlift::engine::test::heap;

// Not inlined, because GCC would otherwise warn about free().
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  void* const block = heap.refuses() ? nullptr : std::malloc(std::max<std::size_t>(bytes, 1));
  if (block == nullptr) throw std::bad_alloc();
  ++heap.held;
  return block;
}
[[gnu::noinline]] void operator delete(void* block) noexcept {
  if (block == nullptr) return;
  --heap.held;
  std::free(block);
}
void operator delete(void* block, std::size_t /*bytes*/) noexcept {
  operator delete(block);
}
// The library's own would do, but a sanitizer replaces it by one that does not call the functions
// above.
void* operator new(std::size_t bytes, const std::nothrow_t& /*tag*/) noexcept {
  try {
    return operator new(bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
