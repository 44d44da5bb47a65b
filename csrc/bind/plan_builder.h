// A LoadPlan under construction from Python, then its Load, then the tensors it made.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/indexed_file.h"
#include "engine/host_memory.h"
#include "engine/load.h"
#include "engine/plan.h"

namespace weightlift::bind {

class PlanBuilder {
 public:
  explicit PlanBuilder(engine::Settings settings) : settings_(settings) {}

  using Which = std::optional<std::vector<std::uint32_t>>;  // positions in the index; all if none

  // Zero copy. `shared`: others may get the same bytes from this IndexedFile.
  void map(const std::shared_ptr<IndexedFile>& source, const Which& which, bool shared);
  // Into memory of our own, cast where `dtype` is given and the tensor is of a floating type.
  void read(const std::shared_ptr<IndexedFile>& source, const Which& which,
            std::optional<Dtype> dtype, std::optional<int> pin_for);
  // To addresses that the caller owns, contiguous, in the order of `which`.
  void copy_to(const std::shared_ptr<IndexedFile>& source, const Which& which, int device,
               const std::vector<std::uint64_t>& addresses, const std::vector<Dtype>& dtypes);
  // Contiguous tensors from this process's memory, which must stay as they are until the load has
  // ended, to contiguous targets. `elements`: of each tensor.
  void copy_memory(const std::vector<std::string>& names, const std::vector<std::uint64_t>& sources,
                   const std::vector<std::uint64_t>& elements,
                   const std::vector<Dtype>& source_dtypes, int device,
                   const std::vector<std::uint64_t>& addresses, const std::vector<Dtype>& dtypes);
  // A part of one tensor: for each of its dimensions (start, step, count), step != 0. To memory of
  // our own (address 0) in the shape of the counts, or to a contiguous target.
  void slice(const std::shared_ptr<IndexedFile>& source, std::uint32_t which,
             const std::vector<std::tuple<std::uint64_t, std::int64_t, std::uint64_t>>& parts,
             std::optional<Dtype> dtype, int device, std::uint64_t address);
  // Elements of one tensor, the first of them `offset` elements into it, to memory that the caller
  // owns: for each dimension (extent, stride in the tensor, stride at the target), in elements. The
  // tensor's strides are positive; a device's targets are contiguous.
  void copy_strided(
      const std::shared_ptr<IndexedFile>& source, std::uint32_t which, std::uint64_t offset,
      const std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t>>& dimensions,
      Dtype dtype, int device, std::uint64_t address);

  void use_stream(int device, std::uint64_t stream) { plan_.device(device).stream = stream; }
  void populate(bool now) { plan_.populate = now; }

  // (device, bytes) of the scratch memory that start() wants.
  std::vector<std::pair<int, std::uint64_t>> prepare();
  // (device, address, owner), for each that prepare() named. The owners live as long as the load.
  void start(const std::vector<std::tuple<int, std::uint64_t, pybind11::object>>& scratch);
  bool wait(double seconds);
  void cancel();
  std::pair<std::uint64_t, std::uint64_t> progress() const;
  engine::Report finish();

  // What map(), read() and slice() made, in the order of the calls, each through `from_dlpack`.
  pybind11::list tensors(const pybind11::object& from_dlpack);

 private:
  struct Output {
    std::uint32_t name = 0;
    Dtype dtype = Dtype::kU8;
    std::span<const std::uint64_t> shape;
    std::byte* data = nullptr;
    std::size_t bytes = 0;
    std::shared_ptr<const void> owner;
    bool release_pages = false;
  };

  engine::LoadPlan& plan() { return load_ ? load_->plan() : plan_; }
  std::shared_ptr<engine::HostMemory> allocate(std::size_t bytes, std::optional<int> pin_for);

  engine::Settings settings_;
  engine::LoadPlan plan_;
  std::vector<Output> outputs_;
  std::vector<std::weak_ptr<const engine::HostMemory>> blocks_;
  std::vector<std::shared_ptr<std::vector<std::uint64_t>>> shapes_;
  std::vector<pybind11::object> scratch_;  // before the load, which ends first
  std::unique_ptr<engine::Load> load_;
};

// Visits the tensors at the given positions, or all.
template <class Visit>
void for_each_tensor(const IndexedFile& source, const PlanBuilder::Which& which,
                     const Visit& visit) {
  const auto tensors = source.index->tensors();
  if (!which) {
    for (const format::TensorInfo& tensor : tensors) visit(tensor);
    return;
  }
  for (const std::uint32_t position : *which) {
    if (position >= tensors.size()) throw pybind11::index_error("no such tensor in the index");
    visit(tensors[position]);
  }
}

}  // namespace weightlift::bind
