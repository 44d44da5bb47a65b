// In the place of what cmake/build_kernels.py makes, for a build without nvcc.
#include <span>

#include "convert/scatter.h"

namespace weightlift::convert {

std::span<const KernelImage> scatter_images() noexcept {
#if defined(WEIGHTLIFT_TESTING)
  // What the simulated driver takes for an image: it brings the kernel itself.
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
