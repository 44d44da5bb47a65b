// The simulator must find mistakes: a small client that does one thing wrong is reported under some
// seed, and the same client without the mistake is never reported. It uses the library through
// dlopen and cuGetProcAddress, like the product, and does not use csrc/device.
#include "simulated_driver.h"

#include <cuda.h>
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "convert/scatter.h"

namespace {

using weightlift::convert::Fp8Rules;
using weightlift::convert::kScatterKernel;
using weightlift::convert::kScatterThreads;
using weightlift::convert::kTileCopy;
using weightlift::convert::Tile;

void* library() {
  static void* const handle = dlopen(SIMULATED_CUDA, RTLD_NOW | RTLD_LOCAL);
  return handle;
}

template <class Function>
Function symbol(const char* name) {
  return reinterpret_cast<Function>(dlsym(library(), name));
}

// clang-format off
#define CONTROL(X) \
  X(sim_reset) X(sim_set_policy) X(sim_alloc) X(sim_free) X(sim_free_on) X(sim_hold_context) \
  X(sim_stream_create) X(sim_stream_destroy) X(sim_synchronize) X(sim_pending_write) \
  X(sim_read_device) X(sim_write_device) X(sim_read_on) X(sim_set_memory) X(sim_set_attribute) \
  X(sim_set_version) X(sim_hide_symbol) X(sim_fail_call) X(sim_faults_left) X(sim_exit) \
  X(sim_set_time) X(sim_now) X(sim_set_link) X(sim_set_costs) X(sim_hold) X(sim_set_host_memory) X(sim_link) \
  X(sim_set_hashing) X(sim_begin_capture) X(sim_end_capture) X(sim_allow) X(sim_ledger) X(sim_calls) X(sim_drain) X(sim_violations) \
  X(sim_violation_text) X(sim_image)
// clang-format on

// clang-format off
#define DRIVER(X) \
  X(cuInit, 2000) X(cuDriverGetVersion, 2020) X(cuGetErrorName, 6000) X(cuDeviceGetCount, 2000) \
  X(cuDeviceGet, 2000) X(cuDevicePrimaryCtxRetain, 7000) X(cuDevicePrimaryCtxRelease, 11000) \
  X(cuDevicePrimaryCtxGetState, 7000) X(cuCtxPushCurrent, 4000) X(cuCtxPopCurrent, 4000) \
  X(cuCtxSynchronize, 2000) X(cuStreamCreate, 2000) X(cuStreamDestroy, 4000) \
  X(cuStreamSynchronize, 2000) X(cuStreamWaitEvent, 3020) X(cuEventCreate, 2000) \
  X(cuEventDestroy, 4000) X(cuEventRecord, 2000) X(cuEventSynchronize, 2000) \
  X(cuEventQuery, 2000) X(cuMemAlloc, 3020) X(cuMemFree, 3020) X(cuMemcpyHtoDAsync, 3020) \
  X(cuMemcpyDtoHAsync, 3020) X(cuMemcpyDtoDAsync, 3020) X(cuMemcpyBatchAsync, 13000) \
  X(cuMemHostAlloc, 2020) X(cuMemFreeHost, 2000) X(cuMemHostRegister, 6050) \
  X(cuMemHostUnregister, 4000) X(cuModuleLoadData, 2000) X(cuModuleUnload, 2000) \
  X(cuModuleGetFunction, 2000) X(cuLaunchKernel, 4000) X(cuThreadExchangeStreamCaptureMode, 10010) \
  X(cuStreamIsCapturing, 10000)
// clang-format on

template <class Function>
Function driver_function(const char* name, int version) {
  const auto get = symbol<decltype(&::cuGetProcAddress)>("cuGetProcAddress_v2");
  void* function = nullptr;
  CUdriverProcAddressQueryResult status{};
  const CUresult result = get(name, &function, version, CU_GET_PROC_ADDRESS_DEFAULT, &status);
  return result == CUDA_SUCCESS && status == CU_GET_PROC_ADDRESS_SUCCESS
             ? reinterpret_cast<Function>(function)
             : nullptr;
}

struct Sim {
#define FIELD(name) decltype(&::name) name = symbol<decltype(&::name)>(#name);
  CONTROL(FIELD)
#undef FIELD
#define FIELD(name, version) \
  decltype(&::name) name = driver_function<decltype(&::name)>(#name, version);
  DRIVER(FIELD)
#undef FIELD

  [[nodiscard]] SimLedger ledger() const {
    SimLedger now;
    sim_ledger(&now);
    return now;
  }
  [[nodiscard]] std::string violations() const {
    std::string all;
    for (std::uint64_t i = 0; const char* one = sim_violation_text(i); ++i) {
      all += one;
      all += '\n';
    }
    return all;
  }
};

const Sim& sim() {
  static const Sim instance;
  return instance;
}

constexpr const char* kPolicyNames[SIM_POLICIES] = {"eager", "lazy",  "random",
                                                    "split", "stall", "pct"};

// A context of device `index`, retained and current.
class Current {
 public:
  explicit Current(int index = 0) : index_(index) {
    EXPECT_EQ(sim().cuInit(0), CUDA_SUCCESS);
    EXPECT_EQ(sim().cuDevicePrimaryCtxRetain(&context, index), CUDA_SUCCESS);
    EXPECT_EQ(sim().cuCtxPushCurrent(context), CUDA_SUCCESS);
  }
  ~Current() {
    sim().cuCtxPopCurrent(nullptr);
    sim().cuDevicePrimaryCtxRelease(index_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  CUcontext context = nullptr;

 private:
  int index_;
};

// Host pages that outlive every run: a client that forgets to unregister must not disturb the next.
constexpr std::size_t kSlotBytes = 16 * 1024;
constexpr std::size_t kSlots = 2;

std::byte* slots() {
  static void* const memory = mmap(nullptr, kSlots * kSlotBytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return static_cast<std::byte*>(memory);
}

// --- The client ----------------------------------------------------------------------------------

// Works like an engine: memory from torch's allocator, whose previous owner's kernel is still
// queued; a ring of pinned slots; one copy for each chunk, some straight to their targets, some
// through a staging buffer and the kernel; the user's stream waits for the copies.

enum class Mistake : std::uint8_t {
  kNone,
  kNoSlotWait,
  kSlotReusedOneStepEarly,
  kEventRecordedBeforeCopy,
  kEventRecordedOnUserStream,
  kNoWaitForAllocatingStream,
  kNoWaitByUserStream,
  kUserStreamWaitsTooEarly,
  kKernelOnOtherStream,
  kUnregisteredSource,
  kPinnedForOtherDevice,
  kStagingFreedEarly,
  kUnregisteredEarly,
  kTargetFreedEarly,
  kTargetFreedInWrongStream,
  kTargetOfOtherDevice,
  kCopyPastEnd,
  kTilePastEnd,
  kTileToOtherDevice,
  kKernelWithTooFewBlocks,
  kBatchIgnoresStreamOrder,
  kHostReadsWithoutWaiting,
  kLostLastChunk,
  kIgnoredError,
  kLeakedStream,
  kLeakedEvent,
  kLeakedStaging,
  kLeakedRegistration,
  kLeakedContext,
  kLeakedModule,
  kContextLeftCurrent,
};

class Client {
 public:
  explicit Client(Mistake mistake) : mistake_(mistake) {}

  // Empty when nothing is wrong; else what the general oracles found.
  std::string run() {
    const Sim& d = sim();
    prepare();
    CUcontext context = nullptr;
    const CUdevice device = kDevice;
    check(d.cuInit(0));
    check(d.cuDevicePrimaryCtxRetain(&context, device));
    check(d.cuCtxPushCurrent(context));
    load();
    if (!is(Mistake::kContextLeftCurrent)) check(d.cuCtxPopCurrent(nullptr));
    if (!is(Mistake::kLeakedContext)) check(d.cuDevicePrimaryCtxRelease(device));
    return verdict();
  }

 private:
  static constexpr int kDevice = 1;
  static constexpr std::size_t kChunk = 9000;
  static constexpr std::size_t kChunks = 7;
  static constexpr std::size_t kTable = 9216;  // of the tiles, behind the data
  static constexpr std::size_t kHalf = 4100;

  [[nodiscard]] bool is(Mistake mistake) const { return mistake_ == mistake; }
  void check(CUresult result) {
    if (result != CUDA_SUCCESS && error_ == CUDA_SUCCESS) error_ = result;
  }

  void prepare() {
    const Sim& d = sim();
    for (std::size_t i = 0; i < kChunk * kChunks; ++i) {
      bytes_.push_back(static_cast<std::byte>(i * 7 + i / 251 + 1));
    }
    user_ = d.sim_stream_create(kDevice);
    target_ = d.sim_alloc(kDevice, bytes_.size());
    other_ = d.sim_alloc(0, bytes_.size());
    d.sim_pending_write(kDevice, user_, target_, bytes_.size());
  }

  void load() {
    const Sim& d = sim();
    auto* user = reinterpret_cast<CUstream>(user_);
    CUstream copies = nullptr;
    CUstream kernels = nullptr;
    CUevent ready = nullptr;
    CUevent done = nullptr;
    std::vector<CUevent> free_again(kSlots);
    check(d.cuStreamCreate(&copies, CU_STREAM_NON_BLOCKING));
    check(d.cuStreamCreate(&kernels, CU_STREAM_NON_BLOCKING));
    check(d.cuEventCreate(&ready, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC));
    check(d.cuEventCreate(&done, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC));
    for (CUevent& event : free_again)
      check(d.cuEventCreate(&event, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC));
    CUmodule module = nullptr;
    CUfunction scatter = nullptr;
    check(d.cuModuleLoadData(&module, d.sim_image()));
    check(d.cuModuleGetFunction(&scatter, module, kScatterKernel));
    CUdeviceptr staging = 0;
    check(d.cuMemAlloc(&staging, kSlots * kSlotBytes));
    pin();

    if (!is(Mistake::kNoWaitForAllocatingStream)) {
      check(d.cuEventRecord(ready, user));
      check(d.cuStreamWaitEvent(copies, ready, CU_EVENT_WAIT_DEFAULT));
    }
    if (is(Mistake::kUserStreamWaitsTooEarly)) {
      check(d.cuEventRecord(done, copies));
      check(d.cuStreamWaitEvent(user, done, CU_EVENT_WAIT_DEFAULT));
    }
    const std::size_t chunks = is(Mistake::kLostLastChunk) ? kChunks - 1 : kChunks;
    for (std::size_t i = 0; i < chunks; ++i) {
      const std::size_t slot = i % kSlots;
      const std::size_t fresh = is(Mistake::kSlotReusedOneStepEarly) ? kSlots + 1 : kSlots;
      if (i >= fresh && !is(Mistake::kNoSlotWait)) check(d.cuEventSynchronize(free_again[slot]));
      std::byte* host = slots() + slot * kSlotBytes;
      std::memcpy(host, bytes_.data() + i * kChunk, kChunk);
      if (is(Mistake::kEventRecordedBeforeCopy)) check(d.cuEventRecord(free_again[slot], copies));
      if (i % 3 == 0) {
        straight(copies, host, i, chunks);
      } else {
        by_kernel(copies, kernels, scatter, host, staging + slot * kSlotBytes, i, chunks);
      }
      if (!is(Mistake::kEventRecordedBeforeCopy)) {
        check(d.cuEventRecord(free_again[slot],
                              is(Mistake::kEventRecordedOnUserStream) ? user : copies));
      }
    }
    if (is(Mistake::kHostReadsWithoutWaiting)) {
      read_.resize(bytes_.size());
      d.sim_read_device(target_, read_.data(), read_.size());
    }
    if (is(Mistake::kTargetFreedEarly)) d.sim_free(target_);
    if (is(Mistake::kTargetFreedInWrongStream)) d.sim_free_on(kDevice, 0, target_);
    if (!is(Mistake::kNoWaitByUserStream) && !is(Mistake::kUserStreamWaitsTooEarly)) {
      check(d.cuEventRecord(done, copies));
      check(d.cuStreamWaitEvent(user, done, CU_EVENT_WAIT_DEFAULT));
    }
    // Reading back waits for all that it depends on, so early reads are those before it.
    if (is(Mistake::kStagingFreedEarly)) check(d.cuMemFree(staging));
    if (is(Mistake::kUnregisteredEarly)) check(d.cuMemHostUnregister(slots()));
    read_back();

    check(d.cuStreamSynchronize(copies));
    check(d.cuStreamSynchronize(kernels));
    if (!is(Mistake::kStagingFreedEarly) && !is(Mistake::kLeakedStaging)) {
      check(d.cuMemFree(staging));
    }
    if (pinned_ && !is(Mistake::kUnregisteredEarly) && !is(Mistake::kLeakedRegistration)) {
      check(d.cuMemHostUnregister(slots()));
    }
    if (!is(Mistake::kLeakedModule)) check(d.cuModuleUnload(module));
    check(d.cuEventDestroy(ready));
    check(d.cuEventDestroy(done));
    check(d.cuEventDestroy(free_again[0]));
    if (!is(Mistake::kLeakedEvent)) check(d.cuEventDestroy(free_again[1]));
    check(d.cuStreamDestroy(kernels));
    if (!is(Mistake::kLeakedStream)) check(d.cuStreamDestroy(copies));
  }

  void pin() {
    const Sim& d = sim();
    if (is(Mistake::kUnregisteredSource)) return;
    if (is(Mistake::kPinnedForOtherDevice)) {
      CUcontext context = nullptr;
      check(d.cuDevicePrimaryCtxRetain(&context, 0));
      check(d.cuCtxPushCurrent(context));
      check(d.cuMemHostRegister(slots(), kSlots * kSlotBytes, 0));
      check(d.cuCtxPopCurrent(nullptr));
      check(d.cuDevicePrimaryCtxRelease(0));
    } else {
      check(d.cuMemHostRegister(slots(), kSlots * kSlotBytes, CU_MEMHOSTREGISTER_PORTABLE));
    }
    pinned_ = true;
  }

  void straight(CUstream copies, const std::byte* host, std::size_t i, std::size_t chunks) {
    const Sim& d = sim();
    CUdeviceptr to = target_ + i * kChunk;
    std::size_t bytes = kChunk;
    if (is(Mistake::kTargetOfOtherDevice)) to = other_ + i * kChunk;
    if (is(Mistake::kCopyPastEnd) && i + 1 == chunks) bytes += 1;
    if (is(Mistake::kIgnoredError) && i == 3) {
      d.sim_fail_call("cuMemcpyHtoDAsync", 1, CUDA_ERROR_OUT_OF_MEMORY, 0);
      d.cuMemcpyHtoDAsync(to, host, bytes, copies);
      return;
    }
    // A refused call is already reported; the client goes on, to show that the refusal does no
    // harm.
    d.cuMemcpyHtoDAsync(to, host, bytes, copies);
  }

  void by_kernel(CUstream copies, CUstream kernels, CUfunction scatter, std::byte* host,
                 CUdeviceptr staging, std::size_t i, std::size_t chunks) {
    const Sim& d = sim();
    const std::uint64_t to = target_ + i * kChunk;
    Tile tiles[2] = {{0, to, kHalf, kTileCopy}, {kHalf, to + kHalf, kChunk - kHalf, kTileCopy}};
    if (is(Mistake::kTilePastEnd) && i + 2 == chunks) tiles[1].target += 9000 * 2;
    if (is(Mistake::kTileToOtherDevice)) tiles[0].target = other_;
    std::memcpy(host + kTable, tiles, sizeof tiles);
    check(d.cuMemcpyHtoDAsync(staging, host, kTable + sizeof tiles, copies));
    if (is(Mistake::kBatchIgnoresStreamOrder)) {
      CUdeviceptr targets[1] = {to};
      CUdeviceptr sources[1] = {staging};
      std::size_t sizes[1] = {kChunk};
      std::size_t starts[1] = {0};
      CUmemcpyAttributes attributes{};
      attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_ANY;
      check(d.cuMemcpyBatchAsync(targets, sources, sizes, 1, &attributes, starts, 1, copies));
      return;
    }
    std::uint64_t chunk = staging;
    std::uint64_t offset = kTable;
    std::uint32_t count = 2;
    Fp8Rules rules;
    void* parameters[] = {&chunk, &offset, &count, &rules};
    check(d.cuLaunchKernel(
        scatter, is(Mistake::kKernelWithTooFewBlocks) ? 1 : 2, 1, 1, kScatterThreads, 1, 1, 0,
        is(Mistake::kKernelOnOtherStream) ? kernels : copies, parameters, nullptr));
  }

  // As tensor.cpu() on the user's stream. Without the right waits it runs before the copies.
  void read_back() {
    if (is(Mistake::kTargetFreedEarly) || is(Mistake::kTargetFreedInWrongStream)) return;
    read_.resize(bytes_.size());
    sim().sim_read_on(kDevice, user_, target_, read_.data(), read_.size());
  }

  std::string verdict() {
    const Sim& d = sim();
    d.sim_drain();
    std::string found = d.violations();
    const SimLedger left = d.ledger();
    if (left.streams + left.events + left.allocations + left.pinned_ranges + left.contexts +
            left.pushed + left.modules !=
        0) {
      found += "leak: the ledger is not empty\n";
    }
    if (read_.size() == bytes_.size() && read_ != bytes_) found += "bytes: differ\n";
    if (error_ != CUDA_SUCCESS) found += "error: " + std::to_string(error_) + "\n";
    return found;
  }

  Mistake mistake_;
  bool pinned_ = false;
  CUresult error_ = CUDA_SUCCESS;
  std::vector<std::byte> bytes_;
  std::vector<std::byte> read_;
  std::uint64_t user_ = 0;
  std::uint64_t target_ = 0;
  std::uint64_t other_ = 0;
};

constexpr std::uint64_t kSeeds = 1000;

std::string run_client(Mistake mistake, std::uint64_t seed, int policy) {
  sim().sim_reset(2, seed, policy);
  return Client(mistake).run();
}

class Policy : public testing::TestWithParam<int> {};

TEST_P(Policy, TheRightClientIsNeverAccused) {
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    ASSERT_EQ(run_client(Mistake::kNone, seed, GetParam()), "") << "seed " << seed;
  }
}

TEST_P(Policy, ASeedReplaysExactly) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const std::string first = run_client(Mistake::kNoSlotWait, seed, GetParam());
    // Addresses move on from run to run; what is found does not.
    const std::string second = run_client(Mistake::kNoSlotWait, seed, GetParam());
    EXPECT_EQ(first.size(), second.size()) << "seed " << seed;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Policy, testing::Range(0, static_cast<int>(SIM_POLICIES)),
                         [](const auto& each) { return std::string(kPolicyNames[each.param]); });

struct Case {
  Mistake mistake;
  const char* name;
  const char* report;  // how a report that must appear begins
};

class Bites : public testing::TestWithParam<Case> {};

// The figures show how soon each policy finds the mistake; they are not limits.
TEST_P(Bites, AClientThatIsWrongIsFound) {
  std::string wanted("\n");
  wanted += GetParam().report;
  std::string summary;
  std::uint64_t total = 0;
  for (int policy = 0; policy < SIM_POLICIES; ++policy) {
    constexpr std::uint64_t kSample = 100;
    std::uint64_t found = 0;
    for (std::uint64_t seed = 0; seed < kSample; ++seed) {
      std::string reports = run_client(GetParam().mistake, seed, policy);
      reports.insert(reports.begin(), '\n');
      if (reports.find(wanted) != std::string::npos) ++found;
    }
    total += found;
    summary += std::string(kPolicyNames[policy]) + " " + std::to_string(found) + "/" +
               std::to_string(kSample) + " ";
  }
  RecordProperty("found", summary);
  EXPECT_GT(total, 0u) << summary;
}

INSTANTIATE_TEST_SUITE_P(
    All, Bites,
    testing::Values(
        Case{Mistake::kNoSlotWait, "NoSlotWait", "host write in flight"},
        Case{Mistake::kSlotReusedOneStepEarly, "SlotReusedOneStepEarly", "host write in flight"},
        Case{Mistake::kEventRecordedBeforeCopy, "EventRecordedBeforeCopy", "host write in flight"},
        Case{Mistake::kEventRecordedOnUserStream, "EventOnWrongStream", "host write in flight"},
        Case{Mistake::kNoWaitForAllocatingStream, "PendingWriteRace", "race"},
        Case{Mistake::kNoWaitForAllocatingStream, "PendingWriteLosesBytes", "bytes"},
        Case{Mistake::kNoWaitByUserStream, "NoWaitByUserStream", "race"},
        Case{Mistake::kNoWaitByUserStream, "NoWaitByUserStreamBytes", "bytes"},
        Case{Mistake::kUserStreamWaitsTooEarly, "UserStreamWaitsTooEarly", "race"},
        Case{Mistake::kKernelOnOtherStream, "KernelOnOtherStream", "race"},
        Case{Mistake::kKernelOnOtherStream, "KernelOnOtherStreamBytes", "bytes"},
        Case{Mistake::kUnregisteredSource, "UnregisteredSource", "unregistered"},
        Case{Mistake::kPinnedForOtherDevice, "PinnedForOtherDevice", "unregistered"},
        Case{Mistake::kStagingFreedEarly, "StagingFreedEarly", "freed in use"},
        Case{Mistake::kUnregisteredEarly, "UnregisteredEarly", "unpinned in use"},
        Case{Mistake::kTargetFreedEarly, "TargetFreedEarly", "freed in use"},
        Case{Mistake::kTargetFreedEarly, "UseAfterFree", "use after free"},
        Case{Mistake::kTargetFreedInWrongStream, "TargetFreedInWrongStream", "race"},
        Case{Mistake::kTargetOfOtherDevice, "TargetOfOtherDevice", "wrong device"},
        Case{Mistake::kCopyPastEnd, "CopyPastEnd", "out of bounds"},
        Case{Mistake::kTilePastEnd, "TilePastEnd", "out of bounds"},
        Case{Mistake::kTileToOtherDevice, "TileToOtherDevice", "wrong device"},
        Case{Mistake::kKernelWithTooFewBlocks, "TooFewBlocks", "launch"},
        Case{Mistake::kBatchIgnoresStreamOrder, "BatchIgnoresStreamOrder", "race"},
        Case{Mistake::kBatchIgnoresStreamOrder, "BatchIgnoresStreamOrderBytes", "bytes"},
        Case{Mistake::kHostReadsWithoutWaiting, "HostReadsWithoutWaiting", "race"},
        Case{Mistake::kLostLastChunk, "LostLastChunk", "bytes"},
        Case{Mistake::kIgnoredError, "IgnoredError", "bytes"},
        Case{Mistake::kLeakedStream, "LeakedStream", "leak"},
        Case{Mistake::kLeakedEvent, "LeakedEvent", "leak"},
        Case{Mistake::kLeakedStaging, "LeakedStaging", "leak"},
        Case{Mistake::kLeakedRegistration, "LeakedRegistration", "leak"},
        Case{Mistake::kLeakedContext, "LeakedContext", "leak"},
        Case{Mistake::kLeakedModule, "LeakedModule", "leak"},
        Case{Mistake::kContextLeftCurrent, "ContextLeftCurrent", "leak"}),
    [](const auto& each) { return std::string(each.param.name); });

// --- Rule by rule --------------------------------------------------------------------------------

TEST(Symbols, AreFoundByNameAndVersion) {
  const Sim& d = sim();
  d.sim_reset(1, 0, SIM_EAGER);
#define PRESENT(name, version) EXPECT_NE(d.name, nullptr) << #name;
  DRIVER(PRESENT)
#undef PRESENT
  const auto get = symbol<decltype(&::cuGetProcAddress)>("cuGetProcAddress_v2");
  void* function = &function;
  CUdriverProcAddressQueryResult status{};
  EXPECT_EQ(get("cuNoSuchThing", &function, 13000, 0, &status), CUDA_ERROR_NOT_FOUND);
  EXPECT_EQ(function, nullptr);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
  EXPECT_EQ(get("cuMemcpyBatchAsync", &function, 12070, 0, &status), CUDA_ERROR_NOT_FOUND);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
  EXPECT_EQ(d.violations(), "");
  // The form of CUDA 2.0 takes other arguments than those of cuda.h.
  EXPECT_EQ(get("cuMemAlloc", &function, 2000, 0, &status), CUDA_ERROR_NOT_FOUND);
  EXPECT_EQ(d.violations(),
            "symbol: cuMemAlloc is asked for in its form of 2000, which is not cuda.h's\n");
  EXPECT_EQ(get("cuInit", &function, 13010, 0, nullptr), CUDA_ERROR_INVALID_VALUE);

  d.sim_hide_symbol("cuMemcpyBatchAsync", SIM_HIDE_NOT_FOUND);
  EXPECT_EQ(get("cuMemcpyBatchAsync", &function, 13000, 0, &status), CUDA_ERROR_NOT_FOUND);
  d.sim_hide_symbol("cuMemcpyBatchAsync", SIM_HIDE_NULL);
  EXPECT_EQ(get("cuMemcpyBatchAsync", &function, 13000, 0, &status), CUDA_SUCCESS);
  EXPECT_EQ(function, nullptr);

  d.sim_reset(1, 0, SIM_EAGER);
  d.sim_set_version(12090);
  EXPECT_EQ(get("cuMemcpyBatchAsync", &function, 12080, 0, &status), CUDA_SUCCESS);
  EXPECT_EQ(d.violations(), "");
  EXPECT_EQ(get("cuMemcpyBatchAsync", &function, 13000, 0, &status), CUDA_SUCCESS);
  EXPECT_EQ(d.violations(),
            "symbol: cuMemcpyBatchAsync is asked for in its form of 13000, and this driver has "
            "that of 12080\n");
  d.sim_set_version(12020);
  EXPECT_EQ(get("cuMemcpyBatchAsync", &function, 13000, 0, &status), CUDA_ERROR_NOT_FOUND);
  EXPECT_EQ(get("cuMemAlloc", &function, 3020, 0, &status), CUDA_SUCCESS);
  int version = 0;
  EXPECT_EQ(d.cuDriverGetVersion(&version), CUDA_SUCCESS);
  EXPECT_EQ(version, 12020);
}

TEST(Contexts, AreNeededAndChecked) {
  const Sim& d = sim();
  d.sim_reset(2, 0, SIM_LAZY);
  CUdeviceptr pointer = 0;
  int count = 0;
  EXPECT_EQ(d.cuDeviceGetCount(&count), CUDA_ERROR_NOT_INITIALIZED);
  EXPECT_EQ(d.cuInit(0), CUDA_SUCCESS);
  EXPECT_EQ(d.cuDeviceGetCount(&count), CUDA_SUCCESS);
  EXPECT_EQ(count, 2);
  EXPECT_EQ(d.cuMemAlloc(&pointer, 1), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(d.cuDevicePrimaryCtxRelease(0), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(d.cuCtxPopCurrent(nullptr), CUDA_ERROR_INVALID_CONTEXT);
  {
    const Current current(0);
    EXPECT_EQ(d.cuMemAlloc(&pointer, 1), CUDA_SUCCESS);
    // A new thread has no current context.
    CUresult elsewhere = CUDA_SUCCESS;
    std::thread([&] { elsewhere = d.cuCtxSynchronize(); }).join();
    EXPECT_EQ(elsewhere, CUDA_ERROR_INVALID_CONTEXT);
    EXPECT_EQ(d.cuMemFree(pointer), CUDA_SUCCESS);
    EXPECT_EQ(d.cuMemFree(pointer), CUDA_ERROR_INVALID_VALUE);
    unsigned int flags = 0;
    int active = 0;
    EXPECT_EQ(d.cuDevicePrimaryCtxGetState(0, &flags, &active), CUDA_SUCCESS);
    EXPECT_EQ(active, 1);
    EXPECT_EQ(d.cuDevicePrimaryCtxGetState(1, &flags, &active), CUDA_SUCCESS);
    EXPECT_EQ(active, 0);
  }
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
  {
    const Current current(0);
    EXPECT_EQ(d.cuMemAlloc(&pointer, 1), CUDA_SUCCESS);
  }
  EXPECT_NE(d.violations().find("context: device 0 is reset"), std::string::npos);
}

TEST(Contexts, StreamsAndEventsOfAnotherOne) {
  const Sim& d = sim();
  d.sim_reset(2, 0, SIM_LAZY);
  const Current first(0);
  CUstream stream = nullptr;
  EXPECT_EQ(d.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  CUmodule module = nullptr;
  CUfunction scatter = nullptr;
  EXPECT_EQ(d.cuModuleLoadData(&module, "nothing"), CUDA_ERROR_INVALID_IMAGE);
  EXPECT_EQ(d.cuModuleLoadData(&module, "//\n.version 9.9\n.target sm_75\n"),
            CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
  EXPECT_EQ(d.cuModuleLoadData(&module, "//\n.version 8.0\n.target sm_120\n"),
            CUDA_ERROR_NO_BINARY_FOR_GPU);
  EXPECT_EQ(d.cuModuleLoadData(&module, d.sim_image()), CUDA_SUCCESS);
  EXPECT_EQ(d.cuModuleGetFunction(&scatter, module, "no_such"), CUDA_ERROR_NOT_FOUND);
  EXPECT_EQ(d.cuModuleGetFunction(&scatter, module, kScatterKernel), CUDA_SUCCESS);
  {
    const Current second(1);
    CUevent event = nullptr;
    EXPECT_EQ(d.cuEventCreate(&event, CU_EVENT_BLOCKING_SYNC), CUDA_SUCCESS);
    EXPECT_EQ(d.cuEventRecord(event, stream), CUDA_ERROR_INVALID_HANDLE);
    EXPECT_EQ(d.cuEventRecord(event, nullptr), CUDA_SUCCESS);
    EXPECT_EQ(d.cuStreamWaitEvent(stream, event, 0), CUDA_SUCCESS);
    EXPECT_EQ(d.cuStreamSynchronize(stream), CUDA_SUCCESS);
    std::uint64_t chunk = 0;
    std::uint64_t offset = 0;
    std::uint32_t tiles = 1;
    Fp8Rules rules;
    void* parameters[] = {&chunk, &offset, &tiles, &rules};
    EXPECT_EQ(
        d.cuLaunchKernel(scatter, 1, 1, 1, kScatterThreads, 1, 1, 0, stream, parameters, nullptr),
        CUDA_ERROR_INVALID_HANDLE);
    EXPECT_EQ(d.cuEventDestroy(event), CUDA_SUCCESS);
    EXPECT_EQ(d.cuEventDestroy(event), CUDA_ERROR_INVALID_HANDLE);
  }
  EXPECT_EQ(d.cuModuleUnload(module), CUDA_SUCCESS);
  EXPECT_EQ(d.cuStreamDestroy(stream), CUDA_SUCCESS);
  EXPECT_EQ(d.cuStreamSynchronize(stream), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
}

TEST(Memory, AHostAccessFaults) {
  sim().sim_reset(1, 0, SIM_EAGER);
  const std::uint64_t address = sim().sim_alloc(0, 100);
  ASSERT_NE(address, 0u);
  EXPECT_EXIT(
      {
        std::signal(SIGSEGV, SIG_DFL);
        *reinterpret_cast<volatile char*>(address) = 1;
      },
      testing::KilledBySignal(SIGSEGV), "");
  EXPECT_EQ(sim().sim_free(address), 1);
}

TEST(Memory, IsLimitedAlignedPoisonedAndCounted) {
  const Sim& d = sim();
  d.sim_reset(2, 0, SIM_EAGER);
  d.sim_set_memory(0, 10000);
  const std::uint64_t first = d.sim_alloc(0, 6000);
  ASSERT_NE(first, 0u);
  EXPECT_EQ(first % 512, 0u);
  EXPECT_EQ(d.sim_alloc(0, 6000), 0u);
  {
    const Current current(0);
    CUdeviceptr pointer = 0;
    EXPECT_EQ(d.cuMemAlloc(&pointer, 4001), CUDA_ERROR_OUT_OF_MEMORY);
    EXPECT_EQ(d.cuMemAlloc(&pointer, 4000), CUDA_SUCCESS);
    EXPECT_EQ(d.ledger().allocated_bytes, 4000u);
    EXPECT_EQ(d.ledger().peak_device_bytes[0], 10000u);
    EXPECT_EQ(d.ledger().peak_client_bytes[0], 4000u);
    EXPECT_EQ(d.cuMemFree(first), CUDA_ERROR_INVALID_VALUE);  // torch's, not the client's
    EXPECT_EQ(d.cuMemFree(pointer), CUDA_SUCCESS);
  }
  unsigned char byte = 0;
  EXPECT_EQ(d.sim_read_device(first + 5999, &byte, 1), 1);
  EXPECT_EQ(byte, 0xCD);
  EXPECT_EQ(d.sim_violations(), 1u) << d.violations();
  EXPECT_EQ(d.sim_read_device(first + 5999, &byte, 2), 0);
  EXPECT_EQ(d.sim_free(first), 1);
  EXPECT_EQ(d.sim_free(first), 0);
  EXPECT_EQ(d.ledger().external_bytes, 0u);
  EXPECT_NE(d.sim_alloc(0, 6000), first) << "freed addresses must not come back at once";
}

TEST(Pinned, IsRegisteredOnceAndByItsBase) {
  const Sim& d = sim();
  d.sim_reset(1, 0, SIM_LAZY);
  const Current current(0);
  std::byte* host = slots();
  EXPECT_EQ(d.cuMemHostRegister(nullptr, 1, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(d.cuMemHostRegister(host, 0, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(d.cuMemHostRegister(host, 5000, CU_MEMHOSTREGISTER_PORTABLE), CUDA_SUCCESS);
  EXPECT_EQ(d.cuMemHostRegister(host, 1, 0), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  EXPECT_EQ(d.cuMemHostRegister(host + 6000, 1, 0), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  EXPECT_EQ(d.cuMemHostRegister(host + 8192, 1, 0), CUDA_SUCCESS);
  EXPECT_EQ(d.cuMemHostUnregister(host + 1), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
  EXPECT_EQ(d.cuMemFreeHost(host), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(d.ledger().pinned_bytes, 5001u);
  EXPECT_EQ(d.cuMemHostUnregister(host), CUDA_SUCCESS);
  EXPECT_EQ(d.cuMemHostUnregister(host + 8192), CUDA_SUCCESS);
  void* own = nullptr;
  EXPECT_EQ(d.cuMemHostAlloc(&own, 100, CU_MEMHOSTALLOC_PORTABLE), CUDA_SUCCESS);
  EXPECT_EQ(d.cuMemHostUnregister(own), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
  EXPECT_EQ(d.cuMemFreeHost(own), CUDA_SUCCESS);
  EXPECT_EQ(d.ledger().pinned_bytes, 0u);
  EXPECT_EQ(d.ledger().peak_pinned_bytes, 5001u);
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
}

// Two streams, a device buffer of two ints and a pinned page.
class Streams : public testing::Test {
 protected:
  void start(int policy, std::uint64_t seed = 0, unsigned int flags = CU_STREAM_NON_BLOCKING) {
    d.sim_reset(1, seed, policy);
    if (flags == CU_STREAM_DEFAULT) d.sim_allow(1, 0);
    current.emplace(0);
    EXPECT_EQ(d.cuStreamCreate(&one, flags), CUDA_SUCCESS);
    EXPECT_EQ(d.cuStreamCreate(&two, flags), CUDA_SUCCESS);
    EXPECT_EQ(d.cuEventCreate(&event, CU_EVENT_BLOCKING_SYNC), CUDA_SUCCESS);
    EXPECT_EQ(d.cuMemAlloc(&buffer, 8), CUDA_SUCCESS);
    void* memory = nullptr;
    EXPECT_EQ(d.cuMemHostAlloc(&memory, 4096, CU_MEMHOSTALLOC_PORTABLE), CUDA_SUCCESS);
    host = static_cast<int*>(memory);
  }
  void stop() {
    EXPECT_EQ(d.cuCtxSynchronize(), CUDA_SUCCESS);
    EXPECT_EQ(d.cuMemFreeHost(host), CUDA_SUCCESS);
    EXPECT_EQ(d.cuMemFree(buffer), CUDA_SUCCESS);
    EXPECT_EQ(d.cuEventDestroy(event), CUDA_SUCCESS);
    EXPECT_EQ(d.cuStreamDestroy(one), CUDA_SUCCESS);
    EXPECT_EQ(d.cuStreamDestroy(two), CUDA_SUCCESS);
    current.reset();
  }
  int read(std::uint64_t address) {
    int value = 0;
    d.sim_read_device(address, &value, sizeof value);
    return value;
  }

  const Sim& d = sim();
  std::optional<Current> current;
  CUstream one = nullptr;
  CUstream two = nullptr;
  CUevent event = nullptr;
  CUdeviceptr buffer = 0;
  int* host = nullptr;
};

TEST_F(Streams, AnUnrecordedEventIsNoWait) {
  start(SIM_LAZY);
  EXPECT_EQ(d.cuStreamWaitEvent(one, event, 0), CUDA_SUCCESS);
  EXPECT_EQ(d.cuEventSynchronize(event), CUDA_SUCCESS);
  EXPECT_EQ(d.cuEventQuery(event), CUDA_SUCCESS);
  EXPECT_EQ(d.ledger().pending, 0u);
  stop();
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
}

TEST_F(Streams, AWaitKeepsTheRecordOfItsTime) {
  start(SIM_LAZY);
  host[0] = 1;
  host[1] = 2;
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_SUCCESS);
  EXPECT_EQ(d.cuEventRecord(event, one), CUDA_SUCCESS);
  EXPECT_EQ(d.cuStreamWaitEvent(two, event, 0), CUDA_SUCCESS);
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer + 4, host + 1, 4, one), CUDA_SUCCESS);
  EXPECT_EQ(d.cuEventRecord(event, one), CUDA_SUCCESS);
  EXPECT_EQ(d.cuStreamSynchronize(two), CUDA_SUCCESS);
  EXPECT_EQ(read(buffer), 1);
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
  EXPECT_NE(read(buffer + 4), 2) << "lazy: nobody has asked for the second copy";
  EXPECT_EQ(d.sim_violations(), 1u) << "and the host may not look yet";
  stop();
}

TEST_F(Streams, TheDefaultStreamSynchronisesWithBlockingOnesOnly) {
  for (const bool blocking : {true, false}) {
    start(SIM_LAZY, 0, blocking ? CU_STREAM_DEFAULT : CU_STREAM_NON_BLOCKING);
    host[0] = 1;
    host[1] = 2;
    EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_SUCCESS);
    EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host + 1, 4, nullptr), CUDA_SUCCESS);
    EXPECT_EQ(d.cuStreamSynchronize(nullptr), CUDA_SUCCESS);
    EXPECT_EQ(d.sim_violations() != 0, !blocking) << d.violations();
    if (blocking) {
      EXPECT_EQ(read(buffer), 2);
    }
    stop();
  }
}

TEST_F(Streams, UnorderedWritesAreFoundInEverySchedule) {
  for (int policy = 0; policy < SIM_POLICIES; ++policy) {
    start(policy);
    EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 8, one), CUDA_SUCCESS);
    EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer + 7, host, 1, two), CUDA_SUCCESS);
    EXPECT_EQ(d.sim_violations(), 1u) << kPolicyNames[policy];
    stop();
  }
}

TEST_F(Streams, BothOrdersOfIndependentCopiesHappen) {
  bool first = false;
  bool second = false;
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    start(SIM_RANDOM, seed);
    host[0] = 1;
    host[1] = 2;
    EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_SUCCESS);
    EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host + 1, 4, two), CUDA_SUCCESS);
    EXPECT_EQ(d.cuCtxSynchronize(), CUDA_SUCCESS);
    (read(buffer) == 1 ? first : second) = true;
    stop();
  }
  EXPECT_TRUE(first && second);
}

TEST_F(Streams, CopiesThroughTheHostAndBackKeepTheirHashes) {
  for (int policy = 0; policy < SIM_POLICIES; ++policy) {
    for (std::uint64_t seed = 0; seed < 100; ++seed) {
      start(policy, seed);
      host[0] = 5;
      host[1] = 6;
      EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_SUCCESS);
      EXPECT_EQ(d.cuMemcpyDtoHAsync(host + 1, buffer, 4, one), CUDA_SUCCESS);
      EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer + 4, host + 1, 4, one), CUDA_SUCCESS);
      EXPECT_EQ(d.cuStreamSynchronize(one), CUDA_SUCCESS);
      EXPECT_EQ(host[1], 5);
      EXPECT_EQ(read(buffer + 4), 5);
      stop();
      ASSERT_EQ(d.sim_violations(), 0u) << d.violations();
    }
  }
}

