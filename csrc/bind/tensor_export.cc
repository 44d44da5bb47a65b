#include "bind/tensor_export.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"
#include "io/anonymous_memory.h"
#include "result.h"

namespace py = pybind11;

namespace weightlift::bind {
namespace {

// The C structures of DLPack 0.8 (dmlc/dlpack, include/dlpack/dlpack.h), which all supported
// versions of torch accept. Repeated here because they are a stable ABI.
struct DlTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t rank;
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // null: contiguous
  std::uint64_t byte_offset;
};
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};
constexpr std::int32_t kDlCpu = 1;
constexpr const char* kCapsuleName = "dltensor";

constexpr std::uint8_t kDlInt = 0;
constexpr std::uint8_t kDlUint = 1;
constexpr std::uint8_t kDlFloat = 2;
constexpr std::uint8_t kDlBfloat = 4;
constexpr std::uint8_t kDlComplex = 5;
constexpr std::uint8_t kDlBool = 6;
constexpr std::uint8_t kDlFloat8E4M3Fn = 10;
constexpr std::uint8_t kDlFloat8E4M3Fnuz = 11;
constexpr std::uint8_t kDlFloat8E5M2 = 12;
constexpr std::uint8_t kDlFloat8E5M2Fnuz = 13;
constexpr std::uint8_t kDlFloat8E8M0Fnu = 14;
constexpr std::uint8_t kDlFloat4E2M1Fn = 17;

constexpr std::size_t kInlineRank = 6;

struct Exported {
  DlManagedTensor managed;
  std::array<std::int64_t, kInlineRank> few;
  std::vector<std::int64_t> many;
  std::size_t bytes;
  DeadPages pages;
  std::shared_ptr<const void> owner;
};

void delete_exported(DlManagedTensor* managed) {
  auto* const exported = static_cast<Exported*>(managed->context);
  // The pages of the last tensor are released with the block.
  if (exported->owner.use_count() > 1) {
    auto* const data = static_cast<std::byte*>(managed->tensor.data);
    if (exported->pages == DeadPages::kReleased) io::release_whole_pages(data, exported->bytes);
    if (exported->pages == DeadPages::kReleasedUnderPressure) {
      io::release_under_pressure(data, exported->bytes);
    }
  }
  delete exported;
}

// Deletes the tensor unless a consumer has taken it out of the capsule, which renames the capsule.
void delete_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kCapsuleName) == 0) return;
  auto* const managed = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsuleName));
  managed->deleter(managed);
}

}  // namespace

std::optional<TensorType> tensor_type(Dtype dtype) noexcept {
  switch (dtype) {
    case Dtype::kBool:
      return TensorType{kDlBool, 8};
    case Dtype::kU8:
      return TensorType{kDlUint, 8};
    case Dtype::kU16:
      return TensorType{kDlUint, 16};
    case Dtype::kU32:
      return TensorType{kDlUint, 32};
    case Dtype::kU64:
      return TensorType{kDlUint, 64};
    case Dtype::kI8:
      return TensorType{kDlInt, 8};
    case Dtype::kI16:
      return TensorType{kDlInt, 16};
    case Dtype::kI32:
      return TensorType{kDlInt, 32};
    case Dtype::kI64:
      return TensorType{kDlInt, 64};
    case Dtype::kF16:
      return TensorType{kDlFloat, 16};
    case Dtype::kF32:
      return TensorType{kDlFloat, 32};
    case Dtype::kF64:
      return TensorType{kDlFloat, 64};
    case Dtype::kBf16:
      return TensorType{kDlBfloat, 16};
    case Dtype::kC32:
      return TensorType{kDlComplex, 32};
    case Dtype::kC64:
      return TensorType{kDlComplex, 64};
    case Dtype::kC128:
      return TensorType{kDlComplex, 128};
    case Dtype::kF8E4M3:
      return TensorType{kDlFloat8E4M3Fn, 8};
    case Dtype::kF8E5M2:
      return TensorType{kDlFloat8E5M2, 8};
    case Dtype::kF8E4M3Fnuz:
      return TensorType{kDlFloat8E4M3Fnuz, 8};
    case Dtype::kF8E5M2Fnuz:
      return TensorType{kDlFloat8E5M2Fnuz, 8};
    case Dtype::kF8E8M0:
      return TensorType{kDlFloat8E8M0Fnu, 8};
    case Dtype::kF4:
      return TensorType{kDlFloat4E2M1Fn, 4, 2, 2};  // float4_e2m1fn_x2
    case Dtype::kF6E2M3:
    case Dtype::kF6E3M2:
      return std::nullopt;
  }
  return std::nullopt;
}

Status check_exportable(Dtype dtype, std::span<const std::uint64_t> shape) {
  const auto type = tensor_type(dtype);
  if (!type) {
    return Error{.code = ErrorCode::kUnsupportedDtype,
                 .message = "torch has no dtype for " + std::string(dtype_name(dtype)) +
                            "; load the other tensors of the file by name (safe_open)"};
  }
  if (type->packed != 1 && (shape.empty() || shape.back() % type->packed != 0)) {
    return Error{.code = ErrorCode::kUnsupportedDtype,
                 .message = "torch packs two " + std::string(dtype_name(dtype)) +
                            " into a byte, but the last dimension of this tensor is odd; load the "
                            "other tensors of the file by name (safe_open)"};
  }
  return {};
}

py::object export_tensor(HostTensor tensor) {
  const TensorType type = tensor_type(tensor.dtype).value_or(TensorType{kDlUint, 8});
  const std::size_t rank = tensor.shape.size();
  auto exported = std::make_unique<Exported>();
  std::int64_t* shape = exported->few.data();
  if (rank > kInlineRank) {
    exported->many.resize(rank);
    shape = exported->many.data();
  }
  for (std::size_t i = 0; i < rank; ++i) shape[i] = static_cast<std::int64_t>(tensor.shape[i]);
  if (type.packed != 1) shape[rank - 1] /= type.packed;
  exported->bytes = tensor.bytes;
  exported->pages = tensor.pages;
  exported->owner = std::move(tensor.owner);
  exported->managed = {.tensor = {.data = tensor.data,
                                  .device_type = kDlCpu,
                                  .device_id = 0,
                                  .rank = static_cast<std::int32_t>(rank),
                                  .code = type.code,
                                  .bits = type.bits,
                                  .lanes = type.lanes,
                                  .shape = shape,
                                  .strides = nullptr,
                                  .byte_offset = 0},
                       .context = exported.get(),
                       .deleter = delete_exported};
  auto capsule = py::reinterpret_steal<py::object>(
      PyCapsule_New(&exported->managed, kCapsuleName, delete_capsule));
  if (!capsule) throw py::error_already_set();
  static_cast<void>(exported.release());  // the capsule owns it
  return capsule;
}

}  // namespace weightlift::bind
