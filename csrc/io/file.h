// Regular files, opened for reading: exact reads, direct reads, and whether they have changed.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "result.h"

struct stat;

namespace weightlift::io {

class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) noexcept : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&&) = delete;
  ~FileDescriptor();

  [[nodiscard]] int get() const noexcept { return fd_; }

 private:
  int fd_ = -1;
};

// ReadError for errno after a failed call on `path`.
[[nodiscard]] Error system_error(int error_number, std::string path, const std::string& what);

// What a file is, whatever its name leads to by now.
struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;

  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

// A descriptor that is closed while nobody uses it and many others are open, and opened again when
// it is wanted: a checkpoint may have more files than a process may have descriptors (getrlimit(2),
// RLIMIT_NOFILE). How many are kept does not grow with the number of files. Any thread.
class PooledDescriptor {
 public:
  // Open as long as it lives.
  using Handle = std::shared_ptr<const FileDescriptor>;

  // `path` is opened again with `flags`, and must still be the file that `fd` is.
  PooledDescriptor(FileDescriptor fd, std::string path, int flags, FileIdentity identity);
  PooledDescriptor(const PooledDescriptor&) = delete;
  PooledDescriptor& operator=(const PooledDescriptor&) = delete;
  ~PooledDescriptor();

  // kFileChanged where the name has been given to another file since.
  [[nodiscard]] Result<Handle> acquire() const;
  // Without opening it: null where it is closed at the moment.
  [[nodiscard]] Handle if_open() const;
  // Not to be closed: it could not be opened again by its name.
  void keep() noexcept { keep_ = true; }
  [[nodiscard]] const std::string& path() const noexcept { return path_; }

 private:
  friend class DescriptorPool;

  std::string path_;  // absolute: the working directory may change
  int flags_;
  FileIdentity identity_;
  bool keep_ = false;
  // The pool's: those that are open, the one that was opened first in front.
  mutable std::shared_ptr<const FileDescriptor> fd_;
  mutable const PooledDescriptor* previous_ = nullptr;
  mutable const PooledDescriptor* next_ = nullptr;
};

// How many descriptors of one kind may stay open in this process, however many files there are;
// `wanted` of them are.
[[nodiscard]] std::size_t descriptor_limit(std::size_t wanted) noexcept;

class Mapping;

class File {
 public:
  // Refuses a FIFO or a device before it is read, and does not wait for one. Waits where another
  // process holds a lease on the file (fcntl(2), F_SETLEASE) until that is given back.
  [[nodiscard]] static Result<std::shared_ptr<File>> open(const std::string& path);

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] std::uint64_t size() const noexcept { return size_; }
  // (device, inode)
  [[nodiscard]] std::pair<dev_t, ino_t> identity() const noexcept {
    return {identity_.device, identity_.inode};
  }
  // For a system call on it.
  [[nodiscard]] Result<PooledDescriptor::Handle> descriptor() const { return fd_->acquire(); }

  // Fills `target` from `offset` on; interrupted and short reads are continued. kFileShrank where
  // the file has ended meanwhile.
  [[nodiscard]] Status read_exact(std::uint64_t offset, std::span<std::byte> target) const;
  // The same for what tells where tensors lie. It is remembered by its hash. Not while other
  // threads do the same.
  [[nodiscard]] Status read_index(std::uint64_t offset, std::span<std::byte> target);

  enum class Change : std::uint8_t {
    kNone,
    // No more than the time of the last modification; read_index() finds what it found. Once
    // tensors were handed out, one that was set as no write sets it.
    kTime,
  };
  // Compares size, inode and modification time with those at open: a file that was rewritten
  // during the load may have given a mixture of old and new bytes. kFileShrank, kFileChanged.
  [[nodiscard]] Result<Change> check_unchanged() const;
  // The modification time that check_unchanged() saw is from here on the one to compare with.
  void accept_time() const noexcept { modified_ns_ = seen_ns_.load(); }
  // Tensors of it have been handed out: from here on a time that a write may have set is an error,
  // since later reads may be of other bytes than these.
  void mark_delivered() const noexcept { delivered_ = true; }

  // The very file again, also where its name has been given to another one since; no descriptor
  // (and errno) where that is refused.
  [[nodiscard]] FileDescriptor reopened(int flags) const;
  [[nodiscard]] FileIdentity file_identity() const noexcept { return identity_; }
  [[nodiscard]] const std::string& absolute_path() const noexcept { return fd_->path(); }

  // Asks the kernel for its largest read-ahead window (posix_fadvise(2), SEQUENTIAL).
  void advise_sequential() const noexcept;

 private:
  struct IndexRange {
    std::uint64_t offset;
    std::uint64_t bytes;
    std::uint64_t hash;
  };

  File(FileDescriptor fd, std::string path, const struct stat& status);
  // Of the open file, or of what its name leads to if that is the same file; false where there is
  // nothing to look at.
  [[nodiscard]] bool status_now(struct stat& status) const;
  [[nodiscard]] bool same_index() const;

  std::string path_;
  std::uint64_t size_;
  FileIdentity identity_;
  mutable std::atomic<std::int64_t> modified_ns_;
  mutable std::atomic<std::int64_t> seen_ns_;  // by check_unchanged()
  mutable std::atomic<bool> delivered_ = false;
  std::vector<IndexRange> index_;
  std::unique_ptr<PooledDescriptor> fd_;
};

// The same file past the page cache (O_DIRECT).
class DirectFile {
 public:
  [[nodiscard]] static Result<std::unique_ptr<DirectFile>> open(std::shared_ptr<const File> file);

  // What offsets, lengths and addresses must be multiples of, from statx(2) STATX_DIOALIGN.
  [[nodiscard]] std::uint32_t alignment() const noexcept { return alignment_; }

  // Reads [offset, offset + target.size()), all aligned, of which the first `needed` bytes must
  // exist; the rest may lie past the end of the file.
  [[nodiscard]] Status read(std::uint64_t offset, std::span<std::byte> target,
                            std::uint64_t needed) const;

 private:
  DirectFile(FileDescriptor fd, std::shared_ptr<const File> file, std::uint32_t alignment);

  std::shared_ptr<const File> file_;
  PooledDescriptor fd_;
  std::uint32_t alignment_;
};

}  // namespace weightlift::io