TEST_F(Streams, ABatchHasItsRules) {
  start(SIM_LAZY);
  CUdeviceptr targets[2] = {buffer, buffer + 4};
  CUdeviceptr sources[2] = {reinterpret_cast<CUdeviceptr>(host),
                            reinterpret_cast<CUdeviceptr>(host + 1)};
  std::size_t sizes[2] = {4, 4};
  std::size_t starts[1] = {0};
  CUmemcpyAttributes attributes{};
  const auto batch = [&](CUstream stream) {
    return d.cuMemcpyBatchAsync(targets, sources, sizes, 2, &attributes, starts, 1, stream);
  };
  EXPECT_EQ(batch(one), CUDA_ERROR_INVALID_VALUE) << "no access order";
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  EXPECT_EQ(batch(nullptr), CUDA_ERROR_INVALID_VALUE) << "the legacy stream";
  host[0] = 7;
  host[1] = 8;
  EXPECT_EQ(batch(one), CUDA_SUCCESS);
  EXPECT_EQ(d.cuStreamSynchronize(one), CUDA_SUCCESS);
  EXPECT_EQ(read(buffer), 7);
  EXPECT_EQ(read(buffer + 4), 8);
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
  targets[1] = buffer + 3;
  EXPECT_EQ(batch(one), CUDA_SUCCESS);
  EXPECT_EQ(d.sim_violations(), 1u) << "two copies of a batch overlap";
  stop();
}

