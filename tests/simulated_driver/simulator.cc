// What the driver's functions do, up to queueing; scheduler.cc runs the queues. Quotations are from
// cuda.h (CUDA 13.0) unless they name the CUDA C++ Programming Guide.
#include "simulator.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <utility>

#include "images.h"
#include "text.h"

namespace weightlift::simulated {
namespace {

constexpr std::uint64_t kDefaultMemory = std::uint64_t{8} << 30;
constexpr std::uint64_t kPage = 4096;
constexpr std::size_t kViolationTexts = 1000;
constexpr std::size_t kChangePoints = 3;  // pct finds bugs that need up to this many
constexpr unsigned int kPatience = 16;    // polls before a query lets the device move

// Handles look like pointers but are not, and are never reused, so that a stale one is found.
constexpr std::uint64_t kContextHandle = 0x5100'0000'0000;
constexpr std::uint64_t kStreamHandle = 0x5200'0000'0000;
constexpr std::uint64_t kEventHandle = 0x5300'0000'0000;
constexpr std::uint64_t kModuleHandle = 0x5400'0000'0000;
constexpr std::uint64_t kFunctionHandle = 0x5500'0000'0000;

std::uint64_t number(const void* pointer) {
  return reinterpret_cast<std::uint64_t>(pointer);
}

template <class Handle>
Handle handle(std::uint64_t value) {
  return reinterpret_cast<Handle>(value);
}

struct ThreadContexts {
  std::uint64_t generation = 0;
  std::vector<int> devices;
};
thread_local ThreadContexts thread_contexts;

std::string range(std::uint64_t begin, std::uint64_t bytes) {
  return text("{} bytes at {:#x}", bytes, begin);
}

}  // namespace

// Whether all of it is: mincore says ENOMEM of what is not.
bool Simulator::mapped(std::uint64_t begin, std::uint64_t bytes) {
  const std::uint64_t first = begin / kPage * kPage;
  const std::uint64_t pages = (begin + bytes - first + kPage - 1) / kPage;
  std::vector<unsigned char> resident(pages);
  return mincore(reinterpret_cast<void*>(first), pages * kPage, resident.data()) == 0;
}

std::uint64_t Random::next() {
  state_ += 0x9E3779B97F4A7C15u;
  std::uint64_t mixed = state_;
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
  return mixed ^ (mixed >> 31);
}

Simulator& Simulator::instance() {
  // Never destroyed, because clients may call the driver from static destructors.
  static auto* simulator = new Simulator;
  return *simulator;
}

Simulator::Simulator() {
  // A thread may hold the lock while another forks; the child must still get its error.
  pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                 [] { instance().mutex_.unlock(); });
  reset(1, 0, SIM_EAGER);
}

bool Simulator::in_forked_child() const {
  const pid_t owner = initialised_in_.load();
  return owner != 0 && owner != getpid();
}

// --- Control ------------------------------------------------------------------------------------

void Simulator::reset(int devices, std::uint64_t seed, int policy) {
  ++generation_;
  for (const auto& [address, pinned] : pinned_) {
    if (pinned.allocated) munmap(handle<void*>(address), pinned.bytes);
  }
  pinned_.clear();
  for (const auto& stream : streams_) {
    for (const OperationPointer& operation : stream->queue) {
      operation->done = true;
      operation->waits.clear();
    }
  }
  moving_.clear();
  stream_handles_.clear();
  events_.clear();
  captures_.clear();
  modules_.clear();
  functions_.clear();
  streams_.clear();
  accesses_.clear();
  device_count_ = std::clamp(devices, 0, static_cast<int>(SIM_MAX_DEVICES));
  while (devices_.size() < static_cast<std::size_t>(device_count_)) {
    devices_.push_back(std::make_unique<Device>());
  }
  for (const auto& each : devices_) {
    each->memory.reset(kDefaultMemory);
    each->retained = 0;
    each->held = false;
    each->error = CUDA_SUCCESS;
    each->default_stream = nullptr;
    each->attributes.clear();
    each->link = 0;
    each->traffic = SimLink{};
  }
  initialised_ = exited_ = false;
  initialised_in_ = 0;
  version_ = 13000;
  hidden_.clear();
  lanes_ = kHostLane + 1;
  pushed_ = 0;
  host_clock_ = Clock{};
  host_number_ = 0;
  hashing_ = true;
  allow_blocking_ = allow_spinning_ = false;
  faults_.clear();
  calls_.clear();
  call_count_ = operations_ = 0;
  pinned_bytes_ = peak_pinned_bytes_ = 0;
  violations_.clear();
  violation_count_ = 0;
  host_rate_ = 0;
  set_costs(0, 0);
  hold(0);
  set_time(SIM_TIME_NONE);
  set_policy(seed, policy);
}

void Simulator::set_policy(std::uint64_t seed, int policy) {
  policy_ = policy;
  seed_ = seed;
  random_ = Random(seed * SIM_POLICIES + static_cast<std::uint64_t>(policy));
  steps_ = 0;
  polls_ = 0;
  // The seed decides whether the device keeps up or lags behind, because each shows other errors.
  device_pace_ = std::uint64_t{1} << random_.below(policy == SIM_SPLIT ? 8 : 6);
  low_priority_ = 0;
  host_priority_ = static_cast<std::int64_t>(random_.below(1000)) + 1;
  for (const auto& stream : streams_) {
    stream->rank = random_.next();
    stream->priority = static_cast<std::int64_t>(random_.below(1000)) + 1;
  }
  change_points_.clear();
  const std::uint64_t horizon = std::uint64_t{32} << random_.below(6);
  for (std::size_t i = 0; i < kChangePoints; ++i) {
    change_points_.insert(random_.below(horizon) + 1);
  }
}

