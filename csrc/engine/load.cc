#include "engine/load.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <utility>

#include "device/staging.h"
#include "engine/delivery.h"
#include "engine/device_lane.h"
#include "engine/schedule.h"
#include "engine/sources.h"

namespace weightlift::engine {
namespace {

using Clock = std::chrono::steady_clock;

// Below this a load on the host is done before a thread would have started.
constexpr std::uint64_t kInlineBytes = 256 << 10;
// While other loads hold all pinned memory: how often to ask for some.
constexpr std::chrono::milliseconds kPoolRetry{2};

// Threads of all loads of this process, so that many loads at once do not make many times more.
std::atomic<unsigned> busy_threads{0};

std::byte* at_address(std::uint64_t address) {
  return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(address));
}

// What a thread does that may need memory: there is nobody to throw to.
template <class Work>
Status attempt(const Work& work) try {
  return work();
} catch (const std::bad_alloc&) {
  return Error{.code = ErrorCode::kOutOfMemory};
}

// Where a lane stands. Guarded by State::mutex_ but for what `device` says. Once the threads run
// nothing here grows beyond the room that start() made.
struct LaneState {
  std::uint32_t next_unit = 0;
  std::uint64_t issued = 0;  // bytes of tensors handed to threads
  std::uint32_t active = 0;  // threads at work for it
  // Device lanes:
  std::unique_ptr<DeviceLane> device;
  std::uint32_t next_chunk = 0;
  std::uint32_t chunks_done = 0;
  std::uint32_t slot_count = 0;
  std::uint32_t slot_limit = 0;
  bool adding = false;      // a thread is making a slot
  bool pool_empty = false;  // others held the budget when it last asked
  std::optional<std::uint32_t> open_slot;
  std::uint32_t open_chunk_end = 0;   // unit behind the open chunk's last
  std::optional<Error> slot_refusal;  // why there are fewer than wanted
  std::vector<std::uint32_t> chunk_of_slot;
  std::vector<std::uint32_t> units_left;  // by slot
  std::vector<std::uint32_t> free_slots;  // first in, first out
  std::vector<std::uint32_t> in_flight;   // likewise
  std::condition_variable drained;
};

struct Task {
  enum class Kind : std::uint8_t { kPopulate, kUnit, kAddSlot };
  Kind kind = Kind::kUnit;
  std::uint32_t lane = 0;
  std::uint32_t unit = 0;  // or the populate step
  std::uint32_t unit_count = 1;
  std::uint32_t slot = 0;
};

}  // namespace

class Load::State {
 public:
  State(LoadPlan plan, Settings settings) : plan_(std::move(plan)), settings_(settings) {}
  ~State() {
    cancel();
    join();
  }

  Status prepare();
  Status start();
  bool wait(std::chrono::milliseconds limit);
  void cancel() noexcept;
  Result<Report> finish();
  Progress progress() const noexcept { return {.done = done_bytes_.load(), .total = total_bytes_}; }
  LoadPlan& plan() noexcept { return plan_; }

 private:
  unsigned wanted_threads() const;
  void join() noexcept;

  template <class Body>
  bool spawn(Body body);
  void worker();
  void work();
  std::optional<Task> pick();
  bool everything_issued() const;
  Status run(const Task& task, Scratch& scratch);
  Status run_unit(const Task& task, std::uint32_t index, Scratch& scratch);
  Status fill(const Unit& unit, const Lane& lane, std::byte* slot, Scratch& scratch);
  void unit_filled(const Task& task, Status status, std::unique_lock<std::mutex>& lock);
  void drain(std::uint32_t lane_index);
  void fail(Error error);
  void thread_ended();
  void one_less();

  LoadPlan plan_;
  Settings settings_;
  Schedule schedule_;
  std::optional<Sources> sources_;
  std::uint64_t total_bytes_ = 0;
  std::uint64_t mapped_bytes_ = 0;
  Clock::time_point started_;

  mutable std::mutex mutex_;
  std::condition_variable work_;   // something may be picked
  std::condition_variable ended_;  // the last thread has ended
  std::deque<LaneState> lanes_;
  std::uint32_t next_populate_ = 0;
  bool populating_ = false;
  std::atomic<bool> stop_ = false;  // written with the lock held, read without it between units
  bool inline_ = false;
  bool held_back_ = false;  // a thread that is started by wait()
  std::optional<Error> error_;
  std::vector<std::string> fallbacks_;
  std::vector<std::thread> threads_;
  unsigned running_ = 0;
  unsigned workers_ = 0;
  std::uint64_t staging_bytes_ = 0;
  double seconds_ = 0;
  std::atomic<std::uint64_t> done_bytes_{0};
  std::atomic<std::uint64_t> read_bytes_{0};
};

