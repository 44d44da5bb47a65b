// Host memory handed to torch as DLPack capsules, one storage a tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <span>

#include "dtype.h"
#include "result.h"

namespace weightlift::bind {

// What torch calls a dtype of the file: DLPack's type codes (dlpack.h), and for packed types how
// many elements of the file are one of torch's.
struct TensorType {
  std::uint8_t code = 0;
  std::uint8_t bits = 0;
  std::uint8_t lanes = 1;
  std::uint8_t packed = 1;
};

// Nothing where torch has no such dtype.
[[nodiscard]] std::optional<TensorType> tensor_type(Dtype dtype) noexcept;

// kUnsupportedDtype where torch cannot hold a tensor of this dtype and shape.
[[nodiscard]] Status check_exportable(Dtype dtype, std::span<const std::uint64_t> shape);

// What becomes of a tensor's pages when it dies before the block that it lies in: the whole ones
// inside it go back to the system, now or where memory is short. Only where no other tensor can
// share them.
enum class DeadPages : std::uint8_t { kKept, kReleased, kReleasedUnderPressure };

struct HostTensor {
  Dtype dtype = Dtype::kU8;
  std::span<const std::uint64_t> shape;  // in elements of the file
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  std::shared_ptr<const void> owner;
  DeadPages pages = DeadPages::kKept;
};

// The capsule for `from_dlpack`, of a tensor that passed check_exportable.
[[nodiscard]] pybind11::object export_tensor(HostTensor tensor);

}  // namespace weightlift::bind