TEST_F(Streams, QueriesMoveTheDeviceInTheEnd) {
  start(SIM_LAZY);
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 8, one), CUDA_SUCCESS);
  EXPECT_EQ(d.cuEventRecord(event, one), CUDA_SUCCESS);
  EXPECT_EQ(d.cuEventQuery(event), CUDA_ERROR_NOT_READY);
  int polls = 0;
  while (d.cuEventQuery(event) == CUDA_ERROR_NOT_READY) ++polls;
  EXPECT_LT(polls, 100);
  stop();
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
}

TEST_F(Streams, DestroyedOnesFinishTheirWork) {
  start(SIM_LAZY);
  host[0] = 9;
  CUstream third = nullptr;
  EXPECT_EQ(d.cuStreamCreate(&third, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, third), CUDA_SUCCESS);
  EXPECT_EQ(d.cuEventRecord(event, third), CUDA_SUCCESS);
  EXPECT_EQ(d.cuStreamDestroy(third), CUDA_SUCCESS);
  EXPECT_EQ(d.cuEventSynchronize(event), CUDA_SUCCESS);
  EXPECT_EQ(read(buffer), 9);
  stop();
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
}

TEST_F(Streams, PageableMemoryIsReportedAndStaged) {
  start(SIM_LAZY);
  int pageable[2] = {3, 4};
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, pageable, 8, one), CUDA_SUCCESS);
  EXPECT_EQ(d.sim_violations(), 1u);
  pageable[0] = 0;
  EXPECT_EQ(d.cuStreamSynchronize(one), CUDA_SUCCESS);
  EXPECT_EQ(read(buffer), 3);
  EXPECT_EQ(d.sim_violations(), 1u) << d.violations();
  stop();
}

