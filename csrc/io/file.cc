#include "io/file.h"

#include <fcntl.h>
#include <linux/stat.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "mutex.h"
#include "result.h"

namespace weightlift::io {
namespace {

// One read(2) moves at most 0x7ffff000 bytes; smaller reads keep Ctrl-C responsive.
constexpr std::size_t kMaxRead = std::size_t{1} << 30;

std::int64_t modified_ns(const struct stat& status) noexcept {
  return std::int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
}

Error shrank(const std::string& path, std::uint64_t at) {
  return {.code = ErrorCode::kFileShrank,
          .message =
              "the file ends before the last bytes that its header describes: it was truncated "
              "while it was read; load it again when its writer has finished",
          .path = path,
          .offset = at};
}

// A signal may interrupt open(2) on a slow file system (EINTR).
FileDescriptor open_path(const std::string& path, int flags) {
  int fd = 0;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC | O_NOCTTY);
  } while (fd < 0 && errno == EINTR);
  return FileDescriptor(fd);
}

std::string path_of(int descriptor) {
  return "/proc/self/fd/" + std::to_string(descriptor);  // proc(5)
}

// O_NONBLOCK, because opening a FIFO would otherwise wait for a writer. Regular files ignore the
// flag, unless another process holds a lease on them. Then open(2) fails with EWOULDBLOCK, and
// without the flag it waits for the lease. So the second try has no flag, after an O_PATH
// descriptor has shown that the file is a regular one.
FileDescriptor open_file(const std::string& path, int flags) {
  FileDescriptor fd = open_path(path, flags | O_RDONLY | O_NONBLOCK);
  if (fd.get() >= 0 || errno != EWOULDBLOCK) return fd;
  const FileDescriptor name = open_path(path, O_PATH);
  struct stat status{};
  if (name.get() < 0 || ::fstat(name.get(), &status) != 0 || !S_ISREG(status.st_mode)) {
    errno = EWOULDBLOCK;
    return FileDescriptor();
  }
  FileDescriptor waited = open_path(path_of(name.get()), flags | O_RDONLY);
  if (waited.get() >= 0 || errno != ENOENT) return waited;
  return open_path(path, flags | O_RDONLY);  // without /proc
}

std::uint64_t hash_of(std::span<const std::byte> bytes) noexcept {
  std::uint64_t hash = bytes.size();
  const auto mix = [&hash](std::uint64_t word) {
    hash = (hash ^ word) * 0x9e37'79b9'7f4a'7c15;
    hash ^= hash >> 29;
  };
  std::size_t at = 0;
  for (; bytes.size() - at >= sizeof(std::uint64_t); at += sizeof(std::uint64_t)) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, sizeof word);
    mix(word);
  }
  for (; at < bytes.size(); ++at) mix(static_cast<std::uint64_t>(bytes[at]));
  return hash;
}

std::string absolute(const std::string& path) {
  if (path.starts_with('/')) return path;
  char* const folder = ::getcwd(nullptr, 0);
  if (folder == nullptr) return path;
  std::string result = std::string(folder) + "/" + path;
  std::free(folder);  // NOLINT(*no-malloc)
  return result;
}

FileIdentity identity_of(const struct stat& status) noexcept {
  return {.device = status.st_dev, .inode = status.st_ino};
}

Error changed(const std::string& path, std::string message) {
  return {.code = ErrorCode::kFileChanged, .message = std::move(message), .path = path};
}

}  // namespace

Error system_error(int error_number, std::string path, const std::string& what) {
  ErrorCode code = ErrorCode::kReadFailed;
  if (error_number == ENOENT || error_number == ENOTDIR) code = ErrorCode::kNotFound;
  if (error_number == EACCES || error_number == EPERM) code = ErrorCode::kPermissionDenied;
  if (error_number == EISDIR) code = ErrorCode::kIsDirectory;
  if (error_number == ENOMEM) code = ErrorCode::kOutOfMemory;
  std::string message = what + ": " + std::strerror(error_number);
  if (error_number == EMFILE) {
    message += ": this process has no file descriptors left; raise the limit with `ulimit -n`";
  }
  return {.code = code,
          .message = std::move(message),
          .path = std::move(path),
          .system_errno = error_number};
}

FileDescriptor::~FileDescriptor() {
  // No retry after EINTR: Linux has released the descriptor by then (close(2)).
  if (fd_ >= 0) ::close(fd_);
}

// --- PooledDescriptor ----------------------------------------------------------------------------

