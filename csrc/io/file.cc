#include "io/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace weightlift::io {
namespace {

// One read(2) moves at most 0x7ffff000 bytes; asking for less keeps Ctrl-C responsive.
constexpr std::size_t kMaxRead = std::size_t{1} << 30;

std::int64_t modified_ns(const struct stat& status) noexcept {
  return std::int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
}

Error shrank(const std::string& path, std::uint64_t at) {
  return {.code = ErrorCode::kFileShrank,
          .message =
              "the file ends before the bytes that its header promises: it was truncated "
              "while it was being read; load it again once its writer is done",
          .path = path,
          .offset = at};
}

// A signal may end it where the file system waits for somebody (open(2), EINTR).
FileDescriptor open_file(const std::string& path, int flags) {
  int fd = 0;
  do {
    fd = ::open(path.c_str(), flags | O_RDONLY | O_CLOEXEC);
  } while (fd < 0 && errno == EINTR);
  return FileDescriptor(fd);
}

}  // namespace

Error system_error(int error_number, std::string path, const std::string& what) {
  ErrorCode code = ErrorCode::kReadFailed;
  if (error_number == ENOENT || error_number == ENOTDIR) code = ErrorCode::kNotFound;
  if (error_number == EACCES || error_number == EPERM) code = ErrorCode::kPermissionDenied;
  if (error_number == EISDIR) code = ErrorCode::kIsDirectory;
  if (error_number == ENOMEM) code = ErrorCode::kOutOfMemory;
  return {.code = code,
          .message = what + ": " + std::strerror(error_number),
          .path = std::move(path),
          .system_errno = error_number};
}

FileDescriptor::~FileDescriptor() {
  // Not retried on EINTR: Linux has released the number by then (close(2)).
  if (fd_ >= 0) ::close(fd_);
}

Result<std::shared_ptr<File>> File::open(const std::string& path) {
  if (path.find('\0') != std::string::npos) {
    return Error{.code = ErrorCode::kInvalidArgument,
                 .message = "the path holds a NUL character",
                 .path = path};
  }
  // O_NONBLOCK: opening a FIFO would wait for a writer (open(2)); regular files ignore it.
  FileDescriptor fd = open_file(path, O_NONBLOCK);
  if (fd.get() < 0) return system_error(errno, path, "cannot open");
  struct stat status{};
  if (::fstat(fd.get(), &status) != 0) return system_error(errno, path, "cannot stat");
  if (S_ISDIR(status.st_mode)) {
    return Error{.code = ErrorCode::kIsDirectory,
                 .message = "is a directory: name the file in it",
                 .path = path,
                 .system_errno = EISDIR};
  }
  if (!S_ISREG(status.st_mode)) {
    return Error{
        .code = ErrorCode::kNotRegularFile,
        .message = "is no regular file (a pipe, socket or device): copy it to a file first",
        .path = path,
        .system_errno = EINVAL};
  }
  auto file = std::shared_ptr<File>(new File(std::move(fd), path));
  file->size_ = static_cast<std::uint64_t>(status.st_size);
  file->inode_ = status.st_ino;
  file->device_ = status.st_dev;
  file->modified_ns_ = modified_ns(status);
  return file;
}

Status File::read_exact(std::uint64_t offset, std::span<std::byte> target) const {
  std::size_t done = 0;
  while (done < target.size()) {
    const ssize_t got =
        ::pread(fd_.get(), target.data() + done, std::min(target.size() - done, kMaxRead),
                static_cast<off_t>(offset + done));
    if (got > 0) {
      done += static_cast<std::size_t>(got);
    } else if (got == 0) {
      return shrank(path_, offset + done);
    } else if (errno != EINTR) {
      Error error = system_error(errno, path_, "cannot read");
      error.offset = offset + done;
      return error;
    }
  }
  return {};
}

Status File::check_unchanged() const {
  struct stat status{};
  if (::fstat(fd_.get(), &status) != 0) return system_error(errno, path_, "cannot stat");
  const auto size = static_cast<std::uint64_t>(status.st_size);
  if (size < size_) return shrank(path_, size);
  if (size != size_ || status.st_ino != inode_ || status.st_dev != device_ ||
      modified_ns(status) != modified_ns_) {
    return Error{.code = ErrorCode::kFileChanged,
                 .message =
                     "the file was written to while it was being read, so old and new bytes "
                     "may be mixed; load it again once its writer is done",
                 .path = path_};
  }
  return {};
}

FileDescriptor File::reopened(int flags) const {
  return open_file("/proc/self/fd/" + std::to_string(descriptor()), flags);  // proc(5)
}

void File::advise_sequential() const noexcept {
  ::posix_fadvise(fd_.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
}

Result<std::unique_ptr<DirectFile>> DirectFile::open(std::shared_ptr<const File> file) {
  FileDescriptor fd = file->reopened(O_DIRECT);
  if (fd.get() < 0) return system_error(errno, file->path(), "direct I/O refused");
  std::uint32_t alignment = 4096;
#ifdef STATX_DIOALIGN
  struct statx status{};
  if (::statx(fd.get(), "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
      (status.stx_mask & STATX_DIOALIGN) != 0) {
    if (status.stx_dio_offset_align == 0) {
      return system_error(EINVAL, file->path(), "direct I/O refused by the file system");
    }
    alignment = std::max({alignment, status.stx_dio_offset_align, status.stx_dio_mem_align});
  }
#endif
  return std::unique_ptr<DirectFile>(new DirectFile(std::move(fd), std::move(file), alignment));
}

Status DirectFile::read(std::uint64_t offset, std::span<std::byte> target,
                        std::uint64_t needed) const {
  std::uint64_t done = 0;
  while (done < needed) {
    const ssize_t got = ::pread(fd_.get(), target.data() + done, target.size() - done,
                                static_cast<off_t>(offset + done));
    if (got > 0) {
      const std::uint64_t now = done + static_cast<std::uint64_t>(got);
      if (now >= needed) return {};
      // Only whole blocks can be built on: the next read must be aligned again.
      const std::uint64_t aligned = now / alignment_ * alignment_;
      if (aligned == done) return shrank(file_->path(), offset + now);
      done = aligned;
    } else if (got == 0) {
      return shrank(file_->path(), offset + done);
    } else if (errno != EINTR) {
      Error error = system_error(errno, file_->path(), "cannot read past the page cache");
      error.offset = offset + done;
      return error;
    }
  }
  return {};
}

}  // namespace weightlift::io
