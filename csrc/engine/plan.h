// Every load, whatever its formats and targets, becomes a LoadPlan, and the engine runs it.
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
  std::uint32_t dimensions =
      0;  // first of dimension_count in LoadPlan::dimensions; contiguous if none
  std::uint32_t dimension_count = 0;
  Dtype source_dtype = Dtype::kU8;
  Dtype target_dtype = Dtype::kU8;
  std::uint32_t name = 0;  // in LoadPlan::names

  [[nodiscard]] bool casts() const noexcept { return source_dtype != target_dtype; }
  // Bytes of one element. Only for dtypes whose elements are whole bytes.
  [[nodiscard]] std::uint64_t source_item() const noexcept { return dtype_bytes(source_dtype); }
  [[nodiscard]] std::uint64_t target_item() const noexcept { return dtype_bytes(target_dtype); }
};

// A whole tensor in a file, or in memory: then `offset` is an address.
struct StoredTensor {
  std::uint32_t file = kFromMemory;
  std::uint32_t name = 0;  // in LoadPlan::names
  Dtype dtype = Dtype::kU8;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

// A copy of the whole tensor, without a target yet. It counts bytes if nothing is cast, because
// elements smaller than a byte cannot be addressed.
[[nodiscard]] Copy copy_of(const StoredTensor& tensor, Dtype target) noexcept;

// `count` elements along one dimension of a tensor, from `start` on, `step` apart.
struct Stretch {
  std::uint64_t start = 0;
  std::int64_t step = 1;  // not 0
  std::uint64_t count = 0;
};

// Whether the stretches, one for each dimension, stay within a tensor of this shape.
[[nodiscard]] bool within(std::span<const Stretch> stretches,
                          std::span<const std::uint64_t> shape) noexcept;

// A part of a mapping that is handed out without a copy.
struct Mapped {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::uint32_t name = 0;
};

// What a device needs beside the targets.
struct DeviceNeeds {
  int device = 0;
  std::uint64_t stream = 0;         // the CUstream on which the targets were allocated
  std::uint64_t scratch = 0;        // device memory for staged chunks, scratch_bytes long
  std::uint64_t scratch_bytes = 0;  // filled in by Schedule::make
};

class HostMemory;

struct LoadPlan {
  std::vector<std::shared_ptr<io::File>> files;
  std::vector<std::shared_ptr<io::Mapping>> mappings;  // by file; null if nothing is mapped
  std::vector<Copy> copies;
  std::vector<Dimension> dimensions;
  std::vector<Mapped> mapped;
  std::vector<DeviceNeeds> devices;
  std::vector<std::string_view> names;
  std::vector<std::shared_ptr<const void>> keep_alive;         // the owners of names and targets
  std::vector<std::shared_ptr<const HostMemory>> host_memory;  // new memory for targets
  bool populate = true;  // read mapped pages that are not resident now
  // For each name, its place in the order of use. Empty for the order of the files. With ranks,
  // Load::wait_for() can wait for single tensors.
  std::vector<std::uint32_t> ranks;

  [[nodiscard]] std::uint32_t add_file(std::shared_ptr<io::File> file);
  [[nodiscard]] std::uint32_t add_name(std::string_view name);
  [[nodiscard]] DeviceNeeds& device(int ordinal);
  // Only for a device for which device() was called.
  [[nodiscard]] const DeviceNeeds& needs_of(int ordinal) const;

  // Adds a copy of `elements` elements, contiguous on both sides. For dtypes smaller than a byte,
  // give kU8 and the number of bytes.
  void add_copy(Copy copy);
  // Adds a copy whose source or target is strided. `dimensions` may have any order; they are sorted
  // into the order of the source and merged if they are contiguous on both sides.
  void add_strided(Copy copy, std::span<const Dimension> dimensions);
  // Adds a part of a tensor of this shape to a contiguous target. Its elements must be whole bytes,
  // and the stretches within() the shape.
  void add_slice(const StoredTensor& tensor, std::span<const std::uint64_t> shape,
                 std::span<const Stretch> stretches, Dtype target_dtype, int target_device,
                 std::uint64_t target);

  [[nodiscard]] std::uint64_t source_bytes(const Copy& copy) const noexcept;
  // The range [first, last) of the source that a copy reads.
  [[nodiscard]] std::pair<std::uint64_t, std::uint64_t> source_range(
      const Copy& copy) const noexcept;
};

}  // namespace weightlift::engine
