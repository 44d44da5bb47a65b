// What this process may use of the machine: processors and memory, as limited by its cgroup.
#pragma once

#include <cstdint>
#include <string>

namespace weightlift::io {

// Processors this process may keep busy: the smallest of its affinity and its cgroup's quota
// (cpu.max, cpu.cfs_quota_us), at least one.
[[nodiscard]] unsigned usable_cpus();

// The node of the machine that the calling thread runs on at the moment; -1 where that cannot be
// told.
[[nodiscard]] int current_node() noexcept;

// Bytes that can still be had: the smaller of MemAvailable and what the cgroup's limit leaves.
// Page-cache pages that the cgroup is charged for count as free: the kernel drops them first.
[[nodiscard]] std::uint64_t memory_headroom();

// For tests: the same over another root than "/".
[[nodiscard]] unsigned usable_cpus(const std::string& root);
[[nodiscard]] std::uint64_t memory_headroom(const std::string& root);

}  // namespace weightlift::io
