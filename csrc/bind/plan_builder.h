// Builds a LoadPlan from Python, runs its Load and hands out the tensors.
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

// The targets of tensors on one device: one contiguous range of the caller's memory for each
// tensor.
struct Targets {
  int device = engine::kHostDevice;
  std::vector<std::uint64_t> addresses;
  std::vector<Dtype> dtypes;
};

// Contiguous tensors in this process's memory. They must stay alive and unchanged until the load
// has ended.
struct HostTensors {
  std::vector<std::string> names;
  std::vector<std::uint64_t> addresses;
  std::vector<std::uint64_t> elements;
  std::vector<Dtype> dtypes;
};

// For each range, [begin, end) of a tensor's bytes: only these are populated now.
using Windows = std::vector<std::pair<std::uint64_t, std::uint64_t>>;

// (start, step, count) for each dimension; step is not 0.
using Stretches = std::vector<std::tuple<std::uint64_t, std::int64_t, std::uint64_t>>;

class PlanBuilder {
 public:
  explicit PlanBuilder(engine::Settings settings) : settings_(settings) {}

  // Maps tensors without a copy. `shared`: other tensors may use the same pages of this
  // IndexedFile.
  void map(const std::shared_ptr<IndexedFile>& source, const Which& which, bool shared,
           const std::optional<Windows>& windows);
  // Reads tensors into new memory. Casts floating-point tensors to `dtype`, if given.
  void read(const std::shared_ptr<IndexedFile>& source, const Which& which,
            std::optional<Dtype> dtype, std::optional<int> pin_for);
  // Copies tensors to targets, in the order of `which`.
  void copy_to(const std::shared_ptr<IndexedFile>& source, const Which& which,
               const Targets& targets);
  void copy_memory(const std::shared_ptr<HostTensors>& tensors, const Targets& targets);
  // Reads a part of one tensor into new memory. Its shape is the counts.
  void slice(const std::shared_ptr<IndexedFile>& source, std::uint32_t which,
             const Stretches& parts, std::optional<Dtype> dtype);
  // The same to a single target.
  void slice_to(const std::shared_ptr<IndexedFile>& source, std::uint32_t which,
                const Stretches& parts, const Targets& target);
  // Copies elements of one tensor, from element `offset` on, to a single target. `dimensions` has
  // (extent, stride in the tensor, stride at the target), in elements. The tensor's strides must be
  // positive; targets on a device must be contiguous.
  void copy_strided(
      const std::shared_ptr<IndexedFile>& source, std::uint32_t which, std::uint64_t offset,
      const std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t>>& dimensions,
      const Targets& target);

  void use_stream(int device, std::uint64_t stream) { plan_.device(device).stream = stream; }
  void populate(bool now) { plan_.populate = now; }
  // Sets the place in the order of use for each tensor, in the order of the calls that added them.
  // wait_for() can then wait for tensors by their numbers in that order.
  void order(std::vector<std::uint32_t> ranks);

  // Begins to pin slots, and to load the kernel if the plan will need it. start() ends this.
  void prepare_ahead(int device, const engine::Expected& expected);

  // Returns (device, bytes) of the scratch memory that start() needs.
  std::vector<std::pair<int, std::uint64_t>> prepare();
  // `scratch`: (device, address, owner) for each pair that prepare() returned. Keeps the owners
  // until the load has ended.
  void start(const std::vector<std::tuple<int, std::uint64_t, pybind11::object>>& scratch);
  bool wait(double seconds);
  // Waits until tensors have arrived or the time has passed. Returns whether they have arrived.
  bool wait_for(const std::vector<std::uint32_t>& which, double seconds);
  // The same for tensors on one device: a stream of the device waits for them instead of the host.
  bool wait_for_on_stream(const std::vector<std::uint32_t>& which, int device, std::uint64_t stream,
                          double seconds);
  void cancel();
  std::pair<std::uint64_t, std::uint64_t> progress() const;
  engine::Report finish();

  // Returns the tensors that map(), read() and slice() made, in the order of the calls, each
  // through `from_dlpack`.
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

  // The checked source of slice() and slice_to().
  struct Part {
    engine::StoredTensor tensor;
    std::span<const std::uint64_t> shape;  // of the whole tensor
    std::vector<engine::Stretch> stretches;
  };
  Part add_part(const std::shared_ptr<IndexedFile>& source, const format::TensorInfo& tensor,
                const Stretches& parts);

  // The load, if it is prepared and has an order; else ValueError.
  engine::Load& load_of(const std::vector<std::uint32_t>& which);
  engine::LoadPlan& plan() { return load_ ? load_->plan() : plan_; }
  std::shared_ptr<engine::HostMemory> allocate(std::size_t bytes, std::optional<int> pin_for);

  engine::Settings settings_;
  engine::LoadPlan plan_;
  std::vector<Output> outputs_;
  std::vector<std::weak_ptr<const engine::HostMemory>> blocks_;
  std::vector<std::shared_ptr<std::vector<std::uint64_t>>> shapes_;
  std::vector<pybind11::object> scratch_;  // declared before load_, which must end first
  std::unique_ptr<engine::Load> load_;
  std::list<engine::SlotsAhead> ahead_;
};

}  // namespace weightlift::bind
