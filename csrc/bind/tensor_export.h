// Hands host memory to torch as DLPack capsules, one storage for each tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <span>

#include "dtype.h"
#include "result.h"

namespace weightlift::bind {

// DLPack's type (dlpack.h) for a dtype of the file. `packed` is the number of the file's elements
// in one of torch's.
struct TensorType {
  std::uint8_t code = 0;
  std::uint8_t bits = 0;
  std::uint8_t lanes = 1;
  std::uint8_t packed = 1;
};

// Empty if torch has no such dtype.
[[nodiscard]] std::optional<TensorType> tensor_type(Dtype dtype) noexcept;

// kUnsupportedDtype if torch cannot represent a tensor of this dtype and shape.
[[nodiscard]] Status check_exportable(Dtype dtype, std::span<const std::uint64_t> shape);

// What happens to a tensor's pages when it is deleted before its block: the whole pages inside it
// are kept, or go back to the system at once, or when memory is short. Release them only if no
// other tensor can share them.
enum class DeadPages : std::uint8_t { kKept, kReleased, kReleasedUnderPressure };

struct HostTensor {
  Dtype dtype = Dtype::kU8;
  std::span<const std::uint64_t> shape;  // in elements of the file
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  std::shared_ptr<const void> owner;
  DeadPages pages = DeadPages::kKept;
};

// Makes the capsule for `from_dlpack`. The tensor must have passed check_exportable().
[[nodiscard]] pybind11::object export_tensor(HostTensor tensor);

}  // namespace weightlift::bind