// One mutex for all descriptors. It is held only briefly: open(2) and close(2), which may wait for
// a server, are called without it. A child that is forked meanwhile gets it unlocked.
class DescriptorPool {
 public:
  static DescriptorPool& instance() {
    static auto* const pool =
        new DescriptorPool();  // never destroyed: threads may outlive static objects
    return *pool;
  }

  PooledDescriptor::Handle get(const PooledDescriptor& of) {
    const MutexLock lock(mutex_);
    return of.fd_;
  }

  // Keeps a newly opened descriptor, or the one of another thread that was faster.
  PooledDescriptor::Handle add(const PooledDescriptor& of, PooledDescriptor::Handle fd) {
    Closing closing;
    PooledDescriptor::Handle kept;
    {
      const MutexLock lock(mutex_);
      if (of.fd_ == nullptr) {
        of.fd_ = std::move(fd);
        link(of);
      }
      kept = of.fd_;
      collect(descriptor_limit(count_), closing);
    }
    return kept;
  }

  void remove(const PooledDescriptor& of) {
    PooledDescriptor::Handle last;
    const MutexLock lock(mutex_);
    if (of.fd_ != nullptr) unlink(of);
    last.swap(of.fd_);
  }

  // Closes all unused descriptors, when the process has none left.
  void close_idle() {
    Closing closing;
    const MutexLock lock(mutex_);
    collect(0, closing);
  }

 private:
  using Closing = std::vector<PooledDescriptor::Handle>;

  DescriptorPool() {
    ::pthread_atfork([] { instance().mutex_.lock_for_fork(); },
                     [] { instance().mutex_.unlock_after_fork(); },
                     [] { instance().mutex_.unlock_after_fork(); });
  }

  void link(const PooledDescriptor& of) noexcept WL_REQUIRES(mutex_) {
    of.previous_ = last_;
    of.next_ = nullptr;
    (last_ != nullptr ? last_->next_ : first_) = &of;
    last_ = &of;
    ++count_;
  }

  void unlink(const PooledDescriptor& of) noexcept WL_REQUIRES(mutex_) {
    (of.previous_ != nullptr ? of.previous_->next_ : first_) = of.next_;
    (of.next_ != nullptr ? of.next_->previous_ : last_) = of.previous_;
    --count_;
  }

  // Handles are copied either under the mutex or from a handle that is in use. So a descriptor with
  // one owner is unused, and stays so while the mutex is held.
  void collect(std::size_t most, Closing& closing) WL_REQUIRES(mutex_) {
    for (const PooledDescriptor* at = first_; at != nullptr && count_ > most;) {
      const PooledDescriptor& one = *std::exchange(at, at->next_);
      if (one.keep_ || one.fd_.use_count() > 1) continue;
      unlink(one);
      closing.push_back(std::move(one.fd_));
      one.fd_.reset();
    }
  }

  Mutex mutex_;
  const PooledDescriptor* first_ WL_GUARDED_BY(mutex_) = nullptr;
  const PooledDescriptor* last_ WL_GUARDED_BY(mutex_) = nullptr;
  std::size_t count_ WL_GUARDED_BY(mutex_) = 0;
};

namespace {

FileDescriptor open_with_room(const std::string& path, int flags) {
  {
    FileDescriptor fd = open_file(path, flags);
    // The analyzer does not see that a negative descriptor is from an open(2) that failed.
    // NOLINTNEXTLINE(clang-analyzer-unix.Errno)
    if (fd.get() >= 0 || (errno != EMFILE && errno != ENFILE)) return fd;
  }
  DescriptorPool::instance().close_idle();
  return open_file(path, flags);
}

}  // namespace

std::size_t descriptor_limit(std::size_t wanted) noexcept {
  constexpr rlim_t kFewest = 4;
  constexpr rlim_t kMost = 64;
  constexpr rlim_t kShare = 8;  // the rest is left to the application
  // getrlimit(2) is called only when the known limit is reached, not for each file. If the limit is
  // lowered later, open(2) fails with EMFILE, and all unused descriptors are closed.
  static std::atomic<rlim_t> known{kFewest};
  const rlim_t last = known.load(std::memory_order_relaxed);
  if (wanted <= last || last == kMost) return last;
  struct rlimit allowed{};
  if (::getrlimit(RLIMIT_NOFILE, &allowed) != 0) return last;
  const rlim_t found = std::clamp(allowed.rlim_cur / kShare, kFewest, kMost);
  known.store(found, std::memory_order_relaxed);
  return found;
}