// --- Before the threads ------------------------------------------------------------------------

Status Load::State::prepare() {
  started_ = Clock::now();
  settings_ = settings_.resolved();
  auto schedule = Schedule::make(plan_, settings_);
  WL_RETURN_IF_ERROR(schedule.ok() ? Status() : Status(schedule.error()));
  schedule_ = *std::move(schedule);
  for (const Lane& lane : schedule_.lanes) {
    total_bytes_ += lane.payload;
    fallbacks_.insert(fallbacks_.end(), lane.fallbacks.begin(), lane.fallbacks.end());
  }
  for (const Mapped& part : plan_.mapped) mapped_bytes_ += part.bytes;
  total_bytes_ += mapped_bytes_;
  sources_.emplace(plan_, settings_);
  return {};
}

unsigned Load::State::wanted_threads() const {
  const bool populates = !sources_->populate_steps().empty();
  std::uint64_t units = populates ? 1 : 0;
  bool devices = false;
  for (const Lane& lane : schedule_.lanes) {
    units += lane.units.size();
    devices = devices || lane.device != kHostDevice;
  }
  if (!devices && !populates && total_bytes_ - mapped_bytes_ <= kInlineBytes) return 0;
  unsigned threads = settings_.threads;
  if (sources_->cold()) threads = std::max(threads, settings_.io_depth);
  return static_cast<unsigned>(std::min<std::uint64_t>(threads, units));
}

Status Load::State::start() {
  std::uint64_t to_populate = 0;
  for (const PopulateStep& step : sources_->populate_steps()) to_populate += step.payload;
  done_bytes_ = mapped_bytes_ - to_populate;
  for (const Lane& lane : schedule_.lanes) {
    LaneState& state = lanes_.emplace_back();
    if (lane.device == kHostDevice || lane.chunks.empty()) continue;
    const DeviceNeeds& needs = plan_.device(lane.device);
    if (needs.scratch_bytes != 0 && needs.scratch == 0) {
      return Error{
          .code = ErrorCode::kInvalidArgument,
          .message = "no scratch memory was given for cuda:" + std::to_string(lane.device)};
    }
    WL_ASSIGN_OR_RETURN(state.device, DeviceLane::open(plan_, lane, needs, settings_));
    state.slot_limit = lane.slots;
    state.chunk_of_slot.resize(lane.slots);
    state.units_left.resize(lane.slots);
    state.free_slots.reserve(lane.slots);
    state.in_flight.reserve(lane.slots);
  }
  const unsigned wanted = wanted_threads();
  const unsigned limit = std::max(wanted, 2 * settings_.threads);
  const unsigned busy = busy_threads.load();
  const unsigned workers = std::min(wanted, limit > busy ? limit - busy : 1);

  const std::lock_guard lock(mutex_);
  for (std::uint32_t i = 0; i < lanes_.size(); ++i) {
    if (lanes_[i].device == nullptr) continue;
    if (!spawn([this, i] { drain(i); })) {
      stop_ = true;
      error_ = Error{.code = ErrorCode::kOutOfMemory,
                     .message =
                         "cannot start a thread: the limit of threads is reached "
                         "(`ulimit -u`, pids.max)"};
      return *error_;
    }
  }
  // The caller may have work of its own before it waits, such as building the model; its processor
  // is left to it until then.
  held_back_ = workers > 1;
  for (unsigned i = held_back_ ? 1 : 0; i < workers; ++i) {
    if (!spawn([this] { worker(); })) break;
    ++workers_;
  }
  if (workers_ == 0) {  // the caller does the work itself, in wait()
    inline_ = true;
    ++running_;
  }
  return {};
}

// With the lock held.
template <class Body>
bool Load::State::spawn(Body body) {
  try {
    threads_.emplace_back(std::move(body));
  } catch (const std::exception&) {  // the system's or the cgroup's thread limit, or no memory
    return false;
  }
  ++running_;
  ++busy_threads;
  return true;
}

// --- Threads -----------------------------------------------------------------------------------

void Load::State::worker() {
  work();
  thread_ended();
}

void Load::State::thread_ended() {
  const std::lock_guard lock(mutex_);
  --busy_threads;
  one_less();
}

// With the lock held.
void Load::State::one_less() {
  if (--running_ != 0) return;
  sources_->release();
  ended_.notify_all();
}