Device* Simulator::device(int index) {
  if (index < 0 || index >= device_count_) return nullptr;
  return devices_[static_cast<std::size_t>(index)].get();
}

bool Simulator::uses_host_page_tables(int index) const {
  return attribute(index, CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES) != 0;
}

int Simulator::attribute(int index, int attribute) const {
  const auto& attributes = devices_[static_cast<std::size_t>(index)]->attributes;
  if (const auto found = attributes.find(attribute); found != attributes.end()) {
    return found->second;
  }
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return 132;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
      return 3;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
      return index + 1;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
      return 1;
    default:
      return 0;
  }
}

int Simulator::capability(int index) const {
  return 10 * attribute(index, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
         attribute(index, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
}

void Simulator::violation(std::string what) {
  ++violation_count_;
  if (violations_.size() < kViolationTexts) violations_.push_back(std::move(what));
}

std::optional<int> Simulator::hidden(const std::string& name) const {
  const auto found = hidden_.find(name);
  if (found == hidden_.end()) return std::nullopt;
  return found->second;
}

std::uint64_t Simulator::calls(const std::string& name) const {
  const auto found = calls_.find(name);
  return found == calls_.end() ? 0 : found->second;
}

void Simulator::hold_context(int index) {
  if (Device* is = device(index)) {
    initialised_ = true;
    initialised_in_ = getpid();
    is->held = true;
  }
}

std::uint64_t Simulator::external_alloc(int index, std::uint64_t bytes) {
  Device* is = device(index);
  if (is == nullptr || bytes == 0) return 0;
  hold_context(index);
  auto address = is->memory.allocate(bytes, true);
  if (!address) {
    // Memory freed in stream order is the allocator's already; only the simulator has not come to
    // it.
    for (const auto& stream : streams_) {
      const auto queued = stream->queue;
      for (const OperationPointer& operation : queued) {
        if (operation->kind == Kind::kFree) force(operation);
      }
    }
    address = is->memory.allocate(bytes, true);
  }
  return address.value_or(0);
}

bool Simulator::external_free(std::uint64_t address) {
  Device* is = device(device_of(address));
  const auto* allocation = is != nullptr ? is->memory.find(address, 0) : nullptr;
  if (allocation == nullptr || allocation->first != address || !allocation->second.external) {
    violation(text("free of {:#x}, which sim_alloc did not give or which is gone", address));
    return false;
  }
  const std::uint64_t end = address + allocation->second.bytes;
  check_unused("freed in use: memory is freed", address, end);
  is->memory.release(address);
  accesses_.forget(address, end);
  return true;
}

bool Simulator::external_free_on(int index, std::uint64_t stream, std::uint64_t address) {
  Stream* on = find_stream(index, stream);
  Device* is = device(device_of(address));
  const auto* allocation = is != nullptr ? is->memory.find(address, 0) : nullptr;
  if (on == nullptr || allocation == nullptr || allocation->first != address ||
      !allocation->second.external) {
    violation(text("free of {:#x}, which sim_alloc did not give or which is gone", address));
    return false;
  }
  const auto operation = submit(*on, Kind::kFree, text("the free of {:#x}", address));
  operation->pieces.push_back(Piece{.target = address});
  touch(operation, operation->stamp, address, address + allocation->second.bytes, true);
  turn();
  return true;
}

std::uint64_t Simulator::external_stream(int index) {
  if (device(index) == nullptr) return 0;
  hold_context(index);
  return new_stream(index, false, true, new_handle(kStreamHandle)).handle;
}

bool Simulator::destroy_external_stream(std::uint64_t value) {
  const auto found = stream_handles_.find(value);
  if (found == stream_handles_.end() || !found->second->external) return false;
  found->second->destroyed = true;
  stream_handles_.erase(found);
  return true;
}

bool Simulator::pending_write(int index, std::uint64_t stream, std::uint64_t address,
                              std::uint64_t bytes) {
  Stream* on = find_stream(index, stream);
  Device* is = device(device_of(address));
  if (on == nullptr || is == nullptr || is->memory.find(address, bytes) == nullptr) return false;
  const auto operation =
      submit(*on, Kind::kFill, text("the previous owner's kernel, {}", range(address, bytes)));
  add_pieces(*operation, address, 0, bytes, false);
  touch(operation, operation->stamp, address, address + bytes, true);
  turn();
  return true;
}

bool Simulator::host_access(std::uint64_t address, void* target, const void* source,
                            std::uint64_t bytes) {
  Device* is = device(device_of(address));
  if (is == nullptr || is->memory.find(address, bytes) == nullptr) {
    violation(text("out of bounds: the test's own access to {}", range(address, bytes)));
    return false;
  }
  turn();
  host_clock_.set(kHostLane, ++host_number_);
  const auto stamp = std::make_shared<const Stamp>(
      Stamp{kHostLane, host_number_, host_clock_, "an access by the host"});
  if (const auto other =
          accesses_.touch(address, address + bytes, source != nullptr, stamp, host_clock_)) {
    violation(text("race: the host touches {} while {} may still run", range(address, bytes),
                   other->what));
  }
  std::byte* shadow = is->memory.shadow(address);
  if (source != nullptr) std::memcpy(shadow, source, bytes);
  if (target != nullptr) std::memcpy(target, shadow, bytes);
  return true;
}

bool Simulator::read_on(int index, std::uint64_t stream, std::uint64_t address, void* target,
                        std::uint64_t bytes, Lock& held) {
  Stream* on = find_stream(index, stream);
  Device* is = device(device_of(address));
  if (on == nullptr || is == nullptr || is->memory.find(address, bytes) == nullptr) {
    violation(text("out of bounds: the test's own read of {}", range(address, bytes)));
    return false;
  }
  turn();
  const auto operation =
      submit(*on, Kind::kCopy, text("the reader's copy of {}", range(address, bytes)));
  add_pieces(*operation, number(target), address, bytes, false);
  touch(operation, operation->stamp, address, address + bytes, false);
  return complete(operation, held) == CUDA_SUCCESS;
}

void Simulator::synchronize_device(int index, Lock& held) {
  turn();
  for (std::size_t i = 0; i < streams_.size(); ++i) {
    if (streams_[i]->device == index && streams_[i]->last) complete(streams_[i]->last, held);
  }
}

void Simulator::ledger(SimLedger& out) const {
  out = SimLedger{};
  for (const auto& stream : streams_) {
    if (!stream->external && !stream->destroyed) ++out.streams;
    out.pending += stream->queue.size();
  }
  out.events = events_.size();
  for (int index = 0; index < device_count_; ++index) {
    const auto i = static_cast<std::size_t>(index);
    const Device& is = *devices_[i];
    out.allocations += is.memory.client_count();
    out.allocated_bytes += is.memory.client_bytes();
    out.external_allocations += is.memory.external_count();
    out.external_bytes += is.memory.external_bytes();
    out.contexts += static_cast<std::uint64_t>(is.retained);
    out.peak_device_bytes[i] = is.memory.peak();
    out.peak_client_bytes[i] = is.memory.client_peak();
  }
  out.pinned_ranges = pinned_.size();
  out.pinned_bytes = pinned_bytes_;
  out.peak_pinned_bytes = peak_pinned_bytes_;
  out.pushed = pushed_;
  out.modules = modules_.size();
  out.operations = operations_;
  out.calls = call_count_;
}

// --- What every function has in common ----------------------------------------------------------

std::optional<CUresult> Simulator::enter(const char* name, Need need, CUresult& injected) {
  ++calls_[name];
  if (exited_) return CUDA_ERROR_DEINITIALIZED;
  const auto context = current();
  if (need.countable) ++call_count_;
  bool lost = false;
  for (Fault& fault : faults_) {
    if (fault.name.empty() ? !need.countable : fault.name != name) continue;
    if (--fault.left != 0) continue;
    injected = fault.code;
    lost = lost || fault.sticky;
  }
  std::erase_if(faults_, [](const Fault& fault) { return fault.left == 0; });
  if (lost) {
    for (int index = 0; index < device_count_; ++index) {
      if (!need.context || !context || *context == index) lose_context(index, injected);
    }
  }
  if (injected != CUDA_SUCCESS && !need.releases) return injected;
  if (prohibited(name)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (need.initialised && !initialised_) return CUDA_ERROR_NOT_INITIALIZED;
  if (need.context) {
    if (!context) return CUDA_ERROR_INVALID_CONTEXT;
    const Device& is = *device(*context);
    if (!is.active()) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (is.error != CUDA_SUCCESS) {
      if (!need.releases) return is.error;
      injected = is.error;
    }
  }
  turn();
  return std::nullopt;
}

void Simulator::lose_context(int index, CUresult code) {
  Device& is = *device(index);
  if (is.error == CUDA_SUCCESS) is.error = code;
  for (const auto& stream : streams_) {
    if (stream->device != index) continue;
    for (const OperationPointer& operation : stream->queue) {
      operation->done = true;
      operation->waits.clear();
      std::erase(moving_, operation);
    }
    stream->queue.clear();
    // Its work does not run any more, and the error tells the host.
    host_clock_.join(stream->clock);
  }
  changed_.notify_all();
}

CUresult Simulator::init() {
  if (device_count_ == 0) return CUDA_ERROR_NO_DEVICE;
  initialised_ = true;
  initialised_in_ = getpid();
  return CUDA_SUCCESS;
}

// --- Contexts -----------------------------------------------------------------------------------

CUcontext Simulator::context_handle(int index) const {
  return handle<CUcontext>(kContextHandle + (generation_ << 12) +
                           (static_cast<std::uint64_t>(index) << 4));
}

std::optional<int> Simulator::current() {
  ThreadContexts& mine = thread_contexts;
  if (mine.generation != generation_) {
    mine.generation = generation_;
    mine.devices.clear();
  }
  if (mine.devices.empty()) return std::nullopt;
  return mine.devices.back();
}

CUresult Simulator::retain(CUcontext* context, int index) {
  if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
  Device* is = device(index);
  if (is == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  ++is->retained;
  *context = context_handle(index);
  return CUDA_SUCCESS;
}

CUresult Simulator::release(int index) {
  Device* is = device(index);
  if (is == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  // "Releasing a primary context that has not been previously retained will fail with
  // CUDA_ERROR_INVALID_CONTEXT."
  if (is->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  // "The context is automatically reset once the last reference to it is released."
  if (--is->retained == 0 && !is->held) reset_context(index, "its last release");
  return CUDA_SUCCESS;
}

void Simulator::reset_context(int index, const char* why) {
  Device& is = *device(index);
  std::size_t streams = 0;
  std::size_t pending = 0;
  for (const auto& stream : streams_) {
    if (stream->device != index) continue;
    pending += stream->queue.size();
    if (stream->external || stream->destroyed) continue;
    ++streams;
    stream->destroyed = true;
    stream_handles_.erase(stream->handle);
  }
  const std::size_t events =
      std::erase_if(events_, [&](const auto& event) { return event.second.device == index; });
  const std::size_t modules =
      std::erase_if(modules_, [&](const auto& module) { return module.second == index; });
  std::size_t ranges = 0;
  for (auto each = pinned_.begin(); each != pinned_.end();) {
    if (each->second.device != index) {
      ++each;
      continue;
    }
    ++ranges;
    pinned_bytes_ -= each->second.bytes;
    accesses_.forget(each->first, each->first + each->second.bytes);
    if (each->second.allocated) munmap(handle<void*>(each->first), each->second.bytes);
    each = pinned_.erase(each);
  }
  const std::uint64_t allocations = is.memory.client_count();
  if (streams + events + modules + allocations + ranges + pending != 0) {
    violation(
        text("context: device {} is reset by {} with {} streams, {} events, {} "
             "modules, {} allocations, {} pinned ranges alive, {} operations pending",
             index, why, streams, events, modules, allocations, ranges, pending));
  }
  lose_context(index, CUDA_SUCCESS);
  is.error = CUDA_SUCCESS;
  is.memory.release_all(false);
}

CUresult Simulator::push(CUcontext context) {
  (void)current();  // a thread of an earlier run starts anew
  for (int index = 0; index < device_count_; ++index) {
    if (context_handle(index) != context || !device(index)->active()) continue;
    thread_contexts.devices.push_back(index);
    ++pushed_;
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_CONTEXT;
}

CUresult Simulator::pop(CUcontext* context) {
  const auto top = current();
  if (!top) return CUDA_ERROR_INVALID_CONTEXT;
  if (context != nullptr) *context = context_handle(*top);
  thread_contexts.devices.pop_back();
  if (pushed_ > 0) --pushed_;
  return CUDA_SUCCESS;
}

CUresult Simulator::set_current(CUcontext context) {
  const auto top = current();
  std::optional<int> wanted;
  for (int index = 0; index < device_count_; ++index) {
    if (context_handle(index) == context && device(index)->active()) wanted = index;
  }
  if (context != nullptr && !wanted) return CUDA_ERROR_INVALID_CONTEXT;
  if (top) thread_contexts.devices.pop_back();
  if (wanted) thread_contexts.devices.push_back(*wanted);
  return CUDA_SUCCESS;
}

CUresult Simulator::context_synchronize(Lock& held) {
  const int index = *current();
  if (context_conflicts(index, "cuCtxSynchronize")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  synchronize_device(index, held);
  return device(index)->error;
}

// --- Streams and events -------------------------------------------------------------------------

std::uint64_t Simulator::new_handle(std::uint64_t kind) {
  return kind + (++handles_ << 4);
}

Stream& Simulator::new_stream(int index, bool blocking, bool external, std::uint64_t value) {
  auto stream = std::make_unique<Stream>();
  stream->handle = value;
  stream->device = index;
  stream->blocking = blocking;
  stream->external = external;
  stream->lane = lanes_++;
  stream->rank = random_.next();
  stream->priority = static_cast<std::int64_t>(random_.below(1000)) + 1;
  stream->name = value == 0 ? text("the default stream of device {}", index)
                            : text("stream {} of device {}", stream->lane, index);
  Stream& result = *stream;
  streams_.push_back(std::move(stream));
  if (value != 0) stream_handles_.emplace(value, &result);
  return result;
}

Stream& Simulator::default_stream(int index) {
  Device& is = *device(index);
  if (is.default_stream == nullptr) is.default_stream = &new_stream(index, false, true, 0);
  return *is.default_stream;
}

Stream* Simulator::find_stream(CUstream stream) {
  if (stream == nullptr || stream == CU_STREAM_LEGACY) return &default_stream(*current());
  const auto found = stream_handles_.find(number(stream));
  return found == stream_handles_.end() ? nullptr : found->second;
}

Stream* Simulator::find_stream(int index, std::uint64_t value) {
  if (device(index) == nullptr) return nullptr;
  hold_context(index);
  if (value == 0) return &default_stream(index);
  const auto found = stream_handles_.find(value);
  return found == stream_handles_.end() ? nullptr : found->second;
}

Event* Simulator::find_event(CUevent event) {
  const auto found = events_.find(number(event));
  return found == events_.end() ? nullptr : &found->second;
}

CUresult Simulator::stream_create(CUstream* stream, unsigned int flags) {
  if (stream == nullptr || (flags & ~static_cast<unsigned int>(CU_STREAM_NON_BLOCKING)) != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const bool blocking = (flags & CU_STREAM_NON_BLOCKING) == 0;
  if (blocking && !allow_blocking_) {
    violation("blocking: a stream is created that waits for the default stream, and it for that");
  }
  *stream =
      handle<CUstream>(new_stream(*current(), blocking, false, new_handle(kStreamHandle)).handle);
  return CUDA_SUCCESS;
}

CUresult Simulator::stream_destroy(CUstream stream) {
  const auto found = stream_handles_.find(number(stream));
  if (found == stream_handles_.end()) return CUDA_ERROR_INVALID_HANDLE;
  if (found->second->external) {
    violation("context: the client destroys a stream that is not its own");
    return CUDA_ERROR_INVALID_HANDLE;
  }
  // "In case the device is still doing work in the stream ... the function will return immediately
  // and the resources ... will be released automatically once the device has completed all work".
  found->second->destroyed = true;
  stream_handles_.erase(found);
  return CUDA_SUCCESS;
}

CUresult Simulator::stream_synchronize(CUstream stream, Lock& held) {
  Stream* on = find_stream(stream);
  if (on == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (conflicts(on->capture, "cuStreamSynchronize")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  return complete(submit(*on, Kind::kMarker, "a stream synchronisation"), held);
}

CUresult Simulator::stream_query(CUstream stream) {
  Stream* on = find_stream(stream);
  if (on == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (conflicts(on->capture, "cuStreamQuery")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (on->last && held()) return CUDA_ERROR_NOT_READY;
  if (on->last && !on->last->done && ++polls_ % kPatience == 0 && !timed()) force(on->last);
  if (on->last && !on->last->done) return CUDA_ERROR_NOT_READY;
  if (on->last) learn(*on->last);
  return device(on->device)->error;
}

CUresult Simulator::stream_wait(CUstream stream, CUevent event, unsigned int flags) {
  Stream* on = find_stream(stream);
  const Event* is = find_event(event);
  if (on == nullptr || is == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (flags != CU_EVENT_WAIT_DEFAULT) return CUDA_ERROR_INVALID_VALUE;
  // "Before the first call to cuEventRecord(), an event represents an empty set of work"; and waits
  // "use the most recently captured state at the time of the API call, and are not affected by
  // later calls to cuEventRecord()". "hEvent may be from a different context or device".
  if (is->capture && !on->capture) on->capture = is->capture;  // it joins, as the graph's next node
  if (on->capture) return CUDA_SUCCESS;
  if (is->record) submit(*on, Kind::kMarker, "a wait", {is->record});
  return CUDA_SUCCESS;
}

CUresult Simulator::event_create(CUevent* event, unsigned int flags) {
  constexpr unsigned int kKnown =
      CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS;
  if (event == nullptr || (flags & ~kKnown) != 0) return CUDA_ERROR_INVALID_VALUE;
  const std::uint64_t value = new_handle(kEventHandle);
  events_.emplace(value, Event{.device = *current(),
                               .record = nullptr,
                               .sleeps = (flags & CU_EVENT_BLOCKING_SYNC) != 0,
                               .capture = nullptr});
  *event = handle<CUevent>(value);
  return CUDA_SUCCESS;
}

CUresult Simulator::event_destroy(CUevent event) {
  // "An event may be destroyed before it is complete".
  return events_.erase(number(event)) == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult Simulator::event_record(CUevent event, CUstream stream) {
  Stream* on = find_stream(stream);
  Event* is = find_event(event);
  if (on == nullptr || is == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  // "hEvent and hStream must be from the same context otherwise CUDA_ERROR_INVALID_HANDLE".
  if (on->device != is->device) return CUDA_ERROR_INVALID_HANDLE;
  is->capture = on->capture;
  if (on->capture) return CUDA_SUCCESS;
  is->record = submit(*on, Kind::kMarker, "an event");
  return CUDA_SUCCESS;
}

CUresult Simulator::event_synchronize(CUevent event, Lock& held) {
  const Event* is = find_event(event);
  if (is == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  const int index = is->device;
  if (conflicts(is->capture, "cuEventSynchronize")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (!is->sleeps && !allow_spinning_) {
    violation("spin: cuEventSynchronize on an event without CU_EVENT_BLOCKING_SYNC");
  }
  if (!is->record) return CUDA_SUCCESS;
  const OperationPointer record = is->record;  // the event may be destroyed during the wait
  complete(record, held);
  return device(index)->error;
}

CUresult Simulator::event_query(CUevent event) {
  const Event* is = find_event(event);
  if (is == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (conflicts(is->capture, "cuEventQuery")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (!is->record) return CUDA_SUCCESS;
  if (held()) return CUDA_ERROR_NOT_READY;
  if (!is->record->done && ++polls_ % kPatience == 0 && !timed()) force(is->record);
  if (!is->record->done) return CUDA_ERROR_NOT_READY;
  learn(*is->record);
  return device(is->device)->error;
}

// --- Memory -------------------------------------------------------------------------------------

int Simulator::device_of(std::uint64_t address) const {
  for (int index = 0; index < device_count_; ++index) {
    if (devices_[static_cast<std::size_t>(index)]->memory.contains(address)) return index;
  }
  return -1;
}

void Simulator::check_unused(const char* what, std::uint64_t begin, std::uint64_t end) {
  if (const auto user = accesses_.unfinished(begin, end, host_clock_)) {
    violation(text("{} ({}) while {} may still run", what, range(begin, end - begin), user->what));
  }
}

CUresult Simulator::mem_alloc(CUdeviceptr* pointer, std::size_t bytes) {
  if (pointer == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  const auto address = device(*current())->memory.allocate(bytes, false);
  if (!address) return CUDA_ERROR_OUT_OF_MEMORY;
  *pointer = *address;
  return CUDA_SUCCESS;
}

CUresult Simulator::mem_free(CUdeviceptr pointer) {
  if (pointer == 0) return CUDA_SUCCESS;
  Device* is = device(device_of(pointer));
  const auto* allocation = is != nullptr ? is->memory.find(pointer, 0) : nullptr;
  if (allocation == nullptr || allocation->first != pointer) return CUDA_ERROR_INVALID_VALUE;
  if (allocation->second.external) {
    violation(text("the client frees {:#x}, which is not its own", pointer));
    return CUDA_ERROR_INVALID_VALUE;
  }
  // "This API may perform implicit synchronization": clients cannot rely on "may".
  const std::uint64_t end = pointer + allocation->second.bytes;
  check_unused("freed in use: cuMemFree", pointer, end);
  is->memory.release(pointer);
  accesses_.forget(pointer, end);
  return CUDA_SUCCESS;
}

CUresult Simulator::mem_info(std::size_t* available, std::size_t* total) {
  if (available == nullptr || total == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const DeviceMemory& memory = device(*current())->memory;
  *available = memory.limit() > memory.used() ? memory.limit() - memory.used() : 0;
  *total = memory.limit();
  return CUDA_SUCCESS;
}

const std::pair<const std::uint64_t, Pinned>* Simulator::pinned_over(std::uint64_t address,
                                                                     std::uint64_t bytes) const {
  auto after = pinned_.upper_bound(address);
  if (after == pinned_.begin()) return nullptr;
  const auto& entry = *std::prev(after);
  const std::uint64_t offset = address - entry.first;
  if (offset > entry.second.bytes || bytes > entry.second.bytes - offset) return nullptr;
  return &entry;
}

bool Simulator::overlaps_pinned(std::uint64_t begin, std::uint64_t end) const {
  // Page-locking is by page: two ranges that share one cannot both be relied on to register.
  const auto page_of = [](std::uint64_t address) { return address / kPage * kPage; };
  const std::uint64_t last = page_of(end + kPage - 1);
  return std::ranges::any_of(pinned_, [&](const auto& entry) {
    return page_of(entry.first) < last &&
           page_of(begin) < page_of(entry.first + entry.second.bytes + kPage - 1);
  });
}

CUresult Simulator::host_register(void* address, std::size_t bytes, unsigned int flags) {
  constexpr unsigned int kKnown = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP |
                                  CU_MEMHOSTREGISTER_IOMEMORY | CU_MEMHOSTREGISTER_READ_ONLY;
  if (address == nullptr || bytes == 0 || (flags & ~kKnown) != 0) return CUDA_ERROR_INVALID_VALUE;
  const std::uint64_t begin = number(address);
  if (device_of(begin) >= 0) return CUDA_ERROR_INVALID_VALUE;
  if (!mapped(begin, bytes)) return CUDA_ERROR_INVALID_VALUE;
  if (overlaps_pinned(begin, begin + bytes)) {
    for (const auto& [at, pinned] : pinned_) {
      if (!mapped(at, pinned.bytes)) {
        violation(text("unmapped: {} are registered still", range(at, pinned.bytes)));
      }
    }
    return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  }
  pinned_.emplace(begin,
                  Pinned{bytes, *current(), (flags & CU_MEMHOSTREGISTER_PORTABLE) != 0, false});
  pinned_bytes_ += bytes;
  peak_pinned_bytes_ = std::max(peak_pinned_bytes_, pinned_bytes_);
  return CUDA_SUCCESS;
}

CUresult Simulator::host_unregister(void* address) {
  // "The base address must be the same one specified to cuMemHostRegister()."
  const auto found = pinned_.find(number(address));
  if (found == pinned_.end() || found->second.allocated) {
    return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  }
  const std::uint64_t end = found->first + found->second.bytes;
  if (!mapped(found->first, found->second.bytes)) {
    violation(text("unmapped: {} are unregistered after they were unmapped",
                   range(found->first, found->second.bytes)));
  }
  check_unused("unpinned in use: cuMemHostUnregister", found->first, end);
  cancel(found->first, end);
  accesses_.forget(found->first, end);
  pinned_bytes_ -= found->second.bytes;
  pinned_.erase(found);
  return CUDA_SUCCESS;
}

CUresult Simulator::host_alloc(void** address, std::size_t bytes, unsigned int flags) {
  constexpr unsigned int kKnown =
      CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_WRITECOMBINED;
  if (address == nullptr || bytes == 0 || (flags & ~kKnown) != 0) return CUDA_ERROR_INVALID_VALUE;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  pinned_.emplace(number(memory),
                  Pinned{bytes, *current(), (flags & CU_MEMHOSTALLOC_PORTABLE) != 0, true});
  pinned_bytes_ += bytes;
  peak_pinned_bytes_ = std::max(peak_pinned_bytes_, pinned_bytes_);
  *address = memory;
  return CUDA_SUCCESS;
}

CUresult Simulator::host_free(void* address) {
  const auto found = pinned_.find(number(address));
  if (found == pinned_.end() || !found->second.allocated) return CUDA_ERROR_INVALID_VALUE;
  const std::uint64_t end = found->first + found->second.bytes;
  check_unused("unpinned in use: cuMemFreeHost", found->first, end);
  cancel(found->first, end);
  accesses_.forget(found->first, end);
  pinned_bytes_ -= found->second.bytes;
  munmap(address, found->second.bytes);
  pinned_.erase(found);
  return CUDA_SUCCESS;
}

// --- Queueing -----------------------------------------------------------------------------------

OperationPointer Simulator::submit(Stream& stream, Kind kind, std::string what,
                                   std::vector<OperationPointer> waits) {
  auto operation = std::make_shared<Operation>();
  operation->kind = kind;
  operation->stream = &stream;
  operation->order = ++operations_;
  // The default stream and the streams that are not CU_STREAM_NON_BLOCKING wait for each other.
  Stream* legacy = device(stream.device)->default_stream;
  if (&stream == legacy) {
    for (const auto& other : streams_) {
      if (other->device == stream.device && other->blocking && other->last) {
        waits.push_back(other->last);
      }
    }
  } else if (stream.blocking && legacy != nullptr && legacy->last) {
    waits.push_back(legacy->last);
  }
  host_clock_.set(kHostLane, ++host_number_);
  stream.clock.join(host_clock_);
  for (const OperationPointer& wait : waits) stream.clock.join(wait->stamp->clock);
  stream.clock.set(stream.lane, ++stream.number);
  operation->stamp = std::make_shared<const Stamp>(
      Stamp{stream.lane, stream.number, stream.clock, std::move(what) + " on " + stream.name});
  std::erase_if(waits, [](const OperationPointer& wait) { return wait->done; });
  operation->waits = std::move(waits);
  stream.last = operation;
  if (device(stream.device)->error != CUDA_SUCCESS) {
    operation->done = true;  // nothing runs on a lost context
    operation->waits.clear();
  } else {
    stream.queue.push_back(operation);
  }
  return operation;
}

void Simulator::touch(const OperationPointer& operation, const StampPointer& stamp,
                      std::uint64_t begin, std::uint64_t end, bool write) {
  const auto other = accesses_.touch(begin, end, write, stamp, host_clock_);
  if (!other || operation->reported) return;
  operation->reported = true;
  violation(text("race: {} and {} both touch {} in no order", other->what, stamp->what,
                 range(begin, end - begin)));
}

CUresult Simulator::copy(const char* name, CUstream stream, std::vector<Copy> copies,
                         Direction direction, Lock& held) {
  Stream* on = find_stream(stream);
  if (on == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  std::erase_if(copies, [](const Copy& copy) { return copy.bytes == 0; });
  if (copies.empty()) return CUDA_SUCCESS;
  if (on->capture) {
    violation(text("capture: {} on {}, which is part of the one on {}", name, on->name,
                   on->capture->name));
    return CUDA_SUCCESS;  // a node of a graph
  }

  bool synchronous = false;
  const auto check_side = [&](std::uint64_t address, const Copy& copy, bool may_be_device,
                              bool may_be_host, bool source) {
    const char* side = source ? "source" : "target";
    const int owner = device_of(address);
    if ((owner >= 0 && !may_be_device) || (owner < 0 && !may_be_host)) {
      violation(text("out of bounds: the {} of {} is {} memory: {}", side, name,
                     owner >= 0 ? "device" : "host", range(address, copy.bytes)));
      return false;
    }
    if (owner >= 0) {
      if (device(owner)->memory.find(address, copy.bytes) == nullptr) {
        violation(text("out of bounds: the {} of {} is not inside a live allocation: {}", side,
                       name, range(address, copy.bytes)));
        return false;
      }
      if (owner != on->device) {
        violation(
            text("wrong device: the {} of {} is on device {}, {}", side, name, owner, on->name));
      }
      return true;
    }
    const auto* pinned = pinned_over(address, copy.bytes);
    if (pinned == nullptr) {
      if (source &&
          (copy.order != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM || uses_host_page_tables(on->device))) {
        return true;
      }
      violation(text("unregistered: the {} of {} is not pinned: {}", side, name,
                     range(address, copy.bytes)));
      synchronous = synchronous || !source;
    } else if (!pinned->second.portable && pinned->second.device != on->device) {
      violation(text("unregistered: the {} of {} is pinned for device {} alone, not {}: {}", side,
                     name, pinned->second.device, on->name, range(address, copy.bytes)));
    }
    return true;
  };
  const bool host_source = direction == Direction::kHostToDevice || direction == Direction::kAny;
  const bool host_target = direction == Direction::kDeviceToHost || direction == Direction::kAny;
  const bool device_source = direction != Direction::kHostToDevice;
  const bool device_target = direction != Direction::kDeviceToHost;
  for (const Copy& copy : copies) {
    if (!check_side(copy.target, copy, device_target, host_target, false) ||
        !check_side(copy.source, copy, device_source, host_source, true)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  // "Specifying any dependent copies within a batch will result in undefined behavior."
  std::map<std::uint64_t, std::uint64_t> targets;
  const auto overlaps = [&](std::uint64_t begin, std::uint64_t end) {
    auto after = targets.lower_bound(end);
    return after != targets.begin() && std::prev(after)->second > begin;
  };
  for (const Copy& copy : copies) {
    if (overlaps(copy.target, copy.target + copy.bytes)) {
      violation(text("race: two copies of one {} write {}", name, range(copy.target, copy.bytes)));
      break;
    }
    targets.emplace(copy.target, copy.target + copy.bytes);
  }
  if (std::ranges::any_of(copies, [&](const Copy& copy) {
        return overlaps(copy.source, copy.source + copy.bytes);
      })) {
    violation(text("race: one {} reads what it writes", name));
  }

  std::size_t bytes = 0;
  for (const Copy& copy : copies) bytes += copy.bytes;
  const auto operation =
      submit(*on, Kind::kCopy, text("{} of {} bytes to {:#x}", name, bytes, copies.front().target));
  // A source that may be read out of stream order is ordered after what the host knew, no more.
  StampPointer early;
  for (const Copy& copy : copies) {
    const int source_device = device_of(copy.source);
    const int target_device = device_of(copy.target);
    const bool stream_order = copy.order == CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    const bool pageable =
        source_device < 0 && pinned_over(copy.source, copy.bytes) == nullptr && stream_order;
    // The device reads them when it comes to it where it uses the host's page tables.
    const bool of_pages = pageable && uses_host_page_tables(on->device);
    // Pageable sources are staged before the call returns; so is what is only valid during it.
    const bool snapshot =
        copy.order == CU_MEMCPY_SRC_ACCESS_ORDER_DURING_API_CALL || (pageable && !of_pages) ||
        (copy.order == CU_MEMCPY_SRC_ACCESS_ORDER_ANY && policy_ != SIM_EAGER && random_.coin());
    if (!stream_order && !early) {
      early = std::make_shared<const Stamp>(
          Stamp{on->lane, on->number, host_clock_, operation->stamp->what});
    }
    touch(operation, stream_order ? operation->stamp : early, copy.source, copy.source + copy.bytes,
          false);
    touch(operation, operation->stamp, copy.target, copy.target + copy.bytes, true);
    std::uint64_t source = copy.source;
    if (snapshot) {
      const auto* from = source_device >= 0 ? device(source_device)->memory.shadow(source)
                                            : handle<const std::byte*>(source);
      operation->snapshots.emplace_back(from, from + copy.bytes);
      source = number(operation->snapshots.back().data());
    }
    add_pieces(*operation, copy.target, source, copy.bytes, source_device < 0 && !snapshot,
               of_pages);
    if (of_pages) operation->of_pages += copy.bytes;
    if (source_device < 0 && target_device >= 0) operation->to_device += copy.bytes;
    if (source_device >= 0 && target_device < 0) operation->to_host += copy.bytes;
  }
  // "For transfers from device memory to pageable host memory, the function will return only once
  // the copy has completed" (API synchronization behavior).
  if (synchronous) return complete(operation, held);
  return CUDA_SUCCESS;
}

// --- Modules ------------------------------------------------------------------------------------

CUresult Simulator::module_load(CUmodule* module, const void* image) {
  if (module == nullptr || image == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const CUresult taken = check_image(image, version_, capability(*current()));
  if (taken != CUDA_SUCCESS) return taken;
  const std::uint64_t value = new_handle(kModuleHandle);
  modules_.emplace(value, *current());
  *module = handle<CUmodule>(value);
  return CUDA_SUCCESS;
}

CUresult Simulator::module_unload(CUmodule module) {
  const auto found = modules_.find(number(module));
  if (found == modules_.end()) return CUDA_ERROR_INVALID_HANDLE;
  if (found->second != *current()) return CUDA_ERROR_INVALID_CONTEXT;
  for (const auto& stream : streams_) {
    for (const OperationPointer& operation : stream->queue) {
      if (operation->kind == Kind::kKernel && stream->device == found->second) {
        violation("freed in use: cuModuleUnload while " + operation->stamp->what + " is pending");
      }
    }
  }
  modules_.erase(found);
  std::erase_if(functions_, [&](const auto& entry) { return entry.second == number(module); });
  return CUDA_SUCCESS;
}

CUresult Simulator::module_function(CUfunction* function, CUmodule module, const char* name) {
  if (function == nullptr || name == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!modules_.contains(number(module))) return CUDA_ERROR_INVALID_HANDLE;
  if (std::string_view(name) != convert::kScatterKernel) return CUDA_ERROR_NOT_FOUND;
  const std::uint64_t value = new_handle(kFunctionHandle);
  functions_.emplace(value, number(module));
  *function = handle<CUfunction>(value);
  return CUDA_SUCCESS;
}

CUresult Simulator::launch(CUfunction function, std::array<unsigned int, 3> grid,
                           std::array<unsigned int, 3> block, CUstream stream, void** parameters) {
  const auto owner = functions_.find(number(function));
  if (owner == functions_.end()) return CUDA_ERROR_INVALID_HANDLE;
  Stream* on = find_stream(stream);
  if (on == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  // "A kernel launch will fail if it is issued to a stream that is not associated to the current
  // device" (CUDA C++ Programming Guide, Stream and Event Behavior); likewise a foreign function.
  if (on->device != *current() || modules_.at(owner->second) != on->device) {
    return CUDA_ERROR_INVALID_HANDLE;
  }
  if (std::ranges::any_of(grid, [](unsigned int size) { return size == 0; }) ||
      std::ranges::any_of(block, [](unsigned int size) { return size == 0; })) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (on->capture) {
    violation(text("capture: a kernel on {}, which is part of the one on {}", on->name,
                   on->capture->name));
    return CUDA_SUCCESS;
  }
  // The parameters are read now, as the driver does: clients keep them on their stack.
  Launch launch;
  std::memcpy(&launch.chunk, parameters[0], sizeof launch.chunk);
  std::memcpy(&launch.tiles_offset, parameters[1], sizeof launch.tiles_offset);
  std::memcpy(&launch.tile_count, parameters[2], sizeof launch.tile_count);
  std::memcpy(&launch.rules, parameters[3], sizeof launch.rules);
  if (grid != std::array{launch.tile_count, 1u, 1u} ||
      block != std::array{convert::kScatterThreads, 1u, 1u}) {
    violation(text("launch: {} tiles on a grid of {}x{}x{} blocks of {}x{}x{} threads",
                   launch.tile_count, grid[0], grid[1], grid[2], block[0], block[1], block[2]));
  }
  const auto operation = submit(*on, Kind::kKernel,
                                text("{} of {} tiles of the chunk at {:#x}",
                                     convert::kScatterKernel, launch.tile_count, launch.chunk));
  operation->launch = launch;
  // Its source is known now; its targets are known when it runs.
  const std::uint64_t bytes =
      launch.tiles_offset + std::uint64_t{launch.tile_count} * sizeof(convert::Tile);
  touch(operation, operation->stamp, launch.chunk, launch.chunk + bytes, false);
  return CUDA_SUCCESS;
}

}  // namespace weightlift::simulated
