#include "engine/load.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "convert/cast.h"
#include "device/context.h"
#include "device/staging.h"
#include "engine/arrivals.h"
#include "engine/dispatcher.h"
#include "engine/plan.h"
#include "engine/report.h"
#include "engine/runner.h"
#include "engine/schedule.h"
#include "engine/settings.h"
#include "engine/sources.h"
#include "engine/thread_group.h"
#include "io/file.h"
#include "mutex.h"
#include "result.h"

namespace weightlift::engine {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// A smaller load to the host ends before a thread would have started.
constexpr std::uint64_t kInlineBytes = 256 << 10;

// Whether a whole tensor is in host memory, in the order of the file.
bool can_be_compared(const Copy& copy) noexcept {
  return copy.device == kHostDevice && copy.dimension_count == 0;
}

// kFileChanged if the file does not contain the bytes that were copied from it to host memory.
Status compare_with_file(const LoadPlan& plan, const Copy& copy, const convert::Fp8Rules& fp8) {
  constexpr std::uint64_t kStep = std::uint64_t{4} << 20;
  const io::File& file = *plan.files[copy.file];
  std::vector<std::byte> now;
  std::vector<std::byte> cast;
  const auto loop = copy.casts() ? convert::host_cast(*convert::float_format(copy.source_dtype),
                                                      *convert::float_format(copy.target_dtype))
                                 : nullptr;
  const auto* const target = reinterpret_cast<const std::byte*>(copy.target);
  const std::uint64_t bytes = plan.source_bytes(copy);
  for (std::uint64_t at = 0; at < bytes; at += kStep) {
    now.resize(std::min(kStep, bytes - at));
    WL_RETURN_IF_ERROR(file.read_exact(copy.source + at, now));
    std::span<const std::byte> expected = now;
    std::uint64_t begin = at;
    if (loop != nullptr) {
      const std::uint64_t count = now.size() / copy.source_item();
      cast.resize(count * copy.target_item());
      loop(now.data(), cast.data(), count, fp8);
      expected = cast;
      begin = at / copy.source_item() * copy.target_item();
    }
    if (std::memcmp(expected.data(), target + begin, expected.size()) != 0) {
      return Error{.code = ErrorCode::kFileChanged,
                   .message =
                       "the file was written to while it was read, so old and new bytes may be "
                       "mixed; load it again when its writer has finished",
                   .path = file.path(),
                   .offset = copy.source + at};
    }
  }
  return {};
}

// Compares the file with the bytes that were copied from it, for `names` or for all. kFileChanged
// if they differ; false if some cannot be compared, because the tensor was sliced or went to a
// device.
Result<bool> holds_what_was_copied(const LoadPlan& plan, std::size_t number,
                                   const convert::Fp8Rules& fp8,
                                   std::optional<std::span<const std::uint32_t>> names = {}) {
  for (const Copy& copy : plan.copies) {
    if (copy.file != number) continue;
    if (names && std::find(names->begin(), names->end(), copy.name) == names->end()) continue;
    if (!can_be_compared(copy)) return false;
    WL_RETURN_IF_ERROR(compare_with_file(plan, copy, fp8));
  }
  return true;
}

Error written_to(const io::File& file) {
  return {.code = ErrorCode::kFileChanged,
          .message =
              "the file was written to after it was opened, or its modification time suggests so; "
              "open it again when its writer has finished",
          .path = file.path()};
}

}  // namespace

class Load::State {
 public:
  State(LoadPlan plan, Settings settings) : plan_(std::move(plan)), settings_(settings) {}
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() { cancel(); }

  Status prepare();
  Status start();
  bool wait(milliseconds limit);
  void cancel() noexcept;
  Result<bool> wait_for(std::span<const std::uint32_t> names, milliseconds limit);
  Result<bool> wait_for(std::span<const std::uint32_t> names, int device, CUstream stream,
                        milliseconds limit);
  Result<std::vector<std::string>> check_files() const;
  Result<Report> finish();
  Progress progress() const noexcept {
    return {.done = counters_.delivered_bytes.load(), .total = total_bytes_};
  }
  LoadPlan& plan() noexcept { return plan_; }

 private:
  void accept_times_so_far() const;
  unsigned wanted_workers() const;
  Status spawn_lane_threads();
  bool work_is_left();
  Result<bool> wait_for(std::span<const std::uint32_t> names, Arrivals::Level level,
                        milliseconds limit);
  Status check_files_of(std::span<const std::uint32_t> names) const;

  LoadPlan plan_;
  Settings settings_;
  Schedule schedule_;
  std::optional<Sources> sources_;
  std::uint64_t total_bytes_ = 0;
  Clock::time_point started_;
  Clock::time_point ended_;  // written by the last thread
  Counters counters_;
  std::optional<Dispatcher> dispatcher_;
  std::optional<Arrivals> arrivals_;  // if the plan has ranks
  std::optional<Runner> runner_;
  unsigned workers_ = 0;
  std::atomic<bool> runs_inline_ = false;  // wait() does the work
  std::atomic<bool> held_back_ = false;    // wait() starts the last thread
  ThreadGroup threads_{[this] {
    sources_->release();
    ended_ = Clock::now();
    if (arrivals_) arrivals_->end();
  }};
};

