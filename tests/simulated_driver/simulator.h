// The state of the simulated driver and the scheduler that decides when queued operations run.
// Everything happens inside driver calls, under one lock: with a single-threaded client a seed
// replays exactly.
#pragma once

#include <cuda.h>
#include <sys/types.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "convert/scatter.h"
#include "device_memory.h"
#include "simulated_driver.h"

namespace weightlift::simulated {

// splitmix64: small, seedable with any number, good enough to choose schedules.
class Random {
 public:
  explicit Random(std::uint64_t seed = 0) : state_(seed) {}
  std::uint64_t next();
  std::uint64_t below(std::uint64_t bound) { return bound == 0 ? 0 : next() % bound; }
  bool coin() { return (next() & 1) != 0; }
  template <class Container>
  void shuffle(Container& items) {
    for (std::size_t left = items.size(); left > 1; --left) {
      std::swap(items[left - 1], items[below(left)]);
    }
  }

 private:
  std::uint64_t state_;
};

struct Stream;
struct Operation;
using OperationPointer = std::shared_ptr<Operation>;

enum class Kind : std::uint8_t { kMarker, kCopy, kFill, kKernel, kFree };

// A copy as the client asked for it.
struct Copy {
  std::uint64_t target = 0;
  std::uint64_t source = 0;
  std::size_t bytes = 0;
  CUmemcpySrcAccessOrder order = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
};

// A step of an operation: what one turn of the scheduler may do.
struct Piece {
  std::uint64_t target = 0;
  std::uint64_t source = 0;
  std::size_t bytes = 0;
  std::uint64_t hash = 0;
  bool hashed = false;    // the source is host memory that must not change in flight
  bool of_pages = false;  // which is read through the host's page tables
};

struct Launch {
  std::uint64_t chunk = 0;
  std::uint64_t tiles_offset = 0;
  std::uint32_t tile_count = 0;
  convert::Fp8Rules rules;
};

struct Operation {
  Kind kind = Kind::kMarker;
  Stream* stream = nullptr;
  std::uint64_t order = 0;  // of submission
  StampPointer stamp;
  std::vector<OperationPointer> waits;
  std::vector<Piece> pieces;
  std::vector<std::vector<std::byte>> snapshots;  // sources that were read at submit
  Launch launch;
  std::vector<convert::Tile> tiles;  // with targets in the shadow
  std::size_t next_piece = 0;
  bool prepared = false;
  bool reported = false;  // one report an operation and rule is enough
  bool done = false;
  // Timed runs.
  std::uint64_t to_device = 0;
  std::uint64_t to_host = 0;
  std::uint64_t of_pages = 0;  // to the device from memory that is not pinned
  bool moving = false;
  double left = 0;
};

struct Capture {
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  std::thread::id thread;
  bool broken = false;
  std::string name;  // of the stream that it began on
};

struct Stream {
  std::uint64_t handle = 0;
  int device = 0;
  bool blocking = false;  // synchronises with the default stream
  bool external = false;
  bool destroyed = false;
  Lane lane = 0;
  Clock clock;
  std::uint64_t number = 0;
  std::deque<OperationPointer> queue;
  OperationPointer last;
  std::uint64_t rank = 0;     // who stalls
  std::int64_t priority = 0;  // pct
  std::string name;
  std::shared_ptr<Capture> capture;
};

struct Event {
  int device = 0;
  OperationPointer record;
  bool sleeps = false;               // who waits for it does
  std::shared_ptr<Capture> capture;  // that it was last recorded in
};

struct Pinned {
  std::uint64_t bytes = 0;
  int device = 0;  // whose context registered it
  bool portable = false;
  bool allocated = false;  // cuMemHostAlloc
};

struct Device {
  DeviceMemory memory;
  int retained = 0;
  bool held = false;  // by torch
  CUresult error = CUDA_SUCCESS;
  Stream* default_stream = nullptr;
  std::map<int, int> attributes;
  double link = 0;  // bytes per second, each direction
  SimLink traffic{};
  [[nodiscard]] bool active() const { return held || retained > 0; }
};

struct Fault {
  std::string name;
  std::uint64_t left = 0;
  CUresult code = CUDA_SUCCESS;
  bool sticky = false;
};

// What a driver function needs before it does its work.
struct Need {
  bool initialised = false;
  bool context = false;
  bool releases = false;  // does its work even when an error is injected
  bool countable = true;  // is one of "any function" for faults
};
inline constexpr Need kNothing{};
inline constexpr Need kUncounted{false, false, false, false};
inline constexpr Need kInitialised{true, false, false, true};
// Pushing a live context does not fail by itself, and a client that cannot push cannot release. So
// "any function" excludes it; only its own name makes it fail.
inline constexpr Need kPush{true, false, false, false};
// This only sets a flag of the thread, so "any function" excludes it too.
inline constexpr Need kRelaxing{false, false, false, false};
inline constexpr Need kContext{true, true, false, true};
inline constexpr Need kReleaseInContext{true, true, true, true};
inline constexpr Need kRelease{true, false, true, true};

class Simulator {
 public:
  static Simulator& instance();