TEST_F(Streams, MemoryFreedInStreamOrder) {
  for (int policy = 0; policy < SIM_POLICIES; ++policy) {
    start(policy);
    const std::uint64_t address = d.sim_alloc(0, 4);
    const std::uint64_t user = d.sim_stream_create(0);
    EXPECT_EQ(d.cuMemcpyHtoDAsync(address, host, 4, one), CUDA_SUCCESS);
    EXPECT_EQ(d.cuEventRecord(event, one), CUDA_SUCCESS);
    EXPECT_EQ(d.cuStreamWaitEvent(reinterpret_cast<CUstream>(user), event, 0), CUDA_SUCCESS);
    EXPECT_EQ(d.sim_free_on(0, user, address), 1);
    d.sim_drain();
    EXPECT_EQ(d.ledger().external_bytes, 0u);
    EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
    EXPECT_EQ(d.sim_stream_destroy(user), 1);
    stop();
  }
}

TEST_F(Streams, ManyThreadsAtOnce) {
  for (int policy = 0; policy < SIM_POLICIES; ++policy) {
    start(policy, 1);
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&, i] {
        EXPECT_EQ(d.cuCtxPushCurrent(current->context), CUDA_SUCCESS);
        CUstream stream = nullptr;
        CUevent done = nullptr;
        CUdeviceptr mine = 0;
        EXPECT_EQ(d.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
        EXPECT_EQ(d.cuEventCreate(&done, CU_EVENT_BLOCKING_SYNC), CUDA_SUCCESS);
        EXPECT_EQ(d.cuMemAlloc(&mine, 4), CUDA_SUCCESS);
        for (int round = 0; round < 100; ++round) {
          host[i] = round;
          EXPECT_EQ(d.cuMemcpyHtoDAsync(mine, host + i, 4, stream), CUDA_SUCCESS);
          EXPECT_EQ(d.cuEventRecord(done, stream), CUDA_SUCCESS);
          EXPECT_EQ(d.cuEventSynchronize(done), CUDA_SUCCESS);
        }
        EXPECT_EQ(read(mine), 99);
        EXPECT_EQ(d.cuMemFree(mine), CUDA_SUCCESS);
        EXPECT_EQ(d.cuEventDestroy(done), CUDA_SUCCESS);
        EXPECT_EQ(d.cuStreamDestroy(stream), CUDA_SUCCESS);
        EXPECT_EQ(d.cuCtxPopCurrent(nullptr), CUDA_SUCCESS);
      });
    }
    for (std::thread& thread : threads) thread.join();
    stop();
    EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
  }
}

