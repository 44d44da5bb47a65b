// Replaces the output of cmake/build_kernels.py in a build without nvcc.
#include <span>

#include "convert/scatter.h"

namespace weightlift::convert {

std::span<const KernelImage> scatter_images() noexcept {
#if defined(WEIGHTLIFT_TESTING)
  // The simulated driver accepts this as an image; it has the kernel itself.
  static constexpr char kSimulated[] = "simulated";
  static const KernelImage kImages[] = {{.architecture = 75,
                                         .is_ptx = true,
                                         .maker = "the simulated driver",
                                         .bytes = std::as_bytes(std::span(kSimulated))}};
  return kImages;
#else
  return {};
#endif
}

const char* kernel_toolkit() noexcept {
  return "";
}

}  // namespace weightlift::convert
