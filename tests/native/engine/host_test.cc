// Targets in host memory, and host memory that is pinned.
#include <cuda.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "device/context.h"
#include "device/pinned.h"
#include "device/staging.h"
#include "engine/failing_memory.h"
#include "engine/host_layout.h"
#include "engine/host_memory.h"
#include "engine/load.h"
#include "engine/plan.h"
#include "engine/runs.h"
#include "engine/scenario.h"
#include "io/anonymous_memory.h"
#include "simulated.h"

namespace weightlift::engine::test {
namespace {

TEST(LoadToHost, LargeTargets) {
  Machine machine(0);
  Scenario scenario(1, 0);
  scenario.settings.threads = 4;
  const Origin file = scenario.add_file(8 * kMiB);
  for (std::uint64_t i = 0; i < 3; ++i) {
    scenario.add(file, 3 + i, 2 * kMiB - 2, Dtype::kF32, Dtype::kF16, kHostDevice, i);
    scenario.add(file, i, 8 * kMiB - i, Dtype::kU8, Dtype::kU8, kHostDevice, 2 * i);
  }
  run_plainly(scenario, "large");
}

// Each large tensor is read to its place, and small ones together. The bytes between are not read.
TEST(LoadToHost, ReadsNoBytesAroundLargeTensors) {
  Machine machine(0);
  Scenario scenario(1, 0);
  constexpr std::uint64_t kLarge = 190 * kKiB;
  const Origin file = scenario.add_file(2 * kLarge + kKiB);
  scenario.add(file, 7, kLarge, Dtype::kU8, Dtype::kU8, kHostDevice, 3);
  scenario.add(file, kLarge + 100, 50, Dtype::kU8, Dtype::kU8, kHostDevice, 3);
  scenario.add(file, kLarge + 200, 25, Dtype::kF16, Dtype::kF16, kHostDevice, 3);
  scenario.add(file, kLarge + 500, kLarge, Dtype::kU8, Dtype::kU8, kHostDevice, 3);
  std::string why;
  auto load = scenario.prepare(&why);
  ASSERT_NE(load, nullptr) << why;
  ASSERT_TRUE(load->start().ok());
  wait_for(*load, "large");
  const auto report = load->finish();
  ASSERT_TRUE(report.ok()) << report.error().describe();
  EXPECT_EQ(report->read_bytes, 2 * kLarge + 150);
  scenario.expect_everything(*load, *report, "large");
}

// New memory with small pages, or said to have huge ones.
class NewMemory final : public HostMemory {
 public:
  NewMemory(io::AnonymousMemory memory, bool small)
      : HostMemory(memory.data(), false), memory_(std::move(memory)), small_(small) {
    memory_.use_small_pages(0, memory_.size());
  }
  [[nodiscard]] bool gives_small_pages(const std::byte* begin,
                                       const std::byte* end) const noexcept override {
    return small_ && begin >= data() && end <= data() + memory_.size();
  }
  [[nodiscard]] bool is_backed(std::size_t offset) const { return memory_.is_backed(offset); }

