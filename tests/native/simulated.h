// The simulated CUDA driver for native tests: its controls, and a machine with it for csrc/device.
#pragma once

#include <dirent.h>
#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "../simulated_driver/simulated_driver.h"
#include "device/driver.h"
#include "device/staging.h"

namespace weightlift::simulation {

inline constexpr const char* kLibrary = SIMULATED_CUDA_PATH;
inline constexpr const char* kPolicyNames[SIM_POLICIES] = {"eager", "lazy",  "random",
                                                           "split", "stall", "pct"};

template <class Function>
Function control(const char* name) {
  static void* const library = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  void* const found = library != nullptr ? ::dlsym(library, name) : nullptr;
  if (found == nullptr) {
    std::fprintf(stderr, "the simulated driver %s lacks %s\n", kLibrary, name);
    std::abort();
  }
  return reinterpret_cast<Function>(found);
}

// clang-format off
#define WL_SIMULATOR_CONTROLS(X) \
  X(sim_reset) X(sim_alloc) X(sim_free) X(sim_free_on) X(sim_stream_create) X(sim_stream_destroy) \
  X(sim_synchronize) X(sim_pending_write) X(sim_read_device) X(sim_read_on) X(sim_set_memory) \
  X(sim_set_version) X(sim_set_attribute) X(sim_hide_symbol) X(sim_fail_call) X(sim_faults_left) X(sim_exit) \
  X(sim_set_time) X(sim_now) X(sim_set_link) X(sim_set_costs) X(sim_hold) X(sim_set_host_memory) X(sim_link) \
  X(sim_set_hashing) X(sim_begin_capture) X(sim_end_capture) X(sim_allow) X(sim_ledger) X(sim_calls) X(sim_drain) X(sim_violations) \
  X(sim_violation_text)
// clang-format on

struct Simulator {
#define WL_SIMULATOR_FIELD(name) decltype(&::name) name = control<decltype(&::name)>(#name);
  WL_SIMULATOR_CONTROLS(WL_SIMULATOR_FIELD)
#undef WL_SIMULATOR_FIELD

  [[nodiscard]] SimLedger ledger() const {
    SimLedger now;
    sim_ledger(&now);
    return now;
  }
  [[nodiscard]] std::string violations() const {
    std::string all;
    for (std::uint64_t i = 0; i < 20; ++i) {
      const char* const text = sim_violation_text(i);
      if (text == nullptr) break;
      all += text;
      all += '\n';
    }
    return all;
  }
};

inline const Simulator& sim() {
  static const Simulator instance;
  return instance;
}

// A simulated machine, from its start until the process has released the driver.
class Machine {
 public:
  explicit Machine(int devices, std::uint64_t seed = 0, int policy = SIM_RANDOM) {
    sim().sim_reset(devices, seed, policy);
    device::use_driver_for_testing(kLibrary);
    lost_before_ = device::StagingPool::instance().pinned_bytes();
  }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  ~Machine() { close(); }

  // Releases the driver. The ledger then shows what the process leaves behind.
  void close() {
    if (open_) device::use_driver_for_testing("");
    open_ = false;
  }

  // Memory of earlier machines that stays pinned because a device was lost: the pool always counts
  // it.
  [[nodiscard]] std::size_t lost_before() const { return lost_before_; }

 private:
  bool open_ = true;
  std::size_t lost_before_ = 0;
};

// The client's leftovers, without what the simulator's torch side made. Empty if there are none.
inline std::string leaks(const SimLedger& now) {
  std::string found;
  const auto note = [&found](const char* what, std::uint64_t count) {
    if (count != 0) found += " leaked " + std::to_string(count) + " " + what;
  };
  note("streams", now.streams);
  note("events", now.events);
  note("allocations", now.allocations);
  note("pinned ranges", now.pinned_ranges);
  note("contexts", now.contexts);
  note("pushed contexts", now.pushed);
  note("modules", now.modules);
  return found;
}

inline std::size_t entries(const char* folder) {
  std::size_t count = 0;
  if (DIR* const open = ::opendir(folder)) {
    while (::readdir(open) != nullptr) ++count;
    ::closedir(open);
  }
  return count;
}
inline std::size_t open_files() {
  return entries("/proc/self/fd");
}
// A joined thread may be listed a moment longer, so this repeats until at most `expected` or for
// 0.5 s.
inline std::size_t threads(std::size_t expected) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
  std::size_t now = entries("/proc/self/task");
  while (now > expected && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    now = entries("/proc/self/task");
  }
  return now;
}
inline std::size_t threads() {
  // A sanitizer starts its own thread together with the first one.
  static const bool first = (std::thread([] {}).join(), true);
  static_cast<void>(first);
  return entries("/proc/self/task");
}

}  // namespace weightlift::simulation
