// A LoadPlan under construction from Python, then its Load, then the tensors it made.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/indexed_file.h"
#include "bind/tensor_export.h"
#include "engine/host_memory.h"
#include "engine/load.h"
#include "engine/plan.h"
#include "engine/slots_ahead.h"

namespace weightlift::bind {

// Where tensors go on one device: memory that the caller owns, contiguous, one place a tensor.
struct Targets {
  int device = engine::kHostDevice;
  std::vector<std::uint64_t> addresses;
  std::vector<Dtype> dtypes;
};

// Contiguous tensors in this process's memory, which must stay as they are until the load has
// ended.
struct HostTensors {
  std::vector<std::string> names;
  std::vector<std::uint64_t> addresses;
  std::vector<std::uint64_t> elements;
  std::vector<Dtype> dtypes;
};

// [begin, end) of a tensor's bytes: what of it is read in now, if not all.
using Windows = std::vector<std::pair<std::uint64_t, std::uint64_t>>;

// For each dimension (start, step, count), step != 0.
using Stretches = std::vector<std::tuple<std::uint64_t, std::int64_t, std::uint64_t>>;

class PlanBuilder {
 public:
  explicit PlanBuilder(engine::Settings settings) : settings_(settings) {}

  // Zero copy. `shared`: others may get the same bytes from this IndexedFile.
  void map(const std::shared_ptr<IndexedFile>& source, const Which& which, bool shared,
           const std::optional<Windows>& windows);
  // Into memory of our own, cast where `dtype` is given and the tensor is of a floating type.
  void read(const std::shared_ptr<IndexedFile>& source, const Which& which,
            std::optional<Dtype> dtype, std::optional<int> pin_for);
  // To targets in the order of `which`.
  void copy_to(const std::shared_ptr<IndexedFile>& source, const Which& which,
               const Targets& targets);
  void copy_memory(const std::shared_ptr<HostTensors>& tensors, const Targets& targets);
  // A part of one tensor, into memory of our own in the shape of the counts.
  void slice(const std::shared_ptr<IndexedFile>& source, std::uint32_t which,
             const Stretches& parts, std::optional<Dtype> dtype);
  // The same to the one target.
  void slice_to(const std::shared_ptr<IndexedFile>& source, std::uint32_t which,
                const Stretches& parts, const Targets& target);
  // Elements of one tensor, the first of them `offset` elements into it, to the one target: for
  // each dimension (extent, stride in the tensor, stride at the target), in elements. The tensor's
  // strides are positive; a device's targets are contiguous.
  void copy_strided(
      const std::shared_ptr<IndexedFile>& source, std::uint32_t which, std::uint64_t offset,
      const std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t>>& dimensions,
      const Targets& target);

  void use_stream(int device, std::uint64_t stream) { plan_.device(device).stream = stream; }
  void populate(bool now) { plan_.populate = now; }
  // Of each tensor that the plan was told of, in the order of the calls, its place in the order of
  // use. wait_for() can then be asked for them, by their numbers in that order.
  void order(std::vector<std::uint32_t> ranks);

  // So many bytes will go to a device: begins to pin slots for them, until start().
  void pin_ahead(int device, std::uint64_t bytes);

  // (device, bytes) of the scratch memory that start() wants.
  std::vector<std::pair<int, std::uint64_t>> prepare();
  // (device, address, owner), for each that prepare() named. The owners live as long as the load.
  void start(const std::vector<std::tuple<int, std::uint64_t, pybind11::object>>& scratch);
  bool wait(double seconds);
  // Until tensors have arrived, or the time is up: whether they have.
  bool wait_for(const std::vector<std::uint32_t>& which, double seconds);
  // The same, on the device of these tensors in the order of a stream of it.
  bool wait_for_on_stream(const std::vector<std::uint32_t>& which, int device, std::uint64_t stream,
                          double seconds);
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
    DeadPages pages = DeadPages::kKept;
  };

  // What slice() and slice_to() begin with: checked, and what it adds to the plan but the target.
  struct Part {
    engine::StoredTensor tensor;
    std::span<const std::uint64_t> shape;  // of the whole tensor
    std::vector<engine::Stretch> stretches;
  };
  Part add_part(const std::shared_ptr<IndexedFile>& source, const format::TensorInfo& tensor,
                const Stretches& parts);

  // Of a plan that is prepared and has an order.
  engine::Load& load_of(const std::vector<std::uint32_t>& which);
  engine::LoadPlan& plan() { return load_ ? load_->plan() : plan_; }
  std::shared_ptr<engine::HostMemory> allocate(std::size_t bytes, std::optional<int> pin_for);

  engine::Settings settings_;
  engine::LoadPlan plan_;
  std::vector<Output> outputs_;
  std::vector<std::weak_ptr<const engine::HostMemory>> blocks_;
  std::vector<std::shared_ptr<std::vector<std::uint64_t>>> shapes_;
  std::vector<pybind11::object> scratch_;  // before the load, which ends first
  std::unique_ptr<engine::Load> load_;
  std::list<engine::SlotsAhead> ahead_;
};

}  // namespace weightlift::bind
