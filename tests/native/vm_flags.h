// What the kernel was told of the memory at an address: proc(5), smaps, VmFlags.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>

namespace weightlift {

// Whether the flag is set, such as "nh" (no huge pages) or "sr" (sequential reads).
inline bool has_vm_flag(const std::byte* address, const std::string& flag) {
  std::ifstream smaps("/proc/self/smaps");
  const auto wanted = reinterpret_cast<std::uintptr_t>(address);
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    unsigned long begin = 0;
    unsigned long end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) {
      inside = begin <= wanted && wanted < end;
    } else if (inside && line.rfind("VmFlags:", 0) == 0) {
      return line.find(" " + flag) != std::string::npos;
    }
  }
  return false;
}

}  // namespace weightlift