Status Load::State::prepare() {
  started_ = Clock::now();
  settings_ = settings_.resolved();
  if (!plan_.ranks.empty()) {
    const auto is_named = [this](const Copy& copy) { return copy.name < plan_.names.size(); };
    if (plan_.ranks.size() != plan_.names.size() ||
        !std::all_of(plan_.copies.begin(), plan_.copies.end(), is_named)) {
      return Error{
          .code = ErrorCode::kInvalidArgument,
          .message = "a plan with an order of use needs a name and a rank for each tensor"};
    }
  }
  WL_ASSIGN_OR_RETURN(schedule_, Schedule::make(plan_, settings_));
  total_bytes_ = total_bytes(plan_, schedule_);
  sources_.emplace(plan_, settings_);
  if (!plan_.ranks.empty()) arrivals_.emplace(plan_, schedule_, *sources_);
  return {};
}

unsigned Load::State::wanted_workers() const {
  const bool populates = !sources_->populate_steps().empty();
  std::uint64_t units = populates ? 1 : 0;
  std::uint64_t copied = 0;
  unsigned devices = 0;
  for (const Lane& lane : schedule_.lanes) {
    units += lane.units.size();
    copied += lane.payload;
    devices += lane.device != kHostDevice ? 1 : 0;
  }
  if (devices == 0 && !populates && copied <= kInlineBytes) return 0;
  unsigned threads = settings_.thread_count();
  if (sources_->cold()) {
    threads =
        std::max(threads, settings_.reads_in_flight(sources_->reads_directly() ? devices : 0));
  }
  const auto wanted = static_cast<unsigned>(std::min<std::uint64_t>(threads, units));
  const unsigned limit = std::max(wanted, 2 * settings_.thread_count());
  const unsigned busy = ThreadGroup::busy();
  return std::min(wanted, limit > busy ? limit - busy : 1);
}

Status Load::State::spawn_lane_threads() {
  for (std::uint32_t lane = 0; lane < schedule_.lanes.size(); ++lane) {
    if (runner_->device_of(lane) == nullptr) continue;
    if (threads_.spawn([this, lane] { runner_->await_copies(lane); })) continue;
    return Error{.code = ErrorCode::kOutOfMemory,
                 .message =
                     "cannot start a thread: raise the limit of threads (`ulimit -u`, or the "
                     "cgroup's pids.max)"};
  }
  return {};
}

Status Load::State::start() {
  accept_times_so_far();
  std::uint64_t to_populate = 0;
  for (const PopulateStep& step : sources_->populate_steps()) to_populate += step.payload;
  counters_.delivered_bytes = mapped_bytes(plan_) - to_populate;
  dispatcher_.emplace(schedule_, static_cast<std::uint32_t>(sources_->populate_steps().size()));
  runner_.emplace(plan_, schedule_, settings_, *sources_, *dispatcher_, counters_,
                  arrivals_ ? &*arrivals_ : nullptr);
  WL_RETURN_IF_ERROR(runner_->open_devices());
  const unsigned workers = wanted_workers();

  threads_.enter();  // so that the load does not end before all threads have started
  Status status = spawn_lane_threads();
  if (!status.ok()) {
    const MutexLock lock(dispatcher_->mutex());
    dispatcher_->stop(status.error());
  } else {
    // The caller may have work before it waits, such as building the model, so one processor is
    // left to it until then. But a caller that waits for single tensors needs all threads now.
    held_back_ = workers > 1 && !arrivals_;
    for (unsigned i = held_back_ ? 1 : 0; i < workers; ++i) {
      if (!threads_.spawn([this] { runner_->run_tasks(); })) break;
      ++workers_;
    }
    runs_inline_ = workers_ == 0;
  }
  if (!runs_inline_) threads_.leave();
  return status;
}

bool Load::State::work_is_left() {
  const MutexLock lock(dispatcher_->mutex());
  return !dispatcher_->stopped() && !dispatcher_->all_given_out();
}

bool Load::State::wait(milliseconds limit) {
  if (runs_inline_.exchange(false)) {
    runner_->run_tasks();
    threads_.leave();
  }
  if (held_back_.exchange(false) && work_is_left()) {
    if (threads_.spawn([this] { runner_->run_tasks(); })) ++workers_;
  }
  return threads_.wait(limit);
}

void Load::State::cancel() noexcept {
  if (threads_.ended()) return;
  const MutexLock lock(dispatcher_->mutex());
  dispatcher_->stop({.code = ErrorCode::kCancelled});
}

Result<bool> Load::State::wait_for(std::span<const std::uint32_t> names, Arrivals::Level level,
                                   milliseconds limit) {
  static_cast<void>(wait(milliseconds(0)));  // a small load runs here
  switch (arrivals_->wait(names, level, limit)) {
    case Arrivals::Answer::kNotYet:
      return false;
    case Arrivals::Answer::kNever: {
      const MutexLock lock(dispatcher_->mutex());
      return dispatcher_->error().value_or(Error{.code = ErrorCode::kCancelled});
    }
    case Arrivals::Answer::kYes:
      break;
  }
  WL_RETURN_IF_ERROR(check_files_of(names));
  return true;
}

