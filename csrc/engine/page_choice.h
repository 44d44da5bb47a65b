// Chooses huge or small pages for new memory by what they cost at the time.
//
// Huge pages are several times cheaper than small ones while the machine has the memory. A virtual
// machine whose host takes free memory back (Linux, Documentation/mm/free_page_reporting.rst) gets
// it again page by page at the first touch, and then huge pages are several times more expensive.
// This can change within one block, because the memory that was freed last is still backed.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "io/anonymous_memory.h"
#include "mutex.h"

namespace weightlift::engine {

// Backs [offset, offset + bytes), with small pages if `small`, and returns the rate in bytes/s; 0
// if unknown.
using Touch = std::function<double(std::size_t offset, std::size_t bytes, bool small)>;

// Measured rates in bytes/s. `small` is 0 if huge pages were so fast that small ones were not
// measured.
struct PageRates {
  double huge = 0;
  double small = 0;
  [[nodiscard]] bool small_is_faster() const noexcept { return small > huge * 1.25; }
};

// Touches a huge page at `offset` and, if it is slow, more huge pages and small ones after it.
[[nodiscard]] PageRates probe_pages(const Touch& touch, std::size_t offset);

// Reads from the page of a file at `offset`. Returns whether it could.
using ReadPage = std::function<bool(std::uint64_t offset)>;

// Whether pages of the page cache are slow at the first touch. They were just read in by a device,
// so the host has them, but the virtual machine gets each with a fault of its own (about 5 us).
// Large folios come from memory that has been free for longer, so this hits them more often than
// small ones. Reads some pages of [offset, offset + bytes).
[[nodiscard]] bool pages_arrive_slowly(const ReadPage& read, std::uint64_t offset,
                                       std::uint64_t bytes);

// The number of pages of each size that one probe touches at most.
inline constexpr std::size_t kProbes = 3;
inline constexpr std::size_t kProbeBytes = kProbes * 2 * io::kHugePageBytes;

// Probes a block when it is made and, in a separate thread, while it fills. Gives the rest of the
// block small pages if these are faster.
class PageWatch {
 public:
  // The memory must outlive the watch and not move. Tests pass `touch` to set the rates.
  explicit PageWatch(const io::AnonymousMemory& memory, Touch touch = nullptr);
  PageWatch(const PageWatch&) = delete;
  PageWatch& operator=(const PageWatch&) = delete;
  ~PageWatch();

  // The kind of pages and the reason, as text. Any thread.
  [[nodiscard]] std::string reason() const;

  // Where the part that has small pages begins; the block's size if all pages are huge. Any thread.
  [[nodiscard]] std::size_t small_from() const noexcept { return small_from_.load(); }

 private:
  void run();
  // Returns whether the rest of the block has small pages now, from the first missing page on: the
  // load may be far behind a probe.
  bool probe(std::size_t offset);
  // The first huge page before `limit` that is not backed; `limit` if there is none.
  [[nodiscard]] std::size_t first_missing(std::size_t limit) const;
  // Waits until the load comes near to `at`, or is late and at most two sections away. Returns
  // false if it has ended.
  bool wait_for_load(std::size_t at);

  const io::AnonymousMemory& memory_;
  const Touch touch_;
  const pid_t process_;
  mutable Mutex mutex_;
  // On the heap, because a child of fork() must not destroy it (see ~PageWatch).
  std::unique_ptr<ConditionVariable> changed_ = std::make_unique<ConditionVariable>();
  bool stopped_ WL_GUARDED_BY(mutex_) = false;
  PageRates rates_ WL_GUARDED_BY(mutex_);
  std::atomic<std::size_t> small_from_;
  std::thread thread_;
};

}  // namespace weightlift::engine
