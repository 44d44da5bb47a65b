#include "io/mapping.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "io/anonymous_memory.h"
#include "io/file.h"
#include "result.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace weightlift::io {

Result<std::shared_ptr<Mapping>> Mapping::map(const std::shared_ptr<const File>& file) {
  std::byte* data = nullptr;
  if (file->size() != 0) {
    WL_ASSIGN_OR_RETURN(const PooledDescriptor::Handle fd, file->descriptor());
    void* mapped = ::mmap(nullptr, file->size(), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_NORESERVE, fd->get(), 0);
    if (mapped == MAP_FAILED) return system_error(errno, file->path(), "cannot map the file");
    data = static_cast<std::byte*>(mapped);
  }
  return std::shared_ptr<Mapping>(new Mapping(file, data));
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

Result<bool> Mapping::populate(std::uint64_t offset, std::uint64_t bytes) const {
  const auto file = file_.lock();
  if (bytes == 0) return true;
  if (!file) return false;
  const std::uint64_t begin = offset / kPageBytes * kPageBytes;
  const std::uint64_t end = std::min(offset + bytes, file->size());
  while (::madvise(data_ + begin, end - begin, MADV_POPULATE_READ) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    const bool unreadable = errno == EFAULT || errno == EHWPOISON || errno == EIO;
    // The advice was refused: EINVAL from an older kernel; EPERM, ENOSYS or another error from a
    // seccomp filter.
    if (!unreadable && errno != ENOMEM) return false;
    const int number = unreadable ? EIO : errno;
    if (unreadable) {
      // A touch would have raised SIGBUS: the page is past the end of the file, or unreadable.
      if (auto changed = file->check_unchanged(); !changed.ok()) return changed.error();
    }
    Error error = system_error(number, file->path(), "cannot read the mapped file");
    error.offset = begin;
    return error;
  }
  return true;
}

void Mapping::read_forwards(bool whether) const noexcept {
  // Only an advice: a kernel or a sandbox that refuses it reads as before.
  if (data_ != nullptr) ::madvise(data_, bytes_, whether ? MADV_SEQUENTIAL : MADV_NORMAL);
}

void Mapping::read_in_large_folios(bool whether) const noexcept {
  // As above.
  if (data_ != nullptr) ::madvise(data_, bytes_, whether ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

}  // namespace weightlift::io