// --- Faults --------------------------------------------------------------------------------------

TEST_F(Streams, TheNthCallFails) {
  start(SIM_LAZY);
  d.sim_fail_call("cuMemcpyHtoDAsync", 2, CUDA_ERROR_LAUNCH_FAILED, 0);
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_SUCCESS);
  EXPECT_EQ(d.sim_faults_left(), 1u);
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_ERROR_LAUNCH_FAILED);
  EXPECT_EQ(d.sim_faults_left(), 0u);
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_SUCCESS);
  EXPECT_EQ(d.sim_calls("cuMemcpyHtoDAsync"), 3u);
  d.sim_fail_call(nullptr, 1, CUDA_ERROR_UNKNOWN, 0);
  EXPECT_EQ(d.cuStreamSynchronize(one), CUDA_ERROR_UNKNOWN);
  // A release that reports an error has released.
  CUevent other = nullptr;
  EXPECT_EQ(d.cuEventCreate(&other, CU_EVENT_BLOCKING_SYNC), CUDA_SUCCESS);
  d.sim_fail_call("cuEventDestroy", 1, CUDA_ERROR_UNKNOWN, 0);
  EXPECT_EQ(d.cuEventDestroy(other), CUDA_ERROR_UNKNOWN);
  EXPECT_EQ(d.ledger().events, 1u);
  stop();
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
}