PooledDescriptor::PooledDescriptor(FileDescriptor fd, const std::string& path, int flags,
                                   FileIdentity identity)
    : path_(absolute(path)), flags_(flags), identity_(identity) {
  DescriptorPool::instance().add(*this, std::make_shared<const FileDescriptor>(std::move(fd)));
}

PooledDescriptor::~PooledDescriptor() {
  DescriptorPool::instance().remove(*this);
}

PooledDescriptor::Handle PooledDescriptor::if_open() const {
  return DescriptorPool::instance().get(*this);
}

Result<PooledDescriptor::Handle> PooledDescriptor::acquire() const {
  if (Handle fd = if_open()) return fd;
  FileDescriptor fd = open_with_room(path_, flags_);
  if (fd.get() < 0) return system_error(errno, path_, "cannot open the file again");
  struct stat status{};
  if (::fstat(fd.get(), &status) != 0) return system_error(errno, path_, "cannot stat the file");
  if (identity_of(status) != identity_) {
    return changed(
        path_,
        "another file has this name since the checkpoint was opened: open the checkpoint "
        "again");
  }
  return DescriptorPool::instance().add(*this,
                                        std::make_shared<const FileDescriptor>(std::move(fd)));
}

// --- File ----------------------------------------------------------------------------------------

Result<std::shared_ptr<File>> File::open(const std::string& path) {
  if (path.find('\0') != std::string::npos) {
    return Error{.code = ErrorCode::kInvalidArgument,
                 .message = "the path contains a NUL character: give a path without it",
                 .path = path};
  }
  FileDescriptor fd = open_with_room(path, 0);
  if (fd.get() < 0) return system_error(errno, path, "cannot open the file");
  struct stat status{};
  if (::fstat(fd.get(), &status) != 0) return system_error(errno, path, "cannot stat the file");
  if (S_ISDIR(status.st_mode)) {
    return Error{
        .code = ErrorCode::kIsDirectory,
        .message =
            "is a directory: give a file in it, or use load_checkpoint, which reads directories",
        .path = path,
        .system_errno = EISDIR};
  }
  if (!S_ISREG(status.st_mode)) {
    return Error{
        .code = ErrorCode::kNotRegularFile,
        .message =
            "is not a regular file (but a pipe, socket or device): copy its bytes to a file first",
        .path = path,
        .system_errno = EINVAL};
  }
  return std::shared_ptr<File>(new File(std::move(fd), path, status));
}

File::File(FileDescriptor fd, std::string path, const struct stat& status)
    : path_(std::move(path)),
      size_(static_cast<std::uint64_t>(status.st_size)),
      identity_(identity_of(status)),
      modified_ns_(modified_ns(status)),
      seen_ns_(modified_ns(status)),
      fd_(std::make_unique<PooledDescriptor>(std::move(fd), path_, 0, identity_)) {
  // Files that cannot be opened again by name: unlinked files, files in memory (memfd_create(2)),
  // and paths that stand for an open descriptor.
  const std::string& name = fd_->path();
  if (status.st_nlink == 0 || name.starts_with("/proc/") || name.starts_with("/dev/fd/"))
    fd_->keep();
}

Status File::read_exact(std::uint64_t offset, std::span<std::byte> target) const {
  WL_ASSIGN_OR_RETURN(const PooledDescriptor::Handle fd, descriptor());
  std::size_t done = 0;
  while (done < target.size()) {
    const ssize_t got =
        ::pread(fd->get(), target.data() + done, std::min(target.size() - done, kMaxRead),
                static_cast<off_t>(offset + done));
    if (got > 0) {
      done += static_cast<std::size_t>(got);
    } else if (got == 0) {
      return shrank(path_, offset + done);
    } else if (errno != EINTR) {
      Error error = system_error(errno, path_, "cannot read the file");
      error.offset = offset + done;
      return error;
    }
  }
  return {};
}

Status File::read_index(std::uint64_t offset, std::span<std::byte> target) {
  WL_RETURN_IF_ERROR(read_exact(offset, target));
  index_.push_back({.offset = offset, .bytes = target.size(), .hash = hash_of(target)});
  return {};
}

bool File::same_index() const {
  std::vector<std::byte> now;
  for (const IndexRange& range : index_) {
    now.resize(range.bytes);
    if (!read_exact(range.offset, now).ok() || hash_of(now) != range.hash) return false;
  }
  return true;
}

bool File::status_now(struct stat& status) const {
  if (const PooledDescriptor::Handle fd = fd_->if_open()) return ::fstat(fd->get(), &status) == 0;
  // A closed file that has lost its name cannot be examined; replacing a name does not write into
  // the file.
  return ::stat(fd_->path().c_str(), &status) == 0 && identity_of(status) == identity_;
}

