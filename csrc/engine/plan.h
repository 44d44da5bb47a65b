// The one way for data: everything that is loaded, whatever its format and wherever it goes,
// becomes a LoadPlan, and the engine runs it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dtype.h"
#include "io/file.h"
#include "io/mapping.h"
#include "result.h"

namespace weightlift::engine {

inline constexpr int kHostDevice = -1;
// Copy::file of a copy whose source is memory of this process.
inline constexpr std::uint32_t kFromMemory = ~std::uint32_t{0};

// One dimension of a strided copy. Strides are in bytes; the source's are positive.
struct Dimension {
  std::uint64_t extent = 0;
  std::int64_t source_stride = 0;
  std::int64_t target_stride = 0;
};

// `elements` elements from a file (or from memory) to an address on a device.
struct Copy {
  std::uint32_t file = kFromMemory;
  std::int32_t device = kHostDevice;
  std::uint64_t source = 0;  // byte offset in the file, or an address
  std::uint64_t target = 0;  // an address on the device
  std::uint64_t elements = 0;
  std::uint32_t dimensions = 0;  // first of dimension_count in LoadPlan; contiguous where none
  std::uint32_t dimension_count = 0;
  Dtype source_dtype = Dtype::kU8;
  Dtype target_dtype = Dtype::kU8;
  std::uint32_t name = 0;  // in LoadPlan::names

  [[nodiscard]] bool casts() const noexcept { return source_dtype != target_dtype; }
  // Bytes of one element; only for dtypes of whole bytes.
  [[nodiscard]] std::uint64_t source_item() const noexcept { return dtype_bytes(source_dtype); }
  [[nodiscard]] std::uint64_t target_item() const noexcept { return dtype_bytes(target_dtype); }
};

// A whole tensor as it lies in a file, or in memory: then `offset` is an address.
struct StoredTensor {
  std::uint32_t file = kFromMemory;
  std::uint32_t name = 0;  // in LoadPlan::names
  Dtype dtype = Dtype::kU8;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

// All of it, its target still open. Of bytes where nothing is cast, for elements of fractions of a
// byte cannot be counted otherwise.
[[nodiscard]] Copy copy_of(const StoredTensor& tensor, Dtype target) noexcept;

// Along one dimension of a tensor: `count` elements from `start` on, `step` apart.
struct Stretch {
  std::uint64_t start = 0;
  std::int64_t step = 1;  // not 0
  std::uint64_t count = 0;
};

// Whether stretches, one a dimension, stay within a tensor of this shape.
[[nodiscard]] bool within(std::span<const Stretch> stretches,
                          std::span<const std::uint64_t> shape) noexcept;

// A part of a mapping that is handed out as it is.
struct Mapped {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::uint32_t name = 0;
};

// What a device needs besides the targets.
struct DeviceNeeds {
  int device = 0;
  std::uint64_t stream = 0;         // the CUstream on which the targets were allocated
  std::uint64_t scratch = 0;        // device memory for chunks on their way, scratch_bytes long
  std::uint64_t scratch_bytes = 0;  // filled in by Schedule::make
};

struct LoadPlan {
  std::vector<std::shared_ptr<io::File>> files;
  std::vector<std::shared_ptr<io::Mapping>> mappings;  // by file; null where nothing is mapped
  std::vector<Copy> copies;
  std::vector<Dimension> dimensions;
  std::vector<Mapped> mapped;
  std::vector<DeviceNeeds> devices;
  std::vector<std::string_view> names;
  std::vector<std::shared_ptr<const void>> keep_alive;  // what names and targets point into
  bool populate = true;  // read mapped pages in now where they are not resident
  // Of each name, its place in the order of use; empty: the files' order. A load that has them
  // tells of each tensor when it has arrived (Load::wait_for).
  std::vector<std::uint32_t> ranks;

  [[nodiscard]] std::uint32_t add_file(std::shared_ptr<io::File> file);
  [[nodiscard]] std::uint32_t add_name(std::string_view name);
  [[nodiscard]] DeviceNeeds& device(int ordinal);
  // Of a device that device() has been asked for.
  [[nodiscard]] const DeviceNeeds& needs_of(int ordinal) const;

  // A copy of `elements` elements, contiguous on both sides. Dtypes of fractions of a byte are
  // moved as bytes: give kU8 and the number of bytes.
  void add_copy(Copy copy);
  // A copy between strided sides: `dimensions` in any order, outermost first by convention. They
  // are put into the source's order and merged where they are contiguous on both sides.
  void add_strided(Copy copy, std::span<const Dimension> dimensions);
  // A part of a tensor of this shape, whose elements are whole bytes, to a contiguous target. The
  // stretches are within() it.
  void add_slice(const StoredTensor& tensor, std::span<const std::uint64_t> shape,
                 std::span<const Stretch> stretches, Dtype target_dtype, int target_device,
                 std::uint64_t target);

  [[nodiscard]] std::uint64_t source_bytes(const Copy& copy) const noexcept;
  // [first, last) of the source that a copy touches.
  [[nodiscard]] std::pair<std::uint64_t, std::uint64_t> source_range(
      const Copy& copy) const noexcept;
};

}  // namespace weightlift::engine
