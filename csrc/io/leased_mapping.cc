#include "io/leased_mapping.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <sys/statfs.h>
#include <sys/vfs.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "io/anonymous_memory.h"
#include "io/file.h"
#include "io/mapping.h"
#include "mutex.h"

#ifndef XFS_SUPER_MAGIC
#define XFS_SUPER_MAGIC 0x58465342
#endif

namespace weightlift::io {
namespace {

constexpr std::uint64_t kBlock = std::uint64_t{32} << 20;

std::atomic<std::size_t> leases_held = 0;

// Whether every access to the file's bytes goes through this inode of this kernel. That is not so
// on network file systems, whose servers have other clients, nor on FUSE and overlays, which have
// another file beneath.
bool knows_all_writers(int fd) {
  struct statfs status{};
  if (::fstatfs(fd, &status) != 0) return false;
  const auto type = static_cast<unsigned long>(status.f_type);
  return type == EXT4_SUPER_MAGIC || type == XFS_SUPER_MAGIC || type == BTRFS_SUPER_MAGIC ||
         type == TMPFS_MAGIC;
}

bool take_lease(int fd) {
  // A lease breaker must not send a signal to this process: SIGIO, the default, ends a process that
  // does not handle it. F_SETLEASE sets the owner of the signal, and F_SETOWN removes it
  // afterwards. A signal that arrives in between is SIGURG, which is ignored by default
  // (signal(7)).
  if (::fcntl(fd, F_SETSIG, SIGURG) != 0 || ::fcntl(fd, F_SETLEASE, F_RDLCK) != 0) return false;
  if (::fcntl(fd, F_SETOWN, 0) == 0) return true;
  ::fcntl(fd, F_SETLEASE, F_UNLCK);
  return false;
}

}  // namespace

std::unique_ptr<LeasedMapping> LeasedMapping::open(const std::shared_ptr<const File>& file) {
  Place place = Place::take();
  if (!place.taken()) return nullptr;
  FileDescriptor fd = file->reopened(0);
  if (fd.get() < 0 || !knows_all_writers(fd.get()) || !take_lease(fd.get())) return nullptr;
  auto mapping = Mapping::map(file);
  if (!mapping.ok()) return nullptr;  // closing the descriptor ends the lease
  return std::unique_ptr<LeasedMapping>(
      new LeasedMapping(std::move(place), std::move(fd), *std::move(mapping), file->size()));
}

LeasedMapping::Place LeasedMapping::Place::take() noexcept {
  if (const std::size_t held = leases_held.fetch_add(1); held < descriptor_limit(held + 1))
    return Place(true);
  leases_held.fetch_sub(1);
  return Place(false);
}

LeasedMapping::Place::~Place() {
  if (taken_) leases_held.fetch_sub(1);
}

LeasedMapping::LeasedMapping(Place place, FileDescriptor fd, std::shared_ptr<Mapping> mapping,
                             std::uint64_t bytes)
    : place_(std::move(place)),
      fd_(std::move(fd)),
      mapping_(std::move(mapping)),
      had_(bytes / kBlock + 1) {}

LeasedMapping::~LeasedMapping() {
  if (!wanted_) give_back();
}

// Unmaps first: without the lease, no page may be touched.
void LeasedMapping::give_back() noexcept {
  mapping_.reset();
  // Closing the descriptor is not enough, because a forked child may have the open file too.
  ::fcntl(fd_.get(), F_SETLEASE, F_UNLCK);
}

LeasedMapping::Hold LeasedMapping::hold(std::uint64_t offset, std::uint64_t bytes) {
  {
    const MutexLock lock(mutex_);
    if (wanted_) return {};
    ++holds_;
  }
  Hold hold(*this, offset, bytes);
  // While a process waits for the lease, F_GETLEASE returns what it must become (fcntl(2)).
  if (::fcntl(fd_.get(), F_GETLEASE) != F_RDLCK) {
    const MutexLock lock(mutex_);
    wanted_ = true;
    return {};
  }
  // Without this, a page that cannot be read would raise SIGBUS.
  const auto populated = mapping_->populate(offset, bytes);
  if (!populated.ok() || !*populated) return {};
  hold.data_ = mapping_->data() + offset;
  return hold;
}

void LeasedMapping::release(const Hold& hold) noexcept {
  const std::uint64_t end = hold.offset_ + hold.bytes_;
  for (std::uint64_t at = hold.offset_; hold.data_ != nullptr && at < end;) {
    const std::uint64_t block = at / kBlock;
    const std::uint64_t next = std::min(end, (block + 1) * kBlock);
    if (had_[block].fetch_add(next - at) + (next - at) == kBlock) {
      release_whole_pages(mapping_->data() + block * kBlock, kBlock);
    }
    at = next;
  }
  const MutexLock lock(mutex_);
  if (--holds_ == 0 && wanted_) give_back();
}

LeasedMapping::Hold::Hold(LeasedMapping& of, std::uint64_t offset, std::uint64_t bytes) noexcept
    : of_(&of), offset_(offset), bytes_(bytes) {}

LeasedMapping::Hold::Hold(Hold&& other) noexcept
    : of_(std::exchange(other.of_, nullptr)),
      data_(std::exchange(other.data_, nullptr)),
      offset_(other.offset_),
      bytes_(other.bytes_) {}

LeasedMapping::Hold& LeasedMapping::Hold::operator=(Hold&& other) noexcept {
  std::swap(of_, other.of_);
  std::swap(data_, other.data_);
  std::swap(offset_, other.offset_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

LeasedMapping::Hold::~Hold() {
  if (of_ != nullptr) of_->release(*this);
}

}  // namespace weightlift::io