 private:
  io::AnonymousMemory memory_;
  bool small_;
};

constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which old headers do not have

// The pages of a unit's targets are backed together. No copy writes to the pages between them.
TEST(LoadToHost, BacksSmallPagesTogether) {
  const auto probe = io::AnonymousMemory::allocate(kMiB);
  ASSERT_TRUE(probe.ok());
  if (::madvise(probe->data(), kMiB, kPopulateWrite) != 0) {
    GTEST_SKIP() << "the kernel does not know MADV_POPULATE_WRITE, or a sandbox refuses it";
  }
  constexpr std::uint64_t kElements = std::uint64_t{32} << 10;
  constexpr std::uint64_t kApart = kElements * 2 + 16 * 1024;
  constexpr std::uint64_t kTensors = 8;
  const TestFile file(std::vector<std::byte>(kTensors * kElements * 4));
  for (const bool small : {true, false}) {
    auto block = io::AnonymousMemory::allocate(kMiB);
    ASSERT_TRUE(block.ok());
    const auto memory = std::make_shared<NewMemory>(*std::move(block), small);
    LoadPlan plan;
    const std::uint32_t index = plan.add_file(file.open());
    for (std::uint64_t i = 0; i < kTensors; ++i) {
      plan.add_copy({.file = index,
                     .source = i * kElements * 4,
                     .target = address_of(memory->data() + i * kApart),
                     .elements = kElements,
                     .source_dtype = Dtype::kF32,
                     .target_dtype = Dtype::kBf16});
    }
    plan.host_memory.push_back(memory);
    auto load = Load::prepare(std::move(plan), {.read_bytes = kTensors * kElements * 4});
    ASSERT_TRUE(load.ok()) << load.error().describe();
    ASSERT_TRUE((*load)->start().ok());
    ASSERT_TRUE((*load)->finish().ok());
    for (std::uint64_t i = 0; i < kTensors; ++i) {
      EXPECT_TRUE(memory->is_backed(i * kApart));
      if (i == 0) continue;
      EXPECT_EQ(memory->is_backed(i * kApart - 8 * 1024), small) << i;
    }
  }
}

// Small tensors that are neighbours in the file are neighbours in the block, unless one would be
// misaligned.
TEST(HostLayoutAdd, KeepsNeighboursTogether) {
  const TestFile file(std::vector<std::byte>(4 * kKiB));
  LoadPlan plan;
  const std::uint32_t index = plan.add_file(file.open());
  engine::HostLayout layout(plan);
  const auto add = [&](std::uint64_t offset, std::uint64_t bytes, Dtype dtype, Dtype target) {
    return layout.add({.file = index, .dtype = dtype, .offset = offset, .bytes = bytes}, target);
  };
  EXPECT_EQ(add(100, 12, Dtype::kF32, Dtype::kF32), 12);
  EXPECT_EQ(add(112, 6, Dtype::kBf16, Dtype::kBf16), 6);  // neighbour
  EXPECT_EQ(add(118, 8, Dtype::kF32, Dtype::kF32), 8);    // not at 18
  EXPECT_EQ(add(126, 8, Dtype::kF32, Dtype::kBf16), 4);   // cast
  EXPECT_EQ(add(134, 3, Dtype::kF4, Dtype::kF4), 3);      // behind one that is cast
  EXPECT_EQ(add(137, 0, Dtype::kU8, Dtype::kU8), 0);      // empty
  EXPECT_EQ(add(200, 16, Dtype::kF64, Dtype::kF64), 16);  // elsewhere in the file
  constexpr std::array<std::uint64_t, 7> kOffsets = {0, 12, 64, 128, 192, 195, 256};
  for (std::size_t i = 0; i < kOffsets.size(); ++i) EXPECT_EQ(layout.offset(i), kOffsets.at(i));
  EXPECT_EQ(layout.bytes(), 272);

  std::vector<std::byte> block(layout.bytes());
  layout.place_at(block.data());
  ASSERT_EQ(plan.copies.size(), 6);  // without the empty one
  EXPECT_EQ(plan.copies[1].target, address_of(block.data()) + 12);
  EXPECT_EQ(plan.copies[3].target, address_of(block.data()) + 128);
  EXPECT_EQ(plan.copies[3].elements, 2);
  EXPECT_EQ(plan.copies[3].source_dtype, Dtype::kF32);
  EXPECT_EQ(plan.copies[3].target_dtype, Dtype::kBf16);
  EXPECT_EQ(plan.copies[4].elements, 3);
}

// torch copies from a pinned tensor and drops it; the owner of the memory is not told.
TEST(HostMemory, IsUnpinnedAfterTheDevicesAreDone) {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    // Each device is waited for, the first one alone as well.
    const int ordinal = static_cast<int>(seed % 3 == 0 ? 0 : seed % 2);
    Machine machine(seed % 3 == 0 ? 1 : 2, seed, static_cast<int>(seed % SIM_POLICIES));
    const std::uint64_t target = sim().sim_alloc(ordinal, kMiB);
    {
      auto memory = HostMemory::allocate(kMiB, 0, {.threads = 2});
      ASSERT_TRUE(memory.ok()) << memory.error().describe();
      EXPECT_TRUE((*memory)->pinned());
      EXPECT_EQ(sim().ledger().pinned_bytes, kMiB);
      auto device = device::Device::get(ordinal);
      ASSERT_TRUE(device.ok());
      const device::CurrentContext current(**device);
      EXPECT_EQ((*device)->driver().cuMemcpyHtoDAsync(target, (*memory)->data(), kMiB, nullptr),
                CUDA_SUCCESS);
    }
    device::wait_for_releases();
    EXPECT_EQ(sim().ledger().pinned_bytes, 0U);
    sim().sim_free(target);
    expect_machine_clean(machine, "pinned");
  }
}

// As on WSL2, or on a machine with encrypted memory: the driver allocates, as for slots.
TEST(HostMemoryAllocate, RefusedRegistering) {
  Machine machine(1);
  sim().sim_fail_call("cuMemHostRegister", 1, CUDA_ERROR_NOT_SUPPORTED, 0);
  {
    const auto memory = HostMemory::allocate(kMiB, 0, {.threads = 2});
    ASSERT_TRUE(memory.ok()) << memory.error().describe();
    EXPECT_TRUE((*memory)->pinned());
    std::memset((*memory)->data(), 1, kMiB);
    EXPECT_EQ(sim().ledger().pinned_bytes, kMiB);
  }
  device::wait_for_releases();
  EXPECT_EQ(sim().ledger().pinned_bytes, 0U);
  expect_machine_clean(machine, "pinned");
}

TEST(HostMemoryAllocate, RefusedPinning) {
  Machine machine(1);
  sim().sim_fail_call("cuMemHostRegister", 1, CUDA_ERROR_OUT_OF_MEMORY, 0);
  sim().sim_fail_call("cuMemHostAlloc", 1, CUDA_ERROR_OUT_OF_MEMORY, 0);
  const auto memory = HostMemory::allocate(kMiB, 0, {.threads = 2});
  ASSERT_FALSE(memory.ok());
  EXPECT_NE(memory.error().message.find("cuMemHostRegister"), std::string::npos);
  expect_machine_clean(machine, "pinned");
}

TEST(HostMemoryAllocate, OutOfMemory) {
  exhaust("pinned", [](const std::string& what, std::uint64_t n) {
    Machine machine(2, n);
    const std::uint64_t of_torch = sim().sim_alloc(1, 100);
    const Baseline baseline;
    try {
      const Watched watched;
      const auto block = HostMemory::allocate(9 * kMiB, 0, {.threads = 3});
      if (!block.ok()) {
        EXPECT_EQ(block.error().code, ErrorCode::kOutOfMemory) << what;
      }
    } catch (const std::bad_alloc&) {
      EXPECT_LT(heap.left, 1) << what;
    }
    device::wait_for_releases();
    EXPECT_EQ(sim().ledger().pinned_bytes, 0U) << what;
    baseline.expect_same(what);
    EXPECT_TRUE(HostMemory::allocate(9 * kMiB, 0, {.threads = 3}).ok()) << what;
    sim().sim_free(of_torch);
    expect_machine_clean(machine, what);
  });
}

}  // namespace
}  // namespace weightlift::engine::test
