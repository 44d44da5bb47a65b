// csrc/device with the simulated driver: finding devices, refusals, pinning, keeping and releasing
// memory.
#include <cuda.h>
#include <gtest/gtest.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <list>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "convert/scatter.h"
#include "device/context.h"
#include "device/driver.h"
#include "device/pinned.h"
#include "device/staging.h"
#include "simulated.h"

namespace weightlift {
namespace {

using device::CurrentContext;
using device::Device;
using device::Event;
using device::PinnedMemory;
using device::StagingPool;
using device::Stream;
using simulation::kLibrary;
using simulation::Machine;
using simulation::sim;

constexpr std::size_t kSlot = 256 * 1024;
constexpr int kUnknownError = 999;

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Ends a run and checks what is left.
void expect_clean(Machine& machine) {
  machine.close();
  EXPECT_EQ(simulation::leaks(sim().ledger()), "");
  EXPECT_EQ(sim().sim_violations(), 0U) << sim().violations();
}

Device* first_device() {
  auto found = Device::get(0);
  EXPECT_TRUE(found.ok()) << (found.ok() ? "" : found.error().message);
  return found.ok() ? *found : nullptr;
}

// --- The driver --------------------------------------------------------------------------------

TEST(Driver, AMissingLibraryIsNamed) {
  device::use_driver_for_testing("/nowhere/libcuda.so.1");
  const auto table = device::driver();
  ASSERT_FALSE(table.ok());
  EXPECT_EQ(table.error().code, ErrorCode::kNoDriver);
  EXPECT_TRUE(contains(table.error().message, "/nowhere/libcuda.so.1"));
  EXPECT_EQ(Device::get(0).error().code, ErrorCode::kNoDriver);
  device::use_driver_for_testing("");
}

TEST(Driver, AnOldDriverIsRefusedAndItsVersionNamed) {
  Machine machine(1);
  sim().sim_set_version(11080);
  const auto table = device::load_driver(kLibrary);
  ASSERT_FALSE(table.ok());
  EXPECT_EQ(table.error().code, ErrorCode::kDriverTooOld);
  EXPECT_EQ(Device::count().error().code, ErrorCode::kDriverTooOld);
  expect_clean(machine);
}

TEST(Driver, AMissingRequiredSymbolIsNamed) {
#define WL_NAME(name, version) #name,
  constexpr std::array kRequired = {WL_DRIVER_REQUIRED(WL_NAME)};
#undef WL_NAME
  for (const char* const name : kRequired) {
    for (const int how : {SIM_HIDE_NOT_FOUND, SIM_HIDE_NULL}) {
      sim().sim_reset(1, 0, SIM_RANDOM);
      sim().sim_hide_symbol(name, how);
      const auto table = device::load_driver(kLibrary);
      ASSERT_FALSE(table.ok()) << name;
      EXPECT_EQ(table.error().code, ErrorCode::kDriverTooOld) << name;
      EXPECT_TRUE(contains(table.error().message, name)) << table.error().message;
    }
  }
}

// Checks that the types are those of cuda.h. If an older form has the same type, the simulated
// driver, which follows cudaTypedefs.h, reports a request for it.
#define WL_SAME(name, version) \
  static_assert(std::is_same_v<decltype(&::name), PFN_##name##_v##version>);
WL_DRIVER_REQUIRED(WL_SAME)
WL_SAME(cuMemcpyBatchAsync, 13000)
#undef WL_SAME

TEST(Driver, OptionalSymbolsMayBeMissing) {
  for (const int how : {SIM_HIDE_NOT_FOUND, SIM_HIDE_NULL}) {
    sim().sim_reset(1, 0, SIM_RANDOM);
    sim().sim_hide_symbol("cuMemcpyBatchAsync", how);
    const auto table = device::load_driver(kLibrary);
    ASSERT_TRUE(table.ok()) << table.error().message;
    EXPECT_EQ((*table)->batch_form(), nullptr);
  }
  sim().sim_reset(1, 0, SIM_RANDOM);
  const auto table = device::load_driver(kLibrary);
  ASSERT_TRUE(table.ok()) << table.error().message;
  EXPECT_GE((*table)->version, 12000);
  EXPECT_EQ((*table)->library, kLibrary);
}

TEST(Driver, GivesTheFormOfBatchCopiesThatItsVersionHas) {
  const std::pair<int, std::string_view> kForms[] = {
      {12000, ""}, {12070, ""}, {12080, "12.8"}, {12090, "12.8"}, {13000, "13.0"}, {13010, "13.0"}};
  for (const auto& [version, form] : kForms) {
    sim().sim_reset(1, 0, SIM_RANDOM);
    sim().sim_set_version(version);
    const auto table = device::load_driver(kLibrary);
    ASSERT_TRUE(table.ok()) << table.error().message;
    const char* const has = (*table)->batch_form();
    EXPECT_EQ(has != nullptr ? std::string_view(has) : "", form) << version;
    EXPECT_EQ(sim().violations(), "") << version;
  }
}

TEST(Driver, LoadingStartsNothing) {
  Machine machine(1);
  ASSERT_TRUE(device::driver().ok());
  EXPECT_EQ(sim().sim_calls("cuInit"), 0U);
  EXPECT_EQ(sim().ledger().contexts, 0U);
  expect_clean(machine);
}

TEST(Driver, ErrorsNameTheCallAndTheReason) {
  Machine machine(1);
  const auto table = device::driver();
  ASSERT_TRUE(table.ok());
  EXPECT_TRUE(device::check(**table, CUDA_SUCCESS, "cuInit").ok());
  const Status full = device::check(**table, CUDA_ERROR_OUT_OF_MEMORY, "cuMemAlloc");
  ASSERT_FALSE(full.ok());
  EXPECT_EQ(full.error().code, ErrorCode::kOutOfMemory);
  EXPECT_TRUE(contains(full.error().message, "cuMemAlloc")) << full.error().message;
  const Status gone = device::check(**table, CUDA_ERROR_DEINITIALIZED, "cuEventRecord");
  EXPECT_EQ(gone.error().code, ErrorCode::kDriverCallFailed);
  EXPECT_TRUE(contains(gone.error().message, "CUDA_ERROR_DEINITIALIZED")) << gone.error().message;
  const Status odd = device::check(**table, CUDA_ERROR_UNKNOWN, "cuEventRecord");
  EXPECT_TRUE(contains(odd.error().message, "cuEventRecord failed")) << odd.error().message;
}

// --- Devices -----------------------------------------------------------------------------------

TEST(Devices, AreCountedAndKept) {
  Machine machine(3);
  const auto count = Device::count();
  ASSERT_TRUE(count.ok());
  EXPECT_EQ(*count, 3);
  for (int i = 0; i < 3; ++i) {
    const auto device = Device::get(i);
    ASSERT_TRUE(device.ok());
    EXPECT_EQ((*device)->ordinal(), i);
    EXPECT_EQ(*device, *Device::get(i));
  }
  EXPECT_EQ(sim().ledger().contexts, 3U);
  expect_clean(machine);
}

TEST(Devices, OrdinalsOutsideAreRefusedWithTheirNumber) {
  for (const int devices : {0, 2}) {
    Machine machine(devices);
    for (const int ordinal : {-1, 2, 100}) {
      const auto device = Device::get(ordinal);
      ASSERT_FALSE(device.ok());
      if (devices == 0) continue;  // cuInit may say so already
      EXPECT_EQ(device.error().code, ErrorCode::kNoSuchDevice);
      EXPECT_TRUE(contains(device.error().message, "cuda:" + std::to_string(ordinal)));
      EXPECT_TRUE(contains(device.error().message, "sees 2"));
    }
    expect_clean(machine);
  }
}

TEST(Devices, OnlyThoseInUseAreWaitedFor) {
  Machine machine(4);
  device::wait_for_devices();  // of a process that has used none
  EXPECT_EQ(sim().sim_calls("cuInit"), 0U);
  ASSERT_TRUE(Device::get(2).ok());
  const std::uint64_t of_torch = sim().sim_alloc(3, 100);
  device::wait_for_devices();
  EXPECT_EQ(sim().sim_calls("cuCtxSynchronize"), 2U);
  EXPECT_EQ(sim().ledger().contexts, 1U);
  sim().sim_free(of_torch);
  expect_clean(machine);
}

// Each as the only one in use, device 0 too.
TEST(Devices, AnyOneAloneIsWaitedFor) {
  for (const int used : {0, 1, 2}) {
    SCOPED_TRACE(used);
    Machine machine(3, 1, SIM_LAZY);
    ASSERT_TRUE(Device::count().ok());
    const std::uint64_t of_torch = sim().sim_alloc(used, 100);
    ASSERT_EQ(sim().sim_pending_write(used, 0, of_torch, 100), 1);
    ASSERT_EQ(sim().ledger().pending, 1U);
    EXPECT_TRUE(device::wait_for_devices());
    EXPECT_EQ(sim().ledger().pending, 0U);
    EXPECT_EQ(sim().sim_calls("cuCtxSynchronize"), 1U);
    sim().sim_free(of_torch);
    expect_clean(machine);
  }
}

TEST(Devices, AFailedStartIsNoMemory) {
  for (const char* const call :
       {"cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain"}) {
    Machine machine(1);
    sim().sim_fail_call(call, 1, kUnknownError, 0);
    const auto failed = Device::get(0);
    ASSERT_FALSE(failed.ok()) << call;
    EXPECT_EQ(failed.error().code, ErrorCode::kDriverCallFailed);
    EXPECT_TRUE(contains(failed.error().message, call)) << failed.error().message;
    EXPECT_TRUE(Device::get(0).ok()) << call;
    expect_clean(machine);
  }
}

TEST(Devices, ChildrenOfAProcessWithCudaAreToldSo) {
  Machine machine(1);
  ASSERT_NE(first_device(), nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    const bool told = Device::get(0).ok() == false &&
                      Device::get(0).error().code == ErrorCode::kForkedProcess &&
                      Device::count().error().code == ErrorCode::kForkedProcess;
    ::_exit(told ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(Device::get(0).ok());
  expect_clean(machine);
}

TEST(Devices, KernelsAreLoadedOnceFromAnyThread) {
  Machine machine(1);
  Device* const device = first_device();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([device] { EXPECT_TRUE(device->scatter_kernel().ok()); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(sim().sim_calls("cuModuleLoadData"), 1U);
  EXPECT_EQ(sim().ledger().modules, 1U);
  EXPECT_EQ(sim().ledger().pushed, 0U);
  expect_clean(machine);
}

TEST(Devices, ARefusedKernelIsRemembered) {
  for (const char* const call : {"cuModuleLoadData", "cuModuleGetFunction"}) {
    Machine machine(1);
    // Of each image that this device could run: machine code and PTX.
    for (std::uint64_t n = 1; n <= 4; ++n) {
      sim().sim_fail_call(call, n, CUDA_ERROR_NO_BINARY_FOR_GPU, 0);
    }
    Device* const device = first_device();
    std::uint64_t calls = 0;
    for (int i = 0; i < 2; ++i) {
      const auto kernel = device->scatter_kernel();
      ASSERT_FALSE(kernel.ok());
      EXPECT_TRUE(contains(kernel.error().message, call)) << kernel.error().message;
      EXPECT_EQ(device->kernel_form(), "");
      if (i == 0) calls = sim().sim_calls("cuModuleLoadData");
    }
    EXPECT_EQ(sim().sim_calls("cuModuleLoadData"), calls);
    expect_clean(machine);
  }
}

// Every supported driver and GPU gets a kernel, as machine code if the driver can read it.
TEST(Devices, HaveAKernelUnderEachDriver) {
  const bool real = std::string_view(convert::kernel_toolkit()) != "";
  bool by_12 = real;
  for (const convert::KernelImage& image : convert::scatter_images()) {
    by_12 = by_12 && (image.is_ptx || image.architecture == 110 ||
                      std::string_view(image.maker).starts_with("ptxas 12."));
  }
  for (const int version : {12000, 12020, 12040, 12070, 12080, 12090, 13000}) {
    for (const int capability : {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 130}) {
      SCOPED_TRACE(std::to_string(version) + ", " + std::to_string(capability));
      Machine machine(1);
      sim().sim_set_version(version);
      sim().sim_set_attribute(0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, capability / 10);
      sim().sim_set_attribute(0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, capability % 10);
      Device* const device = first_device();
      const auto kernel = device->scatter_kernel();
      ASSERT_TRUE(kernel.ok()) << kernel.error().message;
      const std::string form = device->kernel_form();
      const bool code_is_known = version >= 13000 || (by_12 && capability != 110 &&
                                                      (capability < 100 || version >= 12080));
      if (!real || capability == 130 || !code_is_known) {
        EXPECT_TRUE(form.starts_with("PTX for sm_75")) << form;
      } else {
        int best = 0;
        for (const int built : {75, 80, 86, 89, 90, 100, 110, 120}) {
          if (built / 10 == capability / 10 && built <= capability) best = built;
        }
        EXPECT_TRUE(form.starts_with("sm_" + std::to_string(best) + ",")) << form;
      }
      expect_clean(machine);
    }
  }
  Machine machine(1);
  sim().sim_set_attribute(0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 7);
  const auto kernel = first_device()->scatter_kernel();  // 7.0, Volta
  ASSERT_FALSE(kernel.ok());
  EXPECT_TRUE(contains(kernel.error().message, "compute capability 7.0"));
}

// --- Contexts, streams, events -----------------------------------------------------------------

TEST(Contexts, LeaveTheThreadsCaptureModeAsItWas) {
  Machine machine(1);
  Device& device = *first_device();
  for (const CUstreamCaptureMode own :
       {CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, CU_STREAM_CAPTURE_MODE_GLOBAL}) {
    CUstreamCaptureMode mode = own;
    device.driver().cuThreadExchangeStreamCaptureMode(&mode);
    {
      const CurrentContext current(device);
    }
    EXPECT_TRUE(Device::get(0).ok());
    EXPECT_TRUE(device::wait_for_devices());
    mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    device.driver().cuThreadExchangeStreamCaptureMode(&mode);
    EXPECT_EQ(mode, own);
  }
  expect_clean(machine);
}

TEST(Contexts, AreOfTheThreadAndNest) {
  Machine machine(2);
  Device& first = **Device::get(0);
  Device& second = **Device::get(1);
  {
    const CurrentContext outer(first);
    ASSERT_TRUE(outer.status().ok());
    const CurrentContext inner(second);
    ASSERT_TRUE(inner.status().ok());
    EXPECT_EQ(sim().ledger().pushed, 2U);
    std::thread([&] {
      const CurrentContext other(first);
      EXPECT_TRUE(other.status().ok());
      EXPECT_EQ(sim().ledger().pushed, 3U);
    }).join();
    EXPECT_EQ(sim().ledger().pushed, 2U);
  }
  expect_clean(machine);
}

TEST(Contexts, AFailedPushPopsNothing) {
  Machine machine(1);
  Device* const device = first_device();
  {
    const CurrentContext outer(*device);
    sim().sim_fail_call("cuCtxPushCurrent", 1, kUnknownError, 0);
    {
      EXPECT_FALSE(CurrentContext(*device).status().ok());
    }
    EXPECT_EQ(sim().ledger().pushed, 1U);
  }
  expect_clean(machine);
}

TEST(Streams, AndEventsGoWithTheirOwners) {
  Machine machine(1);
  Device* const device = first_device();
  {
    auto stream = Stream::create(*device);
    ASSERT_TRUE(stream.ok());
    auto event = Event::create(*device);
    ASSERT_TRUE(event.ok());
    EXPECT_TRUE(event->record(stream->get()).ok());
    EXPECT_TRUE(event->wait().ok());
    const Stream moved = *std::move(stream);
    EXPECT_NE(moved.get(), nullptr);
    EXPECT_EQ(sim().ledger().streams, 1U);
    EXPECT_EQ(sim().ledger().events, 1U);
  }
  EXPECT_EQ(sim().ledger().streams, 0U);
  EXPECT_EQ(sim().ledger().events, 0U);
  expect_clean(machine);
}

TEST(Streams, FailuresAreReported) {
  Machine machine(1);
  Device* const device = first_device();
  sim().sim_fail_call("cuStreamCreate", 1, kUnknownError, 0);
  EXPECT_TRUE(contains(Stream::create(*device).error().message, "cuStreamCreate"));
  sim().sim_fail_call("cuEventCreate", 1, kUnknownError, 0);
  EXPECT_TRUE(contains(Event::create(*device).error().message, "cuEventCreate"));
  {
    auto stream = Stream::create(*device);
    auto event = Event::create(*device);
    sim().sim_fail_call("cuEventRecord", 1, kUnknownError, 0);
    EXPECT_FALSE(event->record(stream->get()).ok());
    EXPECT_TRUE(event->record(stream->get()).ok());
    sim().sim_fail_call("cuEventSynchronize", 1, kUnknownError, 0);
    EXPECT_FALSE(event->wait().ok());
    EXPECT_TRUE(event->wait().ok());
  }
  expect_clean(machine);
}

// --- Pinned memory -----------------------------------------------------------------------------

TEST(Pinned, IsOfEveryDeviceAndLetGo) {
  Machine machine(2);
  Device* const device = first_device();
  {
    auto memory = PinnedMemory::allocate(*device, kSlot);
    ASSERT_TRUE(memory.ok());
    EXPECT_EQ(memory->size(), kSlot);
    EXPECT_EQ(sim().ledger().pinned_bytes, kSlot);
    std::memset(memory->data(), 7, kSlot);
    // From the other device: registered for its own alone, the copy is a violation.
    Device& other = **Device::get(1);
    const std::uint64_t target = sim().sim_alloc(1, kSlot);
    auto stream = Stream::create(other);
    ASSERT_TRUE(stream.ok());
    const CurrentContext current(other);
    EXPECT_EQ(other.driver().cuMemcpyHtoDAsync(target, memory->data(), kSlot, stream->get()),
              CUDA_SUCCESS);
    EXPECT_EQ(other.driver().cuStreamSynchronize(stream->get()), CUDA_SUCCESS);
    sim().sim_free(target);
  }
  EXPECT_EQ(sim().ledger().pinned_bytes, 0U);
  EXPECT_EQ(sim().sim_calls("cuMemHostRegister"), 1U);
  EXPECT_EQ(sim().sim_calls("cuMemHostUnregister"), 1U);
  expect_clean(machine);
}

TEST(Pinned, ComesFromTheDriverWhereRegisteringIsRefused) {
  Machine machine(1);
  Device* const device = first_device();
  sim().sim_fail_call("cuMemHostRegister", 1, CUDA_ERROR_NOT_SUPPORTED, 0);
  {
    auto memory = PinnedMemory::allocate(*device, kSlot);
    ASSERT_TRUE(memory.ok()) << memory.error().message;
    EXPECT_EQ(sim().sim_calls("cuMemHostAlloc"), 1U);
    std::memset(memory->data(), 7, memory->size());
    const PinnedMemory moved = *std::move(memory);
    EXPECT_EQ(sim().ledger().pinned_ranges, 1U);
  }
  EXPECT_EQ(sim().sim_calls("cuMemFreeHost"), 1U);
  expect_clean(machine);
}

TEST(Pinned, BothRefusedSaysBothAndWhatToLookAt) {
  Machine machine(1);
  Device* const device = first_device();
  sim().sim_fail_call("cuMemHostRegister", 1, CUDA_ERROR_NOT_SUPPORTED, 0);
  sim().sim_fail_call("cuMemHostAlloc", 1, CUDA_ERROR_OUT_OF_MEMORY, 0);
  const auto memory = PinnedMemory::allocate(*device, kSlot);
  ASSERT_FALSE(memory.ok());
  for (const char* const part : {"cuMemHostRegister", "cuMemHostAlloc", "ulimit -l"}) {
    EXPECT_TRUE(contains(memory.error().message, part)) << memory.error().message;
  }
  expect_clean(machine);
}

TEST(Pinned, OutlivesADriverThatIsGone) {
  Machine machine(1);
  Device* const device = first_device();
  auto memory = PinnedMemory::allocate(*device, kSlot);
  ASSERT_TRUE(memory.ok());
  sim().sim_exit();
  {
    const PinnedMemory gone = *std::move(memory);
    device::wait_for_devices();
  }
  EXPECT_EQ(sim().sim_violations(), 0U) << sim().violations();
}

TEST(Pinned, DyingInAChildLeavesWhatTheChildHasThere) {
  Machine machine(1);
  Device* const device = first_device();
  auto memory = PinnedMemory::allocate(*device, kSlot);
  ASSERT_TRUE(memory.ok());
  std::byte* const place = memory->data();
  const pid_t child = ::fork();
  if (child == 0) {
    // The pages were kept from the child, so its next mapping may lie there.
    void* const own = ::mmap(place, kSlot, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (own != place) ::_exit(1);
    std::memset(place, 5, kSlot);
    const std::uint64_t calls = sim().sim_calls("cuCtxPushCurrent");
    {
      const PinnedMemory gone = *std::move(memory);
    }
    if (sim().sim_calls("cuCtxPushCurrent") != calls) ::_exit(2);
    // Where it is unmapped now, this is a SIGSEGV.
    ::_exit(static_cast<volatile std::byte*>(place)[kSlot - 1] == std::byte{5} ? 0 : 3);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  {
    const PinnedMemory gone = *std::move(memory);
  }
  EXPECT_EQ(sim().ledger().pinned_bytes, 0U);
  expect_clean(machine);
}

// What torch does with a tensor in pinned memory: a copy, and no record of it.
TEST(Pinned, WaitingForDevicesMakesUnpinningSafe) {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    Machine machine(2, seed, static_cast<int>(seed % SIM_POLICIES));
    Device* const device = first_device();
    Device& other = **Device::get(1);
    const std::uint64_t target = sim().sim_alloc(1, kSlot);
    {
      auto memory = PinnedMemory::allocate(*device, kSlot);
      ASSERT_TRUE(memory.ok());
      const CurrentContext current(other);
      EXPECT_EQ(other.driver().cuMemcpyHtoDAsync(target, memory->data(), kSlot, nullptr),
                CUDA_SUCCESS);
      device::wait_for_devices();
    }
    sim().sim_free(target);
    expect_clean(machine);
  }
}

// The thread that drops it does not wait for the devices. The memory is released after all of them,
// also device 0, have finished.
TEST(Pinned, IsReleasedLaterByAThreadOfItsOwn) {
  for (const int used : {0, 1, 2}) {
    for (int policy = 0; policy < SIM_POLICIES; ++policy) {
      SCOPED_TRACE(std::to_string(used) + ", " + simulation::kPolicyNames[policy]);
      Machine machine(3, 1, policy);
      Device* const device = first_device();
      Device& other = **Device::get(used);
      const std::uint64_t target = sim().sim_alloc(used, kSlot);
      std::list<PinnedMemory> memory;
      memory.push_back(*PinnedMemory::allocate(*device, kSlot));
      {
        const CurrentContext current(other);
        EXPECT_EQ(other.driver().cuMemcpyHtoDAsync(target, memory.front().data(), kSlot, nullptr),
                  CUDA_SUCCESS);
      }
      device::release_later(std::move(memory));
      device::wait_for_releases();
      EXPECT_EQ(sim().ledger().pinned_ranges, 0U);
      sim().sim_free(target);
      expect_clean(machine);
    }
  }
}

TEST(Pinned, WhoDropsItDoesNotWait) {
  Machine machine(1);
  Device* const device = first_device();
  const std::uint64_t target = sim().sim_alloc(0, kSlot);
  std::list<PinnedMemory> memory;
  memory.push_back(*PinnedMemory::allocate(*device, kSlot));
  sim().sim_set_link(0, 4 * kSlot);  // the copy takes a quarter of a second
  sim().sim_set_time(SIM_TIME_REAL);
  {
    const CurrentContext current(*device);
    EXPECT_EQ(device->driver().cuMemcpyHtoDAsync(target, memory.front().data(), kSlot, nullptr),
              CUDA_SUCCESS);
  }
  device::release_later(std::move(memory));
  EXPECT_EQ(sim().ledger().pending, 1U);
  device::wait_for_releases();
  EXPECT_EQ(sim().ledger().pending, 0U);
  EXPECT_EQ(sim().ledger().pinned_ranges, 0U);
  sim().sim_set_time(SIM_TIME_NONE);
  sim().sim_free(target);
  expect_clean(machine);
}

// Of another thread, on a stream that waits for the default stream.
TEST(Pinned, IsReleasedWhenACaptureHasEnded) {
  for (const int mode : {SIM_CAPTURE_GLOBAL, SIM_CAPTURE_THREAD_LOCAL, SIM_CAPTURE_RELAXED}) {
    SCOPED_TRACE(mode);
    Machine machine(2);
    sim().sim_allow(1, 0);
    Device* const device = first_device();
    Device& other = **Device::get(1);
    CUstream user = nullptr;
    {
      const CurrentContext current(other);
      ASSERT_EQ(other.driver().cuStreamCreate(&user, CU_STREAM_DEFAULT), CUDA_SUCCESS);
    }
    const auto handle = reinterpret_cast<std::uintptr_t>(user);
    std::list<PinnedMemory> memory;
    memory.push_back(*PinnedMemory::allocate(*device, kSlot));
    std::thread([&] { EXPECT_EQ(sim().sim_begin_capture(1, handle, mode), 1); }).join();
    const std::uint64_t asked = sim().sim_calls("cuStreamIsCapturing");
    device::release_later(std::move(memory));
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (sim().sim_calls("cuStreamIsCapturing") < asked + 2 &&
           std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_EQ(sim().ledger().pinned_ranges, 1U);
    EXPECT_EQ(sim().sim_end_capture(1, handle), 1) << "the capture was broken";
    device::wait_for_releases();
    EXPECT_EQ(sim().ledger().pinned_ranges, 0U);
    {
      const CurrentContext current(other);
      EXPECT_EQ(other.driver().cuStreamDestroy(user), CUDA_SUCCESS);
    }
    expect_clean(machine);
  }
}

TEST(Pinned, MemoryThatCannotBeRegisteredIsTheDriversOwn) {
  Machine machine(1);
  sim().sim_fail_call("cuMemHostRegister", 1, CUDA_ERROR_NOT_SUPPORTED, 0);
  auto own = io::AnonymousMemory::allocate(kSlot);
  ASSERT_TRUE(own.ok());
  {
    const auto memory = PinnedMemory::adopt(*first_device(), *std::move(own));
    ASSERT_TRUE(memory.ok()) << memory.error().message;
    EXPECT_EQ(memory->size(), kSlot);
    std::memset(memory->data(), 1, kSlot);
    EXPECT_EQ(sim().ledger().pinned_bytes, kSlot);
    EXPECT_EQ(sim().sim_calls("cuMemHostAlloc"), 1U);
  }
  expect_clean(machine);
}

// --- The staging pool --------------------------------------------------------------------------

TEST(Staging, SlotsAreReusedAndTheBudgetHolds) {
  Machine machine(1);
  Device* const device = first_device();
  StagingPool& pool = StagingPool::instance();
  const std::size_t before = pool.pinned_bytes();
  const std::size_t budget = before + 2 * kSlot;
  auto first = pool.take(*device, kSlot, budget);
  ASSERT_TRUE(first.ok() && first->has_value());
  auto second = pool.take(*device, kSlot, budget);
  ASSERT_TRUE(second.ok() && second->has_value());
  auto third = pool.take(*device, kSlot, budget);
  ASSERT_TRUE(third.ok());
  EXPECT_FALSE(third->has_value());
  EXPECT_EQ(pool.pinned_bytes(), budget);

  std::byte* const address = (*first)->data();
  first->reset();
  auto again = pool.take(*device, kSlot, budget);
  ASSERT_TRUE(again.ok() && again->has_value());
  EXPECT_EQ((*again)->data(), address);
  EXPECT_EQ(sim().sim_calls("cuMemHostRegister"), 2U);

  again->reset();
  second->reset();
  EXPECT_EQ(pool.pinned_bytes(), budget);
  pool.clear();
  EXPECT_EQ(pool.pinned_bytes(), before);
  EXPECT_EQ(sim().ledger().pinned_bytes, 0U);
  expect_clean(machine);
}

TEST(Staging, FreeSlotsOfAnotherSizeMakeRoom) {
  Machine machine(1);
  Device* const device = first_device();
  StagingPool& pool = StagingPool::instance();
  const std::size_t budget = pool.pinned_bytes() + 4 * kSlot;
  std::vector<device::StagingSlot> taken;
  for (int i = 0; i < 4; ++i) taken.push_back(**pool.take(*device, kSlot, budget));
  taken.clear();
  auto large = pool.take(*device, 4 * kSlot, budget);
  ASSERT_TRUE(large.ok() && large->has_value());
  EXPECT_EQ((*large)->size(), 4 * kSlot);
  EXPECT_LE(sim().ledger().peak_pinned_bytes, 4 * kSlot) << "more than the budget was pinned";
  large->reset();
  expect_clean(machine);
}

// The node from which the kernel takes a page: mbind(2), get_mempolicy(2) with MPOL_F_ADDR.
std::optional<int> preferred_node(const std::byte* address) {
  int mode = 0;
  std::array<unsigned long, 16> nodes{};
  if (::syscall(SYS_get_mempolicy, &mode, nodes.data(), 8 * sizeof nodes + 1, address,
                MPOL_F_ADDR) != 0 ||
      mode != MPOL_PREFERRED) {
    return std::nullopt;
  }
  for (std::size_t word = 0; word < nodes.size(); ++word) {
    if (nodes[word] != 0) return static_cast<int>(64 * word) + std::countr_zero(nodes[word]);
  }
  return std::nullopt;
}

TEST(Staging, SlotsAreOfTheDevicesNodeAndLentByIt) {
  Machine machine(3);
  for (const int device : {0, 1, 2}) {
    sim().sim_set_attribute(device, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, device == 2 ? -1 : device);
  }
  Device* const near = *Device::get(0);
  Device* const far = *Device::get(1);
  EXPECT_EQ(near->node(), 0);
  EXPECT_EQ(far->node(), 1);
  EXPECT_EQ((*Device::get(2))->node(), -1);
  StagingPool& pool = StagingPool::instance();
  const std::size_t budget = pool.pinned_bytes() + 2 * kSlot;
  const auto take = [&](Device* device) {
    auto slot = pool.take(*device, kSlot, budget);
    return slot.ok() ? std::move(*slot) : std::nullopt;
  };
  auto first = take(near);
  ASSERT_TRUE(first.has_value());
  std::byte* const of_near = first->data();
  if (::access("/sys/devices/system/node/node0", F_OK) == 0) {
    EXPECT_EQ(preferred_node(of_near), 0);
  }
  first.reset();
  auto second = take(far);
  ASSERT_TRUE(second.has_value());
  std::byte* const of_far = second->data();
  EXPECT_NE(of_far, of_near) << "the budget allows one on its own node";
  second.reset();
  auto again = take(near);
  auto other = take(far);
  ASSERT_TRUE(again.has_value() && other.has_value());
  EXPECT_EQ(again->data(), of_near);
  EXPECT_EQ(other->data(), of_far);
  other.reset();
  auto third = take(near);  // its node has no free slot, and the budget is used up
  ASSERT_TRUE(third.has_value());
  EXPECT_EQ(third->data(), of_far);
  EXPECT_EQ(sim().sim_calls("cuMemHostRegister"), 2U);
  again.reset();
  third.reset();
  pool.clear();
  expect_clean(machine);
}

TEST(Staging, AFailedSlotCostsNoBudget) {
  Machine machine(1);
  Device* const device = first_device();
  StagingPool& pool = StagingPool::instance();
  const std::size_t before = pool.pinned_bytes();
  sim().sim_fail_call("cuMemHostRegister", 1, kUnknownError, 0);
  sim().sim_fail_call("cuMemHostAlloc", 1, kUnknownError, 0);
  EXPECT_FALSE(pool.take(*device, kSlot, before + kSlot).ok());
  EXPECT_EQ(pool.pinned_bytes(), before);
  auto slot = pool.take(*device, kSlot, before + kSlot);
  ASSERT_TRUE(slot.ok() && slot->has_value());
  slot->reset();
  expect_clean(machine);
}

TEST(Staging, SeveralThreadsStayWithinTheBudget) {
  Machine machine(2);
  std::array<Device*, 2> devices = {*Device::get(0), *Device::get(1)};
  StagingPool& pool = StagingPool::instance();
  const std::size_t budget = pool.pinned_bytes() + 6 * kSlot;
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) {
        auto slot = pool.take(*devices[t % 2], kSlot << (t / 2), budget);
        ASSERT_TRUE(slot.ok());
        if (!slot->has_value()) continue;
        (**slot).data()[0] = std::byte{1};
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(pool.pinned_bytes(), budget);
  EXPECT_EQ(sim().ledger().pinned_bytes, pool.pinned_bytes());
  expect_clean(machine);
}

}  // namespace
}  // namespace weightlift
