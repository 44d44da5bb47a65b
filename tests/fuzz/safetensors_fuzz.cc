#include "safetensors_file.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  weightlift::fuzz::check_safetensors(weightlift::fuzz::as_text(data, size));
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  using namespace weightlift::fuzz;
  Random random(seed);
  return hand_back(mutate_safetensors(as_text(data, size), random), data, size, max_size);
}
