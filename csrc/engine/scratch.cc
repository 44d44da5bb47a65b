#include "engine/scratch.h"

#include <cstddef>

#include "result.h"

namespace weightlift::engine {

Result<std::byte*> Scratch::bytes(std::size_t count) {
  if (memory_.size() < count) {
    WL_ASSIGN_OR_RETURN(memory_, io::AnonymousMemory::allocate(count));
  }
  return memory_.data();
}

}  // namespace weightlift::engine