  // Runs a driver function's body with all that every function has in common.
  template <class Body>
  CUresult call(const char* name, Need need, Body body) {
    if (in_forked_child()) return CUDA_ERROR_NOT_INITIALIZED;
    Lock lock(mutex_);
    CUresult injected = CUDA_SUCCESS;
    if (const auto refused = enter(name, need, injected)) return *refused;
    if (queueing_cost_ > 0 && queues(name)) spend(queueing_cost_, lock);
    const CUresult result = body(lock);
    turn();
    return injected != CUDA_SUCCESS ? injected : result;
  }
  using Lock = std::unique_lock<std::mutex>;
  [[nodiscard]] Lock lock() { return Lock(mutex_); }

  // Control.
  void reset(int devices, std::uint64_t seed, int policy);
  void set_policy(std::uint64_t seed, int policy);
  std::uint64_t external_alloc(int device, std::uint64_t bytes);
  bool external_free(std::uint64_t address);
  bool external_free_on(int device, std::uint64_t stream, std::uint64_t address);
  void hold_context(int device);
  std::uint64_t external_stream(int device);
  bool destroy_external_stream(std::uint64_t handle);
  void synchronize_device(int device, Lock& lock);
  bool pending_write(int device, std::uint64_t stream, std::uint64_t address, std::uint64_t bytes);
  bool host_access(std::uint64_t address, void* target, const void* source, std::uint64_t bytes);
  bool read_on(int device, std::uint64_t stream, std::uint64_t address, void* target,
               std::uint64_t bytes, Lock& lock);
  bool begin_capture(int device, std::uint64_t stream, int mode);
  bool end_capture(int device, std::uint64_t stream);  // false: it was broken
  void add_fault(Fault fault) { faults_.push_back(std::move(fault)); }
  [[nodiscard]] std::uint64_t faults_left() const { return faults_.size(); }
  void exit() { exited_ = true; }
  void set_time(int mode);
  [[nodiscard]] double now() const;
  void set_host_memory(double rate) { host_rate_ = rate; }
  void set_costs(double queueing, double waking) {
    queueing_cost_ = queueing;
    waking_cost_ = waking;
  }
  bool hold(double seconds);  // whether it was held until now
  void set_hashing(bool on) { hashing_ = on; }
  void allow(bool blocking, bool spinning) {
    allow_blocking_ = blocking;
    allow_spinning_ = spinning;
  }
  void drain();
  void ledger(SimLedger& out) const;
  [[nodiscard]] std::uint64_t calls(const std::string& name) const;
  [[nodiscard]] const std::deque<std::string>& violations() const { return violations_; }
  [[nodiscard]] std::uint64_t violation_count() const { return violation_count_; }
  [[nodiscard]] Device* device(int index);
  void set_version(int version) { version_ = version; }
  void hide_symbol(const std::string& name, int how) { hidden_[name] = how; }
  void report(std::string what) { violation(std::move(what)); }