Result<bool> Load::State::wait_for(std::span<const std::uint32_t> names, milliseconds limit) {
  return wait_for(names, Arrivals::Level::kArrived, limit);
}

Result<bool> Load::State::wait_for(std::span<const std::uint32_t> names, int device,
                                   CUstream stream, milliseconds limit) {
  WL_ASSIGN_OR_RETURN(const bool queued, wait_for(names, Arrivals::Level::kQueued, limit));
  if (!queued) return false;
  WL_ASSIGN_OR_RETURN(device::Device * used, device::Device::get(device));
  if (!device::Stream::check_not_capturing(*used, stream).ok()) return wait_for(names, limit);
  WL_RETURN_IF_ERROR(runner_->order_behind_copies(device, stream));
  return true;
}

// Before a tensor is handed out, because it may be used long before the load ends. finish() checks
// all files again.
Status Load::State::check_files_of(std::span<const std::uint32_t> names) const {
  std::uint32_t checked = kFromMemory;
  for (const std::uint32_t name : names) {
    const std::uint32_t file = arrivals_->file_of(name);
    if (file == kFromMemory || file == checked) continue;
    checked = file;
    WL_ASSIGN_OR_RETURN(const io::File::Change change, plan_.files[file]->check_unchanged());
    if (change == io::File::Change::kNone) continue;
    WL_ASSIGN_OR_RETURN(const bool same, holds_what_was_copied(plan_, file, settings_.fp8, names));
    if (!same) return written_to(*plan_.files[file]);
  }
  return {};
}

// Only the index of each file has been read so far. If it is unchanged, a new modification time is
// accepted. Only for files whose bytes cannot be compared after the load; the others are compared
// then.
void Load::State::accept_times_so_far() const {
  std::vector<bool> looked_at;
  for (const Copy& copy : plan_.copies) {
    if (copy.file == kFromMemory || can_be_compared(copy)) continue;
    looked_at.resize(plan_.files.size());
    if (looked_at[copy.file]) continue;
    looked_at[copy.file] = true;
    const io::File& file = *plan_.files[copy.file];
    const auto change = file.check_unchanged();
    if (change.ok() && *change == io::File::Change::kTime) file.accept_time();
  }
}

// A new modification time need not mean new bytes, so the copied bytes are compared with the file.
Result<std::vector<std::string>> Load::State::check_files() const {
  std::vector<std::string> touched;
  for (std::size_t i = 0; i < plan_.files.size(); ++i) {
    WL_ASSIGN_OR_RETURN(const io::File::Change change, plan_.files[i]->check_unchanged());
    if (change == io::File::Change::kNone) continue;
    plan_.files[i]->accept_time();
    const bool copied = std::any_of(plan_.copies.begin(), plan_.copies.end(),
                                    [i](const Copy& copy) { return copy.file == i; });
    if (!copied) continue;
    WL_ASSIGN_OR_RETURN(const bool same, holds_what_was_copied(plan_, i, settings_.fp8));
    WL_ASSIGN_OR_RETURN(const io::File::Change later, plan_.files[i]->check_unchanged());
    if (!same || later != io::File::Change::kNone) touched.push_back(plan_.files[i]->path());
  }
  return touched;
}

Result<Report> Load::State::finish() {
  threads_.join();
  const std::chrono::duration<double> seconds = ended_ - started_;
  std::optional<Error> error;
  std::vector<std::string> slot_refusals;
  std::uint64_t staging_bytes = 0;
  {
    const MutexLock lock(dispatcher_->mutex());
    error = dispatcher_->error();
    slot_refusals = dispatcher_->slot_refusals();
    staging_bytes = dispatcher_->slots_added() * settings_.chunk_bytes;
  }
  if (error) return *std::move(error);
  WL_ASSIGN_OR_RETURN(std::vector<std::string> touched, check_files());
  for (const auto& file : plan_.files) file->mark_delivered();

  Report report = report_of(plan_, schedule_, *sources_);
  report.touched = std::move(touched);
  report.read_bytes = counters_.read_bytes.load();
  report.seconds = seconds.count();
  report.threads = workers_;
  report.peak_staging_bytes = staging_bytes;
  if (staging_bytes != 0) report.pinned_bytes = device::StagingPool::instance().pinned_bytes();
  for (std::string& refusal : slot_refusals) report.fallbacks.push_back(std::move(refusal));
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
bool Load::wait(milliseconds limit) {
  return state_->wait(limit);
}
Result<bool> Load::wait_for(std::span<const std::uint32_t> names, milliseconds limit) {
  return state_->wait_for(names, limit);
}
Result<bool> Load::wait_for(std::span<const std::uint32_t> names, int device, CUstream stream,
                            milliseconds limit) {
  return state_->wait_for(names, device, stream, limit);
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
