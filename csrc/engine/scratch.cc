#include "engine/scratch.h"

#include <algorithm>
#include <cstddef>

#include "io/anonymous_memory.h"
#include "result.h"

namespace weightlift::engine {

Result<std::byte*> Scratch::bytes(std::size_t count) {
  if (memory_.size() < count) {
    WL_ASSIGN_OR_RETURN(memory_, io::AnonymousMemory::allocate(count));
  }
  return memory_.data();
}

Result<std::byte*> Scratch::for_direct_read(std::size_t count) {
  return bytes(count < io::kHugePageBytes / 2 ? count : std::max(count, io::kHugePageBytes));
}

}  // namespace weightlift::engine