TEST_F(Streams, ALostContextStaysLost) {
  for (const char* how : {"cuMemcpyHtoDAsync", "(operation)"}) {
    start(SIM_LAZY);
    d.sim_fail_call(how, 1, CUDA_ERROR_ILLEGAL_ADDRESS, 1);
    d.cuMemcpyHtoDAsync(buffer, host, 4, one);
    EXPECT_EQ(d.cuStreamSynchronize(one), CUDA_ERROR_ILLEGAL_ADDRESS);
    EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_ERROR_ILLEGAL_ADDRESS);
    EXPECT_EQ(d.cuEventSynchronize(event), CUDA_ERROR_ILLEGAL_ADDRESS);
    EXPECT_EQ(d.cuMemFreeHost(host), CUDA_ERROR_ILLEGAL_ADDRESS);
    EXPECT_EQ(d.cuMemFree(buffer), CUDA_ERROR_ILLEGAL_ADDRESS);
    EXPECT_EQ(d.cuEventDestroy(event), CUDA_ERROR_ILLEGAL_ADDRESS);
    EXPECT_EQ(d.cuStreamDestroy(one), CUDA_ERROR_ILLEGAL_ADDRESS);
    EXPECT_EQ(d.cuStreamDestroy(two), CUDA_ERROR_ILLEGAL_ADDRESS);
    const SimLedger left = d.ledger();
    EXPECT_EQ(left.streams + left.events + left.allocations + left.pinned_ranges, 0u);
    EXPECT_EQ(left.pending, 0u);
    EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
    current.reset();
  }
}

