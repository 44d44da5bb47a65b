// Regular files opened for reading: exact reads, direct reads, and the detection of changes.
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

// The error for errno after a failed call on `path`. `what` says what failed.
[[nodiscard]] Error system_error(int error_number, std::string path, const std::string& what);

// Identifies a file, even if its name leads to another file now.
struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;

  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

// A descriptor that may be closed while it is unused and many others are open, and is opened again
// at the next use: a checkpoint may have more files than a process may have descriptors
// (getrlimit(2), RLIMIT_NOFILE). The number of descriptors that are kept open does not grow with
// the number of files. Any thread may call its methods.
class PooledDescriptor {
 public:
  // The descriptor stays open as long as the handle lives.
  using Handle = std::shared_ptr<const FileDescriptor>;

  // To open the file again, `path` is opened with `flags` and must then be the same file as `fd`.
  PooledDescriptor(FileDescriptor fd, const std::string& path, int flags, FileIdentity identity);
  PooledDescriptor(const PooledDescriptor&) = delete;
  PooledDescriptor& operator=(const PooledDescriptor&) = delete;
  ~PooledDescriptor();

  // kFileChanged if the name now belongs to another file.
  [[nodiscard]] Result<Handle> acquire() const;
  // Does not open the file: null if it is closed at the moment.
  [[nodiscard]] Handle if_open() const;
  // Keeps the descriptor open, for a file that cannot be opened again by its name.
  void keep() noexcept { keep_ = true; }
  [[nodiscard]] const std::string& path() const noexcept { return path_; }

 private:
  friend class DescriptorPool;

  std::string path_;  // absolute: the working directory may change
  int flags_;
  FileIdentity identity_;
  bool keep_ = false;
  // The pool's list of open descriptors, in the order in which they were opened.
  mutable std::shared_ptr<const FileDescriptor> fd_;
  mutable const PooledDescriptor* previous_ = nullptr;
  mutable const PooledDescriptor* next_ = nullptr;
};

// How many descriptors of one kind may stay open in this process, whatever the number of files.
// `wanted` is the number that the caller would like to have open.
[[nodiscard]] std::size_t descriptor_limit(std::size_t wanted) noexcept;

class Mapping;

class File {
 public:
  // Refuses a FIFO or a device without reading or waiting. If another process holds a lease on the
  // file (fcntl(2), F_SETLEASE), waits until the lease is returned.
  [[nodiscard]] static Result<std::shared_ptr<File>> open(const std::string& path);

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] std::uint64_t size() const noexcept { return size_; }
  // (device, inode)
  [[nodiscard]] std::pair<dev_t, ino_t> identity() const noexcept {
    return {identity_.device, identity_.inode};
  }
  // For system calls on the file.
  [[nodiscard]] Result<PooledDescriptor::Handle> descriptor() const { return fd_->acquire(); }

  // Fills `target` from `offset` on; continues interrupted and short reads. kFileShrank if the file
  // ends before that.
  [[nodiscard]] Status read_exact(std::uint64_t offset, std::span<std::byte> target) const;
  // The same for bytes that say where tensors lie (headers, directories). Keeps their hash, so that
  // check_unchanged() can read them again and compare. One thread at a time.
  [[nodiscard]] Status read_index(std::uint64_t offset, std::span<std::byte> target);

  enum class Change : std::uint8_t {
    kNone,
    // Only the modification time differs, and what read_index() read is the same. After
    // mark_delivered() also: the new time is one that no write can have set.
    kTime,
  };
  // Compares size, inode and modification time with those at open: if the file was rewritten during
  // the load, old and new bytes may be mixed. kFileShrank, kFileChanged.
  [[nodiscard]] Result<Change> check_unchanged() const;
  // From now on, check_unchanged() compares with the modification time that it saw last.
  void accept_time() const noexcept { modified_ns_ = seen_ns_.load(); }
  // Tensors of the file have been handed out. From now on, a modification time that a write may
  // have set is an error, because later reads may return other bytes.
  void mark_delivered() const noexcept { delivered_ = true; }

  // Opens the same file again, even if its name now belongs to another file. Returns no descriptor,
  // and sets errno, if the system refuses.
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
  // Stats the open file, or the file of that name if it is the same one. Returns false if neither
  // exists.
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

// The same file, read without the page cache (O_DIRECT).
class DirectFile {
 public:
  [[nodiscard]] static Result<std::unique_ptr<DirectFile>> open(std::shared_ptr<const File> file);

  // Offsets, lengths and addresses must be multiples of this, by statx(2) STATX_DIOALIGN.
  [[nodiscard]] std::uint32_t alignment() const noexcept { return alignment_; }

  // Reads [offset, offset + target.size()), all of it aligned. The first `needed` bytes must exist;
  // the rest may lie past the end of the file.
  [[nodiscard]] Status read(std::uint64_t offset, std::span<std::byte> target,
                            std::uint64_t needed) const;

 private:
  DirectFile(FileDescriptor fd, std::shared_ptr<const File> file, std::uint32_t alignment);

  std::shared_ptr<const File> file_;
  PooledDescriptor fd_;
  std::uint32_t alignment_;
};

}  // namespace weightlift::io
