// The casts for each instruction set. Only cast.cc uses them.
#pragma once

#include "convert/cast.h"

namespace weightlift::convert {

namespace baseline {
HostCast kernel(FloatFormat from, FloatFormat to) noexcept;
}
namespace avx2 {
HostCast kernel(FloatFormat from, FloatFormat to) noexcept;
}
namespace avx512 {
HostCast kernel(FloatFormat from, FloatFormat to) noexcept;
}
namespace neon {
HostCast kernel(FloatFormat from, FloatFormat to) noexcept;
}

}  // namespace weightlift::convert