TEST(Faults, NoDeviceAndSixteen) {
  const Sim& d = sim();
  d.sim_reset(0, 0, SIM_EAGER);
  EXPECT_EQ(d.cuInit(0), CUDA_ERROR_NO_DEVICE);
  d.sim_reset(SIM_MAX_DEVICES, 0, SIM_EAGER);
  EXPECT_EQ(d.cuInit(0), CUDA_SUCCESS);
  CUdevice device = 0;
  EXPECT_EQ(d.cuDeviceGet(&device, SIM_MAX_DEVICES - 1), CUDA_SUCCESS);
  EXPECT_EQ(d.cuDeviceGet(&device, SIM_MAX_DEVICES), CUDA_ERROR_INVALID_DEVICE);
}

TEST(Faults, AfterTheDriverIsGone) {
  const Sim& d = sim();
  d.sim_reset(1, 0, SIM_EAGER);
  CUcontext context = nullptr;
  EXPECT_EQ(d.cuInit(0), CUDA_SUCCESS);
  EXPECT_EQ(d.cuDevicePrimaryCtxRetain(&context, 0), CUDA_SUCCESS);
  d.sim_exit();
  EXPECT_EQ(d.cuDevicePrimaryCtxRelease(0), CUDA_ERROR_DEINITIALIZED);
  EXPECT_EQ(d.cuInit(0), CUDA_ERROR_DEINITIALIZED);
}

TEST(Faults, AForkedChildIsRefused) {
  const Sim& d = sim();
  d.sim_reset(1, 0, SIM_EAGER);
  EXPECT_EQ(d.cuInit(0), CUDA_SUCCESS);
  const pid_t child = fork();
  if (child == 0) _exit(sim().cuInit(0));
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), CUDA_ERROR_NOT_INITIALIZED);
  EXPECT_EQ(d.cuInit(0), CUDA_SUCCESS);
}

// --- Time ----------------------------------------------------------------------------------------

// Copies `bytes` to each of `devices`, all submitted before any is waited for, or one after
// another.
double seconds_for(int devices, std::size_t bytes, bool together) {
  const Sim& d = sim();
  void* host = nullptr;
  std::vector<std::uint64_t> targets;
  std::vector<std::uint64_t> streams;
  for (int i = 0; i < devices; ++i) {
    targets.push_back(d.sim_alloc(i, bytes));
    streams.push_back(d.sim_stream_create(i));
  }
  const Current current(0);
  EXPECT_EQ(d.cuMemHostAlloc(&host, bytes, CU_MEMHOSTALLOC_PORTABLE), CUDA_SUCCESS);
  const double start = d.sim_now();
  for (std::size_t i = 0; i < targets.size(); ++i) {
    auto* stream = reinterpret_cast<CUstream>(streams[i]);
    EXPECT_EQ(d.cuMemcpyHtoDAsync(targets[i], host, bytes, stream), CUDA_SUCCESS);
    if (!together) {
      EXPECT_EQ(d.cuStreamSynchronize(stream), CUDA_SUCCESS);
    }
  }
  for (const std::uint64_t stream : streams) {
    EXPECT_EQ(d.cuStreamSynchronize(reinterpret_cast<CUstream>(stream)), CUDA_SUCCESS);
  }
  const double seconds = d.sim_now() - start;
  EXPECT_EQ(d.cuMemFreeHost(host), CUDA_SUCCESS);
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
  return seconds;
}

// --- Captures ----------------------------------------------------------------------------------

class Captures : public ::testing::Test {
 protected:
  static CUresult exchange(CUstreamCaptureMode mode) {
    return sim().cuThreadExchangeStreamCaptureMode(&mode);
  }
  static CUresult allocate() {
    CUdeviceptr pointer = 0;
    const CUresult result = sim().cuMemAlloc(&pointer, 64);
    if (result == CUDA_SUCCESS) sim().cuMemFree(pointer);
    return result;
  }
  void SetUp() override {
    sim().sim_reset(1, 0, SIM_EAGER);
    user = sim().sim_stream_create(0);
  }
  std::uint64_t user = 0;
};

TEST_F(Captures, AreBrokenByUnsafeCallsAsTheThreadsModeSays) {
  const Current here;
  const struct {
    int capture;
    CUstreamCaptureMode thread;
    bool own;  // by the thread that captures
    bool breaks;
  } kCases[] = {
      {SIM_CAPTURE_GLOBAL, CU_STREAM_CAPTURE_MODE_GLOBAL, true, true},
      {SIM_CAPTURE_GLOBAL, CU_STREAM_CAPTURE_MODE_GLOBAL, false, true},
      {SIM_CAPTURE_GLOBAL, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, false, false},
      {SIM_CAPTURE_GLOBAL, CU_STREAM_CAPTURE_MODE_RELAXED, true, false},
      {SIM_CAPTURE_GLOBAL, CU_STREAM_CAPTURE_MODE_RELAXED, false, false},
      {SIM_CAPTURE_THREAD_LOCAL, CU_STREAM_CAPTURE_MODE_GLOBAL, true, true},
      {SIM_CAPTURE_THREAD_LOCAL, CU_STREAM_CAPTURE_MODE_GLOBAL, false, false},
      {SIM_CAPTURE_RELAXED, CU_STREAM_CAPTURE_MODE_GLOBAL, true, false},
  };
  for (const auto& each : kCases) {
    SCOPED_TRACE(std::to_string(each.capture) + std::to_string(each.thread) +
                 std::to_string(static_cast<int>(each.own)));
    const std::uint64_t before = sim().sim_violations();
    ASSERT_EQ(sim().sim_begin_capture(0, user, each.capture), 1);
    const auto call = [&] {
      exchange(each.thread);
      EXPECT_EQ(allocate(), each.breaks ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS);
      exchange(CU_STREAM_CAPTURE_MODE_GLOBAL);
    };
    if (each.own) {
      call();
    } else {
      std::thread([&] {
        exchange(CU_STREAM_CAPTURE_MODE_RELAXED);
        const Current there;
        call();
        exchange(CU_STREAM_CAPTURE_MODE_RELAXED);
      }).join();
    }
    EXPECT_EQ(sim().sim_end_capture(0, user), each.breaks ? 0 : 1);
    EXPECT_EQ(sim().sim_violations() - before, each.breaks ? 1U : 0U) << sim().violations();
  }
}