void Load::State::work() {
  Scratch scratch;
  std::unique_lock lock(mutex_);
  while (!stop_) {
    const auto task = pick();
    if (task) {
      lock.unlock();
      Status status = attempt([&] { return run(*task, scratch); });
      lock.lock();
      unit_filled(*task, std::move(status), lock);
      continue;
    }
    if (everything_issued()) break;
    const bool ask_again = std::any_of(lanes_.begin(), lanes_.end(),
                                       [](const LaneState& lane) { return lane.pool_empty; });
    if (ask_again) {
      work_.wait_for(lock, kPoolRetry);
      for (LaneState& lane : lanes_) lane.pool_empty = false;
    } else {
      work_.wait(lock);
    }
  }
}

bool Load::State::everything_issued() const {
  if (next_populate_ < sources_->populate_steps().size()) return false;
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    if (lanes_[i].next_unit < schedule_.lanes[i].units.size()) return false;
  }
  return true;
}

// The next task for a thread: of the lanes that can take work, the one that is furthest behind, so
// that all links stay busy to the end.
std::optional<Task> Load::State::pick() {
  if (next_populate_ < sources_->populate_steps().size() && !populating_) {
    // One at a time: a second caller breaks the sequential read-ahead of the first.
    populating_ = true;
    return Task{.kind = Task::Kind::kPopulate, .unit = next_populate_++};
  }
  std::optional<Task> best;
  double best_share = 2;
  for (std::uint32_t i = 0; i < lanes_.size(); ++i) {
    const LaneState& state = lanes_[i];
    const Lane& lane = schedule_.lanes[i];
    if (state.next_unit == lane.units.size()) continue;
    const double share = static_cast<double>(state.issued) / static_cast<double>(lane.payload);
    if (share >= best_share) continue;
    Task task{.kind = Task::Kind::kUnit, .lane = i};
    if (state.device != nullptr && !state.open_slot && state.free_slots.empty()) {
      if (state.adding || state.pool_empty || state.slot_count == state.slot_limit) {
        continue;
      }
      task.kind = Task::Kind::kAddSlot;
      task.slot = state.slot_count;
    }
    best = task;
    best_share = share;
  }
  if (!best) return best;
  LaneState& state = lanes_[best->lane];
  const Lane& lane = schedule_.lanes[best->lane];
  ++state.active;
  if (best->kind == Task::Kind::kAddSlot) {
    state.adding = true;
    return best;
  }
  if (state.device != nullptr) {
    if (!state.open_slot) {
      const std::uint32_t slot = state.free_slots.front();
      state.free_slots.erase(state.free_slots.begin());
      const Chunk& chunk = lane.chunks[state.next_chunk];
      state.chunk_of_slot[slot] = state.next_chunk++;
      state.units_left[slot] = chunk.unit_count;
      state.open_slot = slot;
      state.open_chunk_end = chunk.first_unit + chunk.unit_count;
    }
    best->slot = *state.open_slot;
    if (state.next_unit + 1 == state.open_chunk_end) state.open_slot.reset();
  }
  best->unit = state.next_unit++;
  state.issued += lane.units[best->unit].payload;
  // Fresh huge pages are faulted in by one thread each: two that touch the same one at the same
  // time both clear two megabytes, and one of them for nothing (mm/huge_memory.c).
  while (state.device == nullptr && state.next_unit < lane.units.size() &&
         lane.units[state.next_unit].target_page == lane.units[best->unit].target_page) {
    state.issued += lane.units[state.next_unit++].payload;
    ++best->unit_count;
  }
  return best;
}

Status Load::State::run(const Task& task, Scratch& scratch) {
  switch (task.kind) {
    case Task::Kind::kPopulate:
      return sources_->populate(sources_->populate_steps()[task.unit]);
    case Task::Kind::kAddSlot: {
      auto added = lanes_[task.lane].device->add_slot(task.slot);
      if (!added.ok()) return added.error();
      if (!*added) return Error{.code = ErrorCode::kCancelled, .message = "no budget"};
      return {};
    }
    case Task::Kind::kUnit:
      for (std::uint32_t i = 0; i < task.unit_count && !stop_; ++i) {
        WL_RETURN_IF_ERROR(run_unit(task, task.unit + i, scratch));
      }
  }
  return {};
}