  // Driver.
  [[nodiscard]] int version() const { return version_; }
  [[nodiscard]] int attribute(int index, int attribute) const;
  // GH200, GB200: memory is read through the host's page tables.
  [[nodiscard]] bool uses_host_page_tables(int index) const;
  [[nodiscard]] int capability(int index) const;  // 90 for 9.0
  [[nodiscard]] std::optional<int> hidden(const std::string& name) const;
  [[nodiscard]] int device_count() const { return device_count_; }
  CUresult init();
  CUresult retain(CUcontext* context, int index);
  CUresult release(int index);
  CUresult push(CUcontext context);
  CUresult pop(CUcontext* context);
  CUresult set_current(CUcontext context);
  [[nodiscard]] std::optional<int> current();  // device of this thread's context
  [[nodiscard]] CUcontext context_handle(int index) const;
  CUresult context_synchronize(Lock& lock);

  CUresult stream_create(CUstream* stream, unsigned int flags);
  CUresult stream_destroy(CUstream stream);
  CUresult stream_synchronize(CUstream stream, Lock& lock);
  CUresult stream_query(CUstream stream);
  CUresult stream_wait(CUstream stream, CUevent event, unsigned int flags);
  CUresult exchange_capture_mode(CUstreamCaptureMode* mode);
  CUresult is_capturing(CUstream stream, CUstreamCaptureStatus* status);
  CUresult event_create(CUevent* event, unsigned int flags);
  CUresult event_destroy(CUevent event);
  CUresult event_record(CUevent event, CUstream stream);
  CUresult event_synchronize(CUevent event, Lock& lock);
  CUresult event_query(CUevent event);

  CUresult mem_alloc(CUdeviceptr* pointer, std::size_t bytes);
  CUresult mem_free(CUdeviceptr pointer);
  CUresult mem_info(std::size_t* free, std::size_t* total);
  CUresult host_register(void* address, std::size_t bytes, unsigned int flags);
  CUresult host_unregister(void* address);
  CUresult host_alloc(void** address, std::size_t bytes, unsigned int flags);
  CUresult host_free(void* address);
  enum class Direction : std::uint8_t { kHostToDevice, kDeviceToHost, kDeviceToDevice, kAny };
  CUresult copy(const char* name, CUstream stream, std::vector<Copy> copies, Direction direction,
                Lock& lock);

  CUresult module_load(CUmodule* module, const void* image);
  CUresult module_unload(CUmodule module);
  CUresult module_function(CUfunction* function, CUmodule module, const char* name);
  CUresult launch(CUfunction function, std::array<unsigned int, 3> grid,
                  std::array<unsigned int, 3> block, CUstream stream, void** parameters);

 private:
  Simulator();

  [[nodiscard]] bool in_forked_child() const;
  std::optional<CUresult> enter(const char* name, Need need, CUresult& injected);
  void lose_context(int index, CUresult code);
  void violation(std::string what);

  // Captures: captures.cc.
  void break_capture(Capture& capture, std::string_view call);
  [[nodiscard]] bool prohibited(std::string_view call);
  [[nodiscard]] bool conflicts(const std::shared_ptr<Capture>& capture, std::string_view call);
  [[nodiscard]] bool context_conflicts(int index, std::string_view call);

  [[nodiscard]] std::uint64_t new_handle(std::uint64_t kind);
  Stream& new_stream(int device, bool blocking, bool external, std::uint64_t handle);
  [[nodiscard]] Stream* find_stream(CUstream stream);
  [[nodiscard]] Stream* find_stream(int device, std::uint64_t handle);
  [[nodiscard]] Stream& default_stream(int device);
  [[nodiscard]] Event* find_event(CUevent event);
  [[nodiscard]] int device_of(std::uint64_t address) const;  // -1: host memory
  [[nodiscard]] const std::pair<const std::uint64_t, Pinned>* pinned_over(
      std::uint64_t address, std::uint64_t bytes) const;
  [[nodiscard]] bool overlaps_pinned(std::uint64_t begin, std::uint64_t end) const;
  void check_unused(const char* what, std::uint64_t begin, std::uint64_t end);
  void cancel(std::uint64_t begin, std::uint64_t end);  // queued copies of host memory that goes
  void reset_context(int index, const char* why);

