#include "io/machine.h"

#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace weightlift::io {
namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

std::optional<std::string> read_text(const std::string& path) {
  const std::ifstream stream(path);
  if (!stream) return std::nullopt;
  std::ostringstream text;
  text << stream.rdbuf();
  return text.str();
}

std::optional<std::uint64_t> parse_number(const std::string& text) {
  std::uint64_t value = 0;
  std::istringstream stream(text);
  if (!(stream >> value)) return std::nullopt;
  return value;
}

// "name value" lines, as in memory.stat and /proc/meminfo ("name: value kB").
std::optional<std::uint64_t> field(const std::string& text, const std::string& name) {
  std::istringstream stream(text);
  std::string line;
  while (std::getline(stream, line)) {
    if (line.rfind(name, 0) == 0 && line.size() > name.size() &&
        (line[name.size()] == ' ' || line[name.size()] == ':')) {
      return parse_number(line.substr(name.size() + 1));
    }
  }
  return std::nullopt;
}

// The folders of this process's cgroup and its parents for one controller: the parents' limits
// apply too. Version 2 has one line "0::/path" (cgroups(7)), version 1 "n:controllers:/path". In a
// container the path may not exist under the mount, whose root is then the group itself.
std::vector<std::string> group_folders(const std::string& root, const std::string& controller) {
  std::vector<std::string> folders;
  const auto lines = read_text(root + "/proc/self/cgroup");
  if (!lines) return folders;
  std::istringstream stream(*lines);
  std::string line;
  while (std::getline(stream, line)) {
    const auto first = line.find(':');
    const auto second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string base = root + "/sys/fs/cgroup";
    if (!controllers.empty()) {
      std::istringstream names(controllers);
      std::string name;
      bool listed = false;
      while (std::getline(names, name, ',')) listed = listed || name == controller;
      if (!listed) continue;
      base.append("/").append(controller);
    }
    std::string path = line.substr(second + 1);
    while (true) {
      folders.push_back(base + (path == "/" ? "" : path));
      if (path.empty() || path == "/" || path[0] != '/') break;
      path.resize(path.rfind('/'));
    }
  }
  return folders;
}

}  // namespace

int current_node() noexcept {
  unsigned cpu = 0;
  unsigned node = 0;
  // glibc has getcpu(2) since 2.29; the wheels are for 2.28.
  return ::syscall(SYS_getcpu, &cpu, &node, nullptr) == 0 ? static_cast<int>(node) : -1;
}

unsigned usable_cpus(const std::string& root) {
  // sched_getaffinity(2) fails on a machine with more processors than a cpu_set_t holds (1024).
  unsigned count = std::max(1U, std::thread::hardware_concurrency());
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof set, &set) == 0) {
    count = static_cast<unsigned>(std::max(1, CPU_COUNT(&set)));
  }
  for (const std::string& folder : group_folders(root, "cpu")) {
    std::uint64_t quota = 0;
    std::uint64_t period = 0;
    if (const auto text = read_text(folder + "/cpu.max")) {
      std::istringstream(*text) >> quota >> period;  // "max 100000" leaves both at zero
    } else {
      quota = parse_number(read_text(folder + "/cpu.cfs_quota_us").value_or("")).value_or(0);
      period = parse_number(read_text(folder + "/cpu.cfs_period_us").value_or("")).value_or(0);
      if (quota > std::numeric_limits<std::uint64_t>::max() / 2) quota = 0;  // "-1": no limit
    }
    if (quota != 0 && period != 0) {
      count = std::min(
          count, static_cast<unsigned>(std::max<std::uint64_t>(1, (quota + period - 1) / period)));
    }
  }
  return count;
}

std::uint64_t memory_headroom(const std::string& root) {
  std::uint64_t headroom = kUnlimited;
  if (const auto text = read_text(root + "/proc/meminfo")) {
    if (const auto available = field(*text, "MemAvailable")) headroom = *available * 1024;
  }
  for (const std::string& folder : group_folders(root, "memory")) {
    std::optional<std::uint64_t> limit;
    std::optional<std::uint64_t> used;
    if (const auto text = read_text(folder + "/memory.max")) {
      limit = parse_number(*text);  // nothing for "max"
      used = parse_number(read_text(folder + "/memory.current").value_or(""));
    } else {
      limit = parse_number(read_text(folder + "/memory.limit_in_bytes").value_or(""));
      used = parse_number(read_text(folder + "/memory.usage_in_bytes").value_or(""));
    }
    if (!limit || !used) continue;
    const std::string stat = read_text(folder + "/memory.stat").value_or("");
    // In version 1, the usage includes child groups, and the "total_" fields do too.
    const auto pages = [&stat](const std::string& name) {
      return field(stat, "total_" + name).value_or(field(stat, name).value_or(0));
    };
    const std::uint64_t cache = pages("inactive_file") + pages("active_file");
    const std::uint64_t taken = *used > cache ? *used - cache : 0;
    headroom = std::min(headroom, *limit > taken ? *limit - taken : 0);
  }
  return headroom;
}

bool gives_huge_pages(const std::string& root) {
  const auto setting = read_text(root + "/sys/kernel/mm/transparent_hugepage/enabled");
  return !setting || setting->find("[never]") == std::string::npos;
}

unsigned usable_cpus() {
  return usable_cpus("");
}
std::uint64_t memory_headroom() {
  return memory_headroom("");
}
bool gives_huge_pages() {
  // A static variable takes a lock to initialize, which a child forked meanwhile would find locked.
  enum Answer : unsigned char { kUnknown, kYes, kNo };
  static std::atomic<Answer> answer = kUnknown;
  if (answer == kUnknown) {
    // 3, since Linux 6.18, spares memory with MADV_HUGEPAGE.
    const bool may = ::prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) != 1;
    answer = may && gives_huge_pages("") ? kYes : kNo;
  }
  return answer == kYes;
}

}  // namespace weightlift::io
