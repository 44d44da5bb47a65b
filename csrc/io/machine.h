// The processors and memory that this process may use, by the settings of its machine and cgroup.
#pragma once

#include <cstdint>
#include <string>

namespace weightlift::io {

// Processors that this process may keep busy: the smaller of its affinity and its cgroup's quota
// (cpu.max, cpu.cfs_quota_us), but at least one.
[[nodiscard]] unsigned usable_cpus();

// The NUMA node on which the calling thread runs at the moment; -1 if unknown.
[[nodiscard]] int current_node() noexcept;

// Bytes of memory that can still be allocated: the smaller of MemAvailable and the rest of the
// cgroup's limit. Page-cache pages that the cgroup is charged for count as free, because the kernel
// drops them first.
[[nodiscard]] std::uint64_t memory_headroom();

// False if new memory never gets transparent huge pages, by the setting of the machine
// (Documentation/admin-guide/mm/transhuge.rst) or of this process (PR_SET_THP_DISABLE). Asks the
// kernel once.
[[nodiscard]] bool gives_huge_pages();

// For tests: the same with another root than "/".
[[nodiscard]] unsigned usable_cpus(const std::string& root);
[[nodiscard]] std::uint64_t memory_headroom(const std::string& root);
[[nodiscard]] bool gives_huge_pages(const std::string& root);

}  // namespace weightlift::io
