#include "engine/page_choice.h"

#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <exception>
#include <string>
#include <utility>

#include "io/anonymous_memory.h"
#include "mutex.h"

namespace weightlift::engine {
namespace {

// In bytes/s. If huge pages are slower, small ones are probed too.
constexpr double kFast = 1e9;
constexpr std::size_t kSmallProbeBytes = io::kHugePageBytes / 2;
constexpr std::size_t kSectionBytes = std::size_t{32} << 20;
// Of pages_arrive_slowly.
constexpr std::uint64_t kSamples = 64;
constexpr std::uint64_t kSampleDistance = 32 << 10;
constexpr double kSlowSeconds = 3e-6;  // for one page; a read of a cached page takes 0.3 us
constexpr std::chrono::milliseconds kPoll{1};
// A load that makes no progress for this long has ended, or waits for something else.
constexpr std::chrono::seconds kPatience{10};
// A section takes 2 to 4 ms while the machine has the memory. A load that takes longer may be
// waiting for huge pages.
constexpr std::chrono::milliseconds kLate{4};

double seconds_of(clockid_t clock) {
  timespec now{};
  ::clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

long preemptions() {
  rusage usage{};
  ::getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nivcsw;
}

// Seconds of `work`. If other threads preempted this one, its own processor time counts instead,
// which includes the time in which a host fetches memory.
template <class Work>
double cost_of(const Work& work) {
  const long before = preemptions();
  const double wall = seconds_of(CLOCK_MONOTONIC);
  const double own = seconds_of(CLOCK_THREAD_CPUTIME_ID);
  work();
  const double own_taken = seconds_of(CLOCK_THREAD_CPUTIME_ID) - own;
  const double taken = seconds_of(CLOCK_MONOTONIC) - wall;
  return std::max(preemptions() == before ? taken : own_taken, 1e-9);
}

std::string rate_text(double rate) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f GB/s", rate * 1e-9);
  return text;
}

}  // namespace

PageRates probe_pages(const Touch& touch, std::size_t offset) {
  PageRates rates{.huge = touch(offset, io::kHugePageBytes, false)};
  if (rates.huge >= kFast) return rates;
  // Averages over several pages: another thread may slow one down, and part of the memory may be
  // backed.
  double huge_seconds = 1 / rates.huge;
  double small_seconds = 0;
  for (std::size_t i = 0; i < kProbes; ++i) {
    const std::size_t at = offset + 2 * i * io::kHugePageBytes;
    if (i != 0) huge_seconds += 1 / touch(at, io::kHugePageBytes, false);
    const double small = touch(at + io::kHugePageBytes, kSmallProbeBytes, true);
    if (small == 0) return rates;  // unknown
    small_seconds += 1 / small;
  }
  rates.huge = kProbes / huge_seconds;
  if (rates.huge < kFast) rates.small = kProbes / small_seconds;
  return rates;
}

bool pages_arrive_slowly(const ReadPage& read, std::uint64_t offset, std::uint64_t bytes) {
  const std::uint64_t count = std::min(kSamples, bytes / kSampleDistance);
  if (count < kSamples / 4) return false;  // chance
  bool can_read = true;
  const double seconds = cost_of([&] {
    for (std::uint64_t i = 0; i < count && can_read; ++i) {
      can_read = read(offset + i * kSampleDistance);
    }
  });
  return can_read && seconds > kSlowSeconds * static_cast<double>(count);
}

PageWatch::PageWatch(const io::AnonymousMemory& memory, Touch touch)
    : memory_(memory), touch_(std::move(touch)), process_(::getpid()), small_from_(memory.size()) {
  if (memory.size() < kProbeBytes || probe(0)) return;
  if (memory.size() < 2 * kSectionBytes) return;
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::exception&) {
    return;  // no thread can be started: the first probe decides
  }
}

PageWatch::~PageWatch() {
  if (!thread_.joinable()) return;
  if (::getpid() != process_) {  // in a child process, which does not have this thread
    thread_.detach();
    // pthread_cond_destroy(3) would wait for that thread for ever.
    static_cast<void>(changed_.release());
    return;
  }
  {
    const MutexLock lock(mutex_);
    stopped_ = true;
  }
  changed_->notify_all();
  thread_.join();
}

std::string PageWatch::reason() const {
  const MutexLock lock(mutex_);
  if (small_from_ == memory_.size()) return "huge pages";
  const std::string rates = "huge pages came at " + rate_text(rates_.huge) + ", small ones at " +
                            rate_text(rates_.small) +
                            ": the machine's host has not backed its free memory";
  if (small_from_ <= kProbeBytes) return "small pages: " + rates;
  return "huge pages, small ones after " + std::to_string(small_from_ >> 20) + " MiB: " + rates;
}

void PageWatch::run() {
  std::size_t at = kSectionBytes;
  while (at + kProbeBytes <= memory_.size() && wait_for_load(at)) {
    // Skips pages that the load has already filled: they cannot be probed.
    while (at + kProbeBytes <= memory_.size() && memory_.is_backed(at)) at += kSectionBytes / 4;
    if (at + kProbeBytes > memory_.size() || probe(at)) return;
    at += kSectionBytes;
  }
}

bool PageWatch::probe(std::size_t offset) {
  const Touch touch = [&](std::size_t begin, std::size_t bytes, bool small) {
    if (touch_) return touch_(begin, bytes, small);
    if (small) {
      if (memory_.is_backed(begin)) return 0.0;  // the load was faster: unknown
      memory_.use_small_pages(begin, io::kHugePageBytes);
    }
    // If memory has run out, the load reports it.
    return static_cast<double>(bytes) / cost_of([&] { (void)memory_.populate(begin, bytes).ok(); });
  };
  const PageRates rates = probe_pages(touch, offset);
  if (!rates.small_is_faster()) return false;
  const std::size_t from = first_missing(offset + kProbeBytes - io::kHugePageBytes);
  memory_.use_small_pages(from, memory_.size());
  const MutexLock lock(mutex_);
  rates_ = rates;
  small_from_ = from;
  return true;
}

std::size_t PageWatch::first_missing(std::size_t limit) const {
  std::size_t at = 0;
  while (at < limit && memory_.is_backed(at)) at += io::kHugePageBytes;
  return std::min(at, limit);
}

bool PageWatch::wait_for_load(std::size_t at) {
  const std::size_t near = at - kSectionBytes / 2;
  const std::size_t farthest =
      at < 2 * kSectionBytes ? 0 : at - 2 * kSectionBytes + io::kHugePageBytes;
  const auto start = std::chrono::steady_clock::now();
  const MutexLock lock(mutex_);
  while (!stopped_ && !memory_.is_backed(near)) {
    const auto now = std::chrono::steady_clock::now();
    if (now - start > kLate && (farthest == 0 || memory_.is_backed(farthest))) break;
    if (now - start > kPatience) return false;
    changed_->wait_until(mutex_, now + kPoll);
  }
  return !stopped_;
}

}  // namespace weightlift::engine