Status Load::State::run_unit(const Task& task, std::uint32_t index, Scratch& scratch) {
  const Lane& lane = schedule_.lanes[task.lane];
  const Unit& unit = lane.units[index];
  LaneState& state = lanes_[task.lane];
  Status status = fill(unit, lane, state.device ? state.device->slot(task.slot) : nullptr, scratch);
  if (!status.ok()) {
    Error& error = status.error();
    const Copy& copy = plan_.copies[lane.pieces[unit.first_piece].copy];
    if (copy.name < plan_.names.size()) error.tensor = plan_.names[copy.name];
    if (unit.file != kFromMemory) error.path = plan_.files[unit.file]->path();
    return status;
  }
  if (unit.file != kFromMemory) read_bytes_ += unit.end - unit.begin;
  if (state.device == nullptr) done_bytes_ += unit.payload;
  return {};
}

// Brings a unit's bytes to the host target, or into the staging slot.
Status Load::State::fill(const Unit& unit, const Lane& lane, std::byte* slot, Scratch& scratch) {
  if (unit.raw_target != 0) {
    return sources_->read(unit, at_address(unit.raw_target), scratch);
  }
  if (slot != nullptr && unit.raw) {
    return sources_->read(unit, slot + unit.slot_offset, scratch);
  }
  Sources::Bytes bytes;
  if (unit.file != kFromMemory) {
    const bool is_cast = lane.pieces[unit.first_piece].host_cast;
    WL_ASSIGN_OR_RETURN(bytes, sources_->bytes(unit, is_cast, scratch));
  }
  for (std::uint32_t i = 0; i < unit.piece_count; ++i) {
    const Piece& piece = lane.pieces[unit.first_piece + i];
    std::byte* const packed = slot != nullptr ? slot + piece.slot_offset : nullptr;
    if (unit.file == kFromMemory) {
      const std::uint64_t source = plan_.copies[piece.copy].source;
      deliver(plan_, piece, at_address(source), source, packed, settings_.fp8);
    } else {
      deliver(plan_, piece, bytes.data, unit.begin, packed, settings_.fp8);
    }
  }
  return {};
}

// After a task, with the lock held: books it, and submits the slot that it filled up.
void Load::State::unit_filled(const Task& task, Status status, std::unique_lock<std::mutex>& lock) {
  if (task.kind == Task::Kind::kPopulate) {
    populating_ = false;
    if (status.ok()) {
      done_bytes_ += sources_->populate_steps()[task.unit].payload;
    } else {
      fail(std::move(status).error());
    }
    work_.notify_all();
    return;
  }
  LaneState& state = lanes_[task.lane];
  bool submits = false;
  if (task.kind == Task::Kind::kAddSlot) {
    state.adding = false;
    work_.notify_all();  // for the slot, or to ask again
    if (status.ok()) {
      ++state.slot_count;
      state.free_slots.push_back(task.slot);
      staging_bytes_ += settings_.chunk_bytes;
    } else if (state.slot_count != 0) {
      // Fewer slots are slower, not wrong.
      state.slot_limit = state.slot_count;
      if (status.error().code != ErrorCode::kCancelled) {
        state.slot_refusal = std::move(status).error();
      }
    } else if (status.error().code == ErrorCode::kCancelled) {
      state.pool_empty = true;
    } else {
      fail(std::move(status).error());
    }
  } else if (!status.ok()) {
    fail(std::move(status).error());
  } else if (state.device != nullptr && --state.units_left[task.slot] == 0 && !stop_) {
    const Chunk& chunk = schedule_.lanes[task.lane].chunks[state.chunk_of_slot[task.slot]];
    lock.unlock();
    Status submitted = attempt([&] { return state.device->submit(task.slot, chunk); });
    if (!submitted.ok()) state.device->settle();
    lock.lock();
    if (submitted.ok()) {
      state.in_flight.push_back(task.slot);
      submits = true;
    } else {
      fail(std::move(submitted).error());
    }
  }
  --state.active;
  // Nobody else: a unit that is done makes no work, and at a link's speed there are a hundred
  // thousand a second.
  if (submits || state.active == 0) state.drained.notify_all();
}