TEST_F(Captures, AWaitForACapturedEventJoinsAndNothingRuns) {
  const Current here;
  exchange(CU_STREAM_CAPTURE_MODE_RELAXED);
  CUstream own = nullptr;
  CUevent event = nullptr;
  ASSERT_EQ(sim().cuStreamCreate(&own, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  ASSERT_EQ(sim().cuEventCreate(&event, CU_EVENT_BLOCKING_SYNC), CUDA_SUCCESS);
  const std::uint64_t target = sim().sim_alloc(0, 64);
  ASSERT_EQ(sim().sim_begin_capture(0, user, SIM_CAPTURE_GLOBAL), 1);
  CUstreamCaptureStatus status{};
  EXPECT_EQ(sim().cuStreamIsCapturing(own, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_STREAM_CAPTURE_STATUS_NONE);
  EXPECT_EQ(sim().cuEventRecord(event, reinterpret_cast<CUstream>(user)), CUDA_SUCCESS);
  EXPECT_EQ(sim().cuStreamWaitEvent(own, event, 0), CUDA_SUCCESS);
  EXPECT_EQ(sim().cuStreamIsCapturing(own, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_STREAM_CAPTURE_STATUS_ACTIVE);
  const std::uint64_t operations = sim().ledger().operations;
  EXPECT_EQ(sim().cuMemcpyDtoDAsync(target, target + 32, 32, own), CUDA_SUCCESS);
  EXPECT_EQ(sim().ledger().operations, operations);
  EXPECT_EQ(sim().violations().find("capture: cuMemcpyDtoDAsync"), 0U) << sim().violations();
  // Conflicts occur in every mode.
  EXPECT_EQ(sim().cuEventSynchronize(event), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(sim().sim_end_capture(0, user), 0);
  EXPECT_EQ(sim().cuStreamIsCapturing(own, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_STREAM_CAPTURE_STATUS_NONE);
  exchange(CU_STREAM_CAPTURE_MODE_GLOBAL);
  sim().cuEventDestroy(event);
  sim().cuStreamDestroy(own);
  sim().sim_free(target);
}

TEST_F(Captures, AreBrokenByASynchronisedContextInAnyMode) {
  const Current here;
  exchange(CU_STREAM_CAPTURE_MODE_RELAXED);
  ASSERT_EQ(sim().sim_begin_capture(0, user, SIM_CAPTURE_RELAXED), 1);
  EXPECT_EQ(sim().cuCtxSynchronize(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(sim().sim_end_capture(0, user), 0);
  exchange(CU_STREAM_CAPTURE_MODE_GLOBAL);
}

TEST_F(Captures, SpinningAndBlockingAreReported) {
  const Current here;
  CUstream stream = nullptr;
  CUevent event = nullptr;
  ASSERT_EQ(sim().cuStreamCreate(&stream, CU_STREAM_DEFAULT), CUDA_SUCCESS);
  ASSERT_EQ(sim().cuEventCreate(&event, CU_EVENT_DISABLE_TIMING), CUDA_SUCCESS);
  EXPECT_EQ(sim().cuEventSynchronize(event), CUDA_SUCCESS);
  EXPECT_EQ(sim().violations().find("blocking: "), 0U);
  EXPECT_NE(sim().violations().find("\nspin: "), std::string::npos);
  sim().cuEventDestroy(event);
  sim().cuStreamDestroy(stream);
}

TEST(Time, LinksRunInParallelUpToTheHostsMemory) {
  const Sim& d = sim();
  constexpr int kDevices = 8;
  constexpr std::size_t kBytes = 1000 * 1000;
  const auto run = [&](double host, bool together) {
    d.sim_reset(kDevices, 0, SIM_EAGER);
    d.sim_set_time(SIM_TIME_VIRTUAL);
    for (int i = 0; i < kDevices; ++i) d.sim_set_link(i, 1e6);
    d.sim_set_host_memory(host);
    return seconds_for(kDevices, kBytes, together);
  };
  EXPECT_NEAR(run(0, true), 1.0, 1e-6);
  EXPECT_NEAR(run(0, false), 8.0, 1e-6);
  EXPECT_NEAR(run(4e6, true), 2.0, 1e-6);
  SimLink link;
  d.sim_link(7, &link);
  EXPECT_EQ(link.bytes_to_device, kBytes);
  EXPECT_NEAR(link.last_finish - link.first_start, 2.0, 1e-6);
}

TEST(Time, UnequalLinksShareWhatTheHostHas) {
  const Sim& d = sim();
  d.sim_reset(2, 0, SIM_EAGER);
  d.sim_set_time(SIM_TIME_VIRTUAL);
  d.sim_set_link(0, 1e6);
  d.sim_set_link(1, 4e6);
  d.sim_set_host_memory(3e6);
  // 1 and 2 MB/s until the second is done after 0.5 s; then 1 MB/s for the rest.
  EXPECT_NEAR(seconds_for(2, 1000 * 1000, true), 1.0, 1e-6);
}

TEST(Time, IsRealWhenAsked) {
  const Sim& d = sim();
  d.sim_reset(8, 0, SIM_EAGER);
  d.sim_set_time(SIM_TIME_REAL);
  for (int i = 0; i < 8; ++i) d.sim_set_link(i, 5e6);
  const auto start = std::chrono::steady_clock::now();
  seconds_for(8, 1000 * 1000, true);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  EXPECT_GE(taken.count(), 0.1999);
  EXPECT_LT(taken.count(), 1.2) << "eight links of 0.2 s each, one after another, take 1.6 s";
}

// Two seconds on the link, and the host's costs: queueing two copies during the link's work, and
// waking up after it.
TEST_F(Streams, CallsAndBeingWokenCostWhatIsSaid) {
  start(SIM_LAZY);
  d.sim_set_time(SIM_TIME_VIRTUAL);
  d.sim_set_link(0, 4);
  d.sim_set_costs(0.25, 0.5);
  host[0] = 4;
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_SUCCESS);
  EXPECT_NEAR(d.sim_now(), 0.25, 1e-6);
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer + 4, host, 4, one), CUDA_SUCCESS);
  EXPECT_NEAR(d.sim_now(), 0.5, 1e-6);
  EXPECT_EQ(d.cuStreamSynchronize(one), CUDA_SUCCESS);
  EXPECT_NEAR(d.sim_now(), 0.25 + 2 + 0.5, 1e-6);
  EXPECT_EQ(d.cuStreamSynchronize(one), CUDA_SUCCESS);
  EXPECT_NEAR(d.sim_now(), 0.25 + 2 + 0.5, 1e-6) << "nobody slept";
  stop();
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
}

// What is queued while completions are held is queued beside copies in flight, in every schedule.
TEST_F(Streams, NobodyLearnsOfAnEndWhileItIsHeld) {
  for (int policy = 0; policy < SIM_POLICIES; ++policy) {
    SCOPED_TRACE(kPolicyNames[policy]);
    start(policy);
    EXPECT_EQ(d.sim_hold(60), 0);
    EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_SUCCESS);
    EXPECT_EQ(d.cuEventRecord(event, one), CUDA_SUCCESS);
    std::thread waits([&] {
      const Current there(0);
      EXPECT_EQ(d.cuEventSynchronize(event), CUDA_SUCCESS);
    });
    EXPECT_EQ(d.cuEventQuery(event), CUDA_ERROR_NOT_READY);
    EXPECT_EQ(d.cuMemcpyDtoDAsync(buffer + 4, buffer, 4, two), CUDA_SUCCESS);
    EXPECT_EQ(d.sim_violations(), 1u) << d.violations();
    EXPECT_EQ(d.violations().find("race: "), 0u) << d.violations();
    EXPECT_EQ(d.sim_hold(0), 1);
    waits.join();
    stop();
  }
}

TEST_F(Streams, IsHeldNoLongerThanIsSaid) {
  start(SIM_LAZY);
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_SUCCESS);
  EXPECT_EQ(d.sim_hold(0.01), 0);
  EXPECT_EQ(d.cuStreamSynchronize(one), CUDA_SUCCESS);
  EXPECT_EQ(d.sim_hold(0), 0);
  stop();
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
}

TEST_F(Streams, DrainingATimedRunFinishesWhatIsMoving) {
  start(SIM_LAZY);
  d.sim_set_time(SIM_TIME_VIRTUAL);
  d.sim_set_link(0, 1);
  host[0] = 4;
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_SUCCESS);
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer + 4, host, 4, two), CUDA_SUCCESS);
  d.sim_drain();
  EXPECT_EQ(d.ledger().pending, 0u);
  EXPECT_EQ(d.cuMemcpyHtoDAsync(buffer, host, 4, one), CUDA_SUCCESS);
  EXPECT_EQ(d.cuStreamSynchronize(one), CUDA_SUCCESS);
  EXPECT_EQ(d.cuStreamSynchronize(two), CUDA_SUCCESS);
  EXPECT_NEAR(d.sim_now(), 4.0, 1e-6);
  EXPECT_EQ(read(buffer), 4);
  EXPECT_EQ(read(buffer + 4), 4);
  stop();
  EXPECT_EQ(d.sim_violations(), 0u) << d.violations();
}

}  // namespace
