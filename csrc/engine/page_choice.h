// Huge or small pages for new memory, by what they cost now.
//
// Huge pages are several times cheaper where the machine has the memory. A virtual machine whose
// host takes free memory back (Linux, Documentation/mm/free_page_reporting.rst) gets it again page
// by page, at the first touch, and then huge pages are several times dearer than small ones. Which
// of the two holds can change within one block: what was freed last is backed still.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "io/anonymous_memory.h"

namespace weightlift::engine {

// Bytes a second at which [offset, offset + bytes) was backed; small pages where `small`.
using Touch = std::function<double(std::size_t offset, std::size_t bytes, bool small)>;

// Rates that were seen; of small pages 0 where huge ones were fast enough not to ask.
struct PageRates {
  double huge = 0;
  double small = 0;
  [[nodiscard]] bool small_is_faster() const noexcept { return small > huge * 1.25; }
};

// Touches a huge page at `offset` and, where it comes slowly, more of them and small ones behind.
[[nodiscard]] PageRates probe_pages(const Touch& touch, std::size_t offset);

// Pages of each size that one probe touches at most.
inline constexpr std::size_t kProbes = 3;
inline constexpr std::size_t kProbeBytes = kProbes * 2 * io::kHugePageBytes;

// Probes a block when it is made and, in a thread of its own, while it fills; gives the rest of it
// small pages where these come faster.
class PageWatch {
 public:
  // The memory outlives the watch and is not moved. Tests say by `touch` what pages cost.
  explicit PageWatch(const io::AnonymousMemory& memory, Touch touch = nullptr);
  PageWatch(const PageWatch&) = delete;
  PageWatch& operator=(const PageWatch&) = delete;
  ~PageWatch();

  // In words: which pages, and why. Any thread.
  [[nodiscard]] std::string reason() const;

 private:
  void run();
  // Whether small pages are taken from here on.
  bool probe(std::size_t offset);
  bool wait_until_backed(std::size_t offset);

  const io::AnonymousMemory& memory_;
  const Touch touch_;
  const pid_t process_;
  mutable std::mutex mutex_;
  // Its own block: a child of fork() never destroys it (see ~PageWatch).
  std::unique_ptr<std::condition_variable> changed_ = std::make_unique<std::condition_variable>();
  bool stopped_ = false;    // guarded by mutex_
  PageRates rates_;         // guarded by mutex_
  std::size_t small_from_;  // guarded by mutex_; the block's size where huge pages are used
  std::thread thread_;
};

}  // namespace weightlift::engine
