#include "engine/order_of_use.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "engine/plan.h"

namespace weightlift::engine {
namespace {

// A layer waits for its whole batch, which takes a few milliseconds at 2 GB/s or more.
constexpr std::uint64_t kBatchBytes = std::uint64_t{8} << 20;

}  // namespace

std::vector<std::uint32_t> batches_of_use(const LoadPlan& plan) {
  std::vector<std::uint32_t> batches(plan.names.size());
  std::vector<std::uint64_t> bytes(plan.names.size());
  for (const Copy& copy : plan.copies) bytes[copy.name] += plan.source_bytes(copy);
  for (const Mapped& part : plan.mapped) bytes[part.name] += part.bytes;
  std::vector<std::uint32_t> order(plan.names.size());
  std::iota(order.begin(), order.end(), 0U);
  std::stable_sort(order.begin(), order.end(), [&plan](std::uint32_t a, std::uint32_t b) {
    return plan.ranks[a] < plan.ranks[b];
  });
  std::uint32_t batch = 0;
  std::uint64_t filled = 0;
  for (const std::uint32_t name : order) {
    if (filled >= kBatchBytes) {
      ++batch;
      filled = 0;
    }
    batches[name] = batch;
    filled += bytes[name];
  }
  return batches;
}

}  // namespace weightlift::engine