// A device lane's own thread: waits for the oldest copies and frees their slots.
void Load::State::drain(std::uint32_t lane_index) {
  LaneState& state = lanes_[lane_index];
  const Lane& lane = schedule_.lanes[lane_index];
  {
    std::unique_lock lock(mutex_);
    while (true) {
      const auto over = [&] {
        return state.chunks_done == lane.chunks.size() || (stop_ && state.active == 0);
      };
      state.drained.wait(lock, [&] { return !state.in_flight.empty() || over(); });
      if (state.in_flight.empty()) break;
      const std::uint32_t slot = state.in_flight.front();
      lock.unlock();
      Status status = attempt([&] { return state.device->wait(slot); });
      if (!status.ok()) state.device->settle();
      lock.lock();
      state.in_flight.erase(state.in_flight.begin());
      if (!status.ok()) {
        fail(std::move(status).error());
        continue;
      }
      const Chunk& chunk = lane.chunks[state.chunk_of_slot[slot]];
      for (std::uint32_t i = 0; i < chunk.unit_count; ++i) {
        done_bytes_ += lane.units[chunk.first_unit + i].payload;
      }
      ++state.chunks_done;
      state.free_slots.push_back(slot);
      work_.notify_all();
    }
    state.drained.wait(lock, [&] { return state.active == 0; });
  }
  // The slots go back now: another lane may have none, and this load's end waits for that lane.
  state.device.reset();
  thread_ended();
}

void Load::State::fail(Error error) {
  if (!error_) error_ = std::move(error);
  stop_ = true;
  work_.notify_all();
  for (LaneState& state : lanes_) state.drained.notify_all();
}

// --- The caller --------------------------------------------------------------------------------

bool Load::State::wait(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  if (std::exchange(inline_, false)) {
    lock.unlock();
    work();
    lock.lock();
    one_less();
  }
  if (std::exchange(held_back_, false) && !stop_ && !everything_issued()) {
    if (spawn([this] { worker(); })) ++workers_;
  }
  return ended_.wait_for(lock, limit, [this] { return running_ == 0; });
}

void Load::State::cancel() noexcept {
  const std::lock_guard lock(mutex_);
  if (running_ == 0) return;
  fail({.code = ErrorCode::kCancelled});
}

void Load::State::join() noexcept {
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

Result<Report> Load::State::finish() {
  join();
  seconds_ = std::chrono::duration<double>(Clock::now() - started_).count();
  for (const LaneState& state : lanes_) {
    if (!state.slot_refusal) continue;
    fallbacks_.push_back("fewer staging slots: " + std::string(state.slot_refusal->text()));
  }
  lanes_.clear();  // the slots go back
  if (error_) return *error_;
  for (const auto& file : plan_.files) WL_RETURN_IF_ERROR(file->check_unchanged());

  Report report;
  report.bytes = total_bytes_;
  report.mapped_bytes = mapped_bytes_;
  report.read_bytes = read_bytes_.load();
  report.seconds = seconds_;
  report.threads = workers_;
  report.peak_staging_bytes = staging_bytes_;
  if (staging_bytes_ != 0) report.pinned_bytes = device::StagingPool::instance().pinned_bytes();
  report.fallbacks = fallbacks_;
  const std::vector<std::string> refused = sources_->fallbacks();
  report.fallbacks.insert(report.fallbacks.end(), refused.begin(), refused.end());
  for (std::size_t i = 0; i < plan_.files.size(); ++i) {
    report.files.push_back({.path = plan_.files[i]->path(),
                            .route = io_route_name(sources_->route(i)),
                            .reason = sources_->reason(i)});
  }
  std::uint64_t host = mapped_bytes_;
  for (const Mapped& part : plan_.mapped) report.files[part.file].bytes += part.bytes;
  for (const Copy& copy : plan_.copies) {
    if (copy.file != kFromMemory) report.files[copy.file].bytes += plan_.source_bytes(copy);
  }
  for (const Lane& lane : schedule_.lanes) {
    if (lane.device == kHostDevice) {
      host += lane.payload;
    } else {
      report.devices.push_back({.device = lane.device, .bytes = lane.payload});
    }
  }
  if (host != 0) report.devices.insert(report.devices.begin(), {.bytes = host});
  return report;
}

Result<std::unique_ptr<Load>> Load::prepare(LoadPlan plan, const Settings& settings) {
  auto state = std::make_unique<State>(std::move(plan), settings);
  WL_RETURN_IF_ERROR(state->prepare());
  return std::unique_ptr<Load>(new Load(std::move(state)));
}

Load::Load(std::unique_ptr<State> state) : state_(std::move(state)) {}
Load::~Load() = default;
LoadPlan& Load::plan() noexcept {
  return state_->plan();
}
Status Load::start() {
  return state_->start();
}
bool Load::wait(std::chrono::milliseconds limit) {
  return state_->wait(limit);
}
void Load::cancel() noexcept {
  state_->cancel();
}
Progress Load::progress() const noexcept {
  return state_->progress();
}
Result<Report> Load::finish() {
  return state_->finish();
}

}  // namespace weightlift::engine
