// Access to a file's pages in the page cache itself, instead of to copies of them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>

#include "io/file.h"
#include "io/mapping.h"
#include "mutex.h"

namespace weightlift::io {

// A mapping under a read lease (fcntl(2), F_SETLEASE). A process that wants to truncate the file or
// to write to it waits until the lease is returned, and the next hold() returns it. So no page
// disappears under a hold, which would raise SIGBUS. (After /proc/sys/fs/lease-break-time, 45 s by
// default, the kernel stops waiting. A hold lasts about a millisecond, unless the process is
// stopped meanwhile.)
class LeasedMapping {
 public:
  // Null if no lease can be had: the file belongs to another user or is open for writing, its file
  // system is not one on which every writer must break the lease, or too many leases are held.
  [[nodiscard]] static std::unique_ptr<LeasedMapping> open(const std::shared_ptr<const File>& file);
  LeasedMapping(const LeasedMapping&) = delete;
  LeasedMapping& operator=(const LeasedMapping&) = delete;
  ~LeasedMapping();

  // Some of the bytes, which can be read as long as the hold lives. Any thread.
  class Hold {
   public:
    Hold() = default;
    Hold(Hold&& other) noexcept;
    Hold& operator=(Hold&& other) noexcept;
    ~Hold();
    [[nodiscard]] const std::byte* data() const noexcept { return data_; }

   private:
    friend class LeasedMapping;
    Hold(LeasedMapping& of, std::uint64_t offset, std::uint64_t bytes) noexcept;

    LeasedMapping* of_ = nullptr;
    const std::byte* data_ = nullptr;
    std::uint64_t offset_ = 0;
    std::uint64_t bytes_ = 0;
  };

  // Reads the pages of [offset, offset + bytes) in and holds them. The hold has no data if somebody
  // waits for the file or a page cannot be read: then use read(2).
  [[nodiscard]] Hold hold(std::uint64_t offset, std::uint64_t bytes);

 private:
  // One of the descriptors that may hold leases at a time (descriptor_limit()).
  class Place {
   public:
    static Place take() noexcept;
    Place(Place&& other) noexcept : taken_(std::exchange(other.taken_, false)) {}
    Place& operator=(Place&&) = delete;
    ~Place();
    [[nodiscard]] bool taken() const noexcept { return taken_; }

   private:
    explicit Place(bool taken) noexcept : taken_(taken) {}
    bool taken_;
  };

  LeasedMapping(Place place, FileDescriptor fd, std::shared_ptr<Mapping> mapping,
                std::uint64_t bytes);
  void release(const Hold& hold) noexcept;
  void give_back() noexcept;

  Place place_;
  FileDescriptor fd_;  // owns the lease; nothing else uses this open file
  std::shared_ptr<Mapping> mapping_;
  Mutex mutex_;
  unsigned holds_ WL_GUARDED_BY(mutex_) = 0;
  bool wanted_ WL_GUARDED_BY(mutex_) = false;  // another process waits for the lease
  // For each block, the bytes that were held so far. The thread that completes a block unmaps it;
  // otherwise one thread would unmap the whole file at the end.
  std::deque<std::atomic<std::uint64_t>> had_;
};

}  // namespace weightlift::io
