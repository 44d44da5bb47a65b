// A file's pages to work on where they lie in the page cache, instead of on copies of them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "io/file.h"
#include "io/mapping.h"

namespace weightlift::io {

// A mapping under a read lease (fcntl(2), F_SETLEASE): whoever wants to truncate the file or to
// write to it waits until the lease is given back, which the next hold() does that finds it asked
// for. So no page is taken away under a hold, which would be a SIGBUS. (After
// /proc/sys/fs/lease-break-time, 45 s, the kernel waits no longer: a hold takes a millisecond, but
// for a process that is stopped meanwhile.)
class LeasedMapping {
 public:
  // Null where there is no lease to be had: the file is another user's, or open for writing, or its
  // file system is not one of those where all who write must break the lease; or many are held.
  [[nodiscard]] static std::unique_ptr<LeasedMapping> open(const std::shared_ptr<const File>& file);
  LeasedMapping(const LeasedMapping&) = delete;
  LeasedMapping& operator=(const LeasedMapping&) = delete;
  ~LeasedMapping();

  // Some of the bytes, which can be read as long as it lives. Any thread.
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

  // [offset, offset + bytes), read in by now; without data where they must be read in the usual
  // way, since somebody waits for the file or a page cannot be read.
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
  FileDescriptor fd_;  // the lease is that of this open file, which nothing else uses
  std::shared_ptr<Mapping> mapping_;
  std::mutex mutex_;
  unsigned holds_ = 0;
  bool wanted_ = false;  // by somebody else
  // Bytes that holds had of each block. One that has been worked through is unmapped then, by its
  // last thread: at the end one thread would do it for all of the file.
  std::deque<std::atomic<std::uint64_t>> had_;
};

}  // namespace weightlift::io
