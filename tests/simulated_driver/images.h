// Whether a driver accepts an image: which machine code and which PTX.
#pragma once

#include <cuda.h>

namespace weightlift::simulated {

// `driver` as cuDriverGetVersion gives it; `capability` 90 for 9.0.
[[nodiscard]] CUresult check_image(const void* image, int driver, int capability);

}  // namespace weightlift::simulated