Result<File::Change> File::check_unchanged() const {
  struct stat status{};
  if (!status_now(status)) return Change::kNone;
  const auto size = static_cast<std::uint64_t>(status.st_size);
  if (size < size_) return shrank(path_, size);
  constexpr const char* kMixed =
      "the file was written to while it was read, so old and new bytes may be mixed; load it again "
      "when its writer has finished";
  if (size != size_ || identity_of(status) != identity_) return changed(path_, kMixed);
  if (modified_ns(status) == modified_ns_) return Change::kNone;
  seen_ns_ = modified_ns(status);
  if (!same_index()) return changed(path_, kMixed);
  // A write sets the times of modification and of status change to the same value, as touch(1)
  // does; utimensat(2) can set any modification time. The access time is of no use: a read in the
  // same clock tick sets it to the same value.
  if (delivered_ && status.st_mtim.tv_sec == status.st_ctim.tv_sec &&
      status.st_mtim.tv_nsec == status.st_ctim.tv_nsec) {
    return changed(
        path_,
        "the file was written to after it was opened, or its modification time suggests so; "
        "open it again when its writer has finished");
  }
  return Change::kTime;
}

FileDescriptor File::reopened(int flags) const {
  const auto fd = descriptor();
  if (!fd.ok()) {
    errno = fd.error().system_errno != 0 ? fd.error().system_errno : ESTALE;
    return FileDescriptor();
  }
  FileDescriptor same = open_file(path_of((*fd)->get()), flags);
  if (same.get() >= 0 || (errno != ENOENT && errno != EACCES && errno != EPERM)) return same;
  // There is no /proc, or this process may not use it.
  FileDescriptor named = open_file(fd_->path(), flags);
  struct stat status{};
  if (named.get() < 0) return named;
  if (::fstat(named.get(), &status) == 0 && identity_of(status) == identity_) return named;
  errno = ESTALE;
  return FileDescriptor();
}

void File::advise_sequential() const noexcept {
  const auto fd = descriptor();
  if (fd.ok()) ::posix_fadvise((*fd)->get(), 0, 0, POSIX_FADV_SEQUENTIAL);
}

// --- DirectFile ----------------------------------------------------------------------------------

Result<std::unique_ptr<DirectFile>> DirectFile::open(std::shared_ptr<const File> file) {
  FileDescriptor fd = file->reopened(O_DIRECT);
  if (fd.get() < 0) return system_error(errno, file->path(), "cannot open the file for direct I/O");
  std::uint32_t alignment = 4096;
#ifdef STATX_DIOALIGN
  struct statx status{};
  if (::statx(fd.get(), "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
      (status.stx_mask & STATX_DIOALIGN) != 0) {
    if (status.stx_dio_offset_align == 0) {
      return system_error(EINVAL, file->path(), "the file system has no direct I/O for this file");
    }
    alignment = std::max({alignment, status.stx_dio_offset_align, status.stx_dio_mem_align});
  }
#endif
  return std::unique_ptr<DirectFile>(new DirectFile(std::move(fd), std::move(file), alignment));
}

DirectFile::DirectFile(FileDescriptor fd, std::shared_ptr<const File> file, std::uint32_t alignment)
    : file_(std::move(file)),
      fd_(std::move(fd), file_->absolute_path(), O_DIRECT, file_->file_identity()),
      alignment_(alignment) {}

Status DirectFile::read(std::uint64_t offset, std::span<std::byte> target,
                        std::uint64_t needed) const {
  WL_ASSIGN_OR_RETURN(const PooledDescriptor::Handle fd, fd_.acquire());
  std::uint64_t done = 0;
  while (done < needed) {
    const ssize_t got = ::pread(fd->get(), target.data() + done, target.size() - done,
                                static_cast<off_t>(offset + done));
    if (got > 0) {
      const std::uint64_t now = done + static_cast<std::uint64_t>(got);
      if (now >= needed) return {};
      // The next read must be aligned again, so a partial block is read again.
      const std::uint64_t aligned = now / alignment_ * alignment_;
      if (aligned == done) return shrank(file_->path(), offset + now);
      done = aligned;
    } else if (got == 0) {
      return shrank(file_->path(), offset + done);
    } else if (errno != EINTR) {
      Error error = system_error(errno, file_->path(), "cannot read the file with direct I/O");
      error.offset = offset + done;
      return error;
    }
  }
  return {};
}

}  // namespace weightlift::io
