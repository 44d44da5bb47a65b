// Regular files, opened for reading: exact reads, direct reads, and whether they have changed.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "result.h"

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

class Mapping;

class File {
 public:
  // Never blocks: a FIFO or a device is refused before it is read.
  [[nodiscard]] static Result<std::shared_ptr<File>> open(const std::string& path);

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] std::uint64_t size() const noexcept { return size_; }
  [[nodiscard]] int descriptor() const noexcept { return fd_.get(); }
  // (device, inode): which file this is, whatever its name leads to by now.
  [[nodiscard]] std::pair<dev_t, ino_t> identity() const noexcept { return {device_, inode_}; }

  // Fills `target` from `offset` on; interrupted and short reads are continued. kFileShrank where
  // the file has ended meanwhile.
  [[nodiscard]] Status read_exact(std::uint64_t offset, std::span<std::byte> target) const;

  // Compares size, modification time and inode with those at open: a file that was rewritten
  // during the load may have given a mixture of old and new bytes.
  [[nodiscard]] Status check_unchanged() const;

  // The very file again, also where its name has been given to another one since; no descriptor
  // (and errno) where that is refused.
  [[nodiscard]] FileDescriptor reopened(int flags) const;

  // Asks the kernel for its largest read-ahead window (posix_fadvise(2), SEQUENTIAL).
  void advise_sequential() const noexcept;

 private:
  File(FileDescriptor fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}

  FileDescriptor fd_;
  std::string path_;
  std::uint64_t size_ = 0;
  ino_t inode_ = 0;
  dev_t device_ = 0;
  std::int64_t modified_ns_ = 0;
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
  DirectFile(FileDescriptor fd, std::shared_ptr<const File> file, std::uint32_t alignment)
      : fd_(std::move(fd)), file_(std::move(file)), alignment_(alignment) {}

  FileDescriptor fd_;
  std::shared_ptr<const File> file_;
  std::uint32_t alignment_;
};

}  // namespace weightlift::io