  OperationPointer submit(Stream& stream, Kind kind, std::string what,
                          std::vector<OperationPointer> waits = {});
  void touch(const OperationPointer& operation, const StampPointer& stamp, std::uint64_t begin,
             std::uint64_t end, bool write);
  void add_pieces(Operation& operation, std::uint64_t target, std::uint64_t source,
                  std::size_t bytes, bool hashed, bool of_pages = false);
  void learn(const Operation& operation) { host_clock_.join(operation.stamp->clock); }
  // Waits on the host's behalf: runs what must run, and the host knows it.
  CUresult complete(const OperationPointer& operation, Lock& lock);
  [[nodiscard]] bool held() const { return std::chrono::steady_clock::now() < held_until_; }

  // The scheduler.
  [[nodiscard]] std::vector<Stream*> ready_streams() const;  // oldest operation first
  void turn();  // what the policy lets run between two steps of the host
  bool run_something();
  void run_all(const Stream* except);
  void run_by_priority();
  void force(const OperationPointer& target);
  void step(const OperationPointer& operation, std::size_t pieces);
  void finish(const OperationPointer& operation);
  void run_piece(Operation& operation, Piece& piece);
  void prepare_kernel(const OperationPointer& operation);
  static bool mapped(std::uint64_t begin, std::uint64_t bytes);
  void rehash(std::uint64_t begin, std::uint64_t end);
  [[nodiscard]] const Stream* stalled() const;
  [[nodiscard]] bool timed() const { return time_mode_ != SIM_TIME_NONE; }

  // Time.
  void start_ready();
  [[nodiscard]] static bool queues(std::string_view call);
  void spend(double seconds, Lock& held);  // of the calling thread's time
  [[nodiscard]] std::vector<double> rates() const;
  void advance(double to);
  [[nodiscard]] double next_finish() const;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::chrono::steady_clock::time_point held_until_;
  std::atomic<pid_t> initialised_in_{0};
  bool initialised_ = false;
  bool exited_ = false;
  int version_ = 13000;
  std::map<std::string, int> hidden_;
  std::uint64_t generation_ = 0;

  std::vector<std::unique_ptr<Device>> devices_;  // kept across resets, for their address ranges
  int device_count_ = 0;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::unordered_map<std::uint64_t, Stream*> stream_handles_;
  std::unordered_map<std::uint64_t, Event> events_;
  std::vector<std::shared_ptr<Capture>> captures_;
  std::unordered_map<std::uint64_t, int> modules_;              // their device
  std::unordered_map<std::uint64_t, std::uint64_t> functions_;  // their module
  std::map<std::uint64_t, Pinned> pinned_;
  std::uint64_t handles_ = 0;
  Lane lanes_ = 1;
  std::uint64_t pushed_ = 0;

  Clock host_clock_;
  std::uint64_t host_number_ = 0;
  AccessMap accesses_;
  bool hashing_ = true;
  bool allow_blocking_ = false;
  bool allow_spinning_ = false;

  int policy_ = SIM_EAGER;
  std::uint64_t seed_ = 0;
  Random random_;
  static constexpr std::uint64_t kHostPace = 16;
  std::uint64_t device_pace_ = 1;  // how far ready operations come while the host makes one call
  std::int64_t host_priority_ = 0;
  std::int64_t low_priority_ = 0;
  std::uint64_t steps_ = 0;
  std::set<std::uint64_t> change_points_;
  unsigned int polls_ = 0;

  int time_mode_ = SIM_TIME_NONE;
  double started_ = 0;
  double time_ = 0;
  double host_rate_ = 0;
  double queueing_cost_ = 0;
  double waking_cost_ = 0;
  std::vector<OperationPointer> moving_;

  std::vector<Fault> faults_;
  std::map<std::string, std::uint64_t, std::less<>> calls_;
  std::uint64_t call_count_ = 0;
  std::uint64_t operations_ = 0;
  std::uint64_t pinned_bytes_ = 0;
  std::uint64_t peak_pinned_bytes_ = 0;
  std::deque<std::string> violations_;  // a deque: pointers to the texts stay
  std::uint64_t violation_count_ = 0;
};

}  // namespace weightlift::simulated
