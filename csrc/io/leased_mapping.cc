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
#include <mutex>
#include <utility>

#include "io/anonymous_memory.h"
#include "io/file.h"
#include "io/mapping.h"

#ifndef XFS_SUPER_MAGIC
#define XFS_SUPER_MAGIC 0x58465342
#endif

namespace weightlift::io {
namespace {

constexpr std::uint64_t kBlock = std::uint64_t{32} << 20;

std::atomic<std::size_t> leases_held = 0;

// Where the only way to a file's bytes is this kernel's own inode: not on network file systems,
// whose servers have other clients, nor on FUSE or overlays, beneath which there is another file.
bool knows_all_writers(int fd) {
  struct statfs status{};
  if (::fstatfs(fd, &status) != 0) return false;
  const auto type = static_cast<unsigned long>(status.f_type);
  return type == EXT4_SUPER_MAGIC || type == XFS_SUPER_MAGIC || type == BTRFS_SUPER_MAGIC ||
         type == TMPFS_MAGIC;
}

bool take_lease(int fd) {
  // Whoever asks for the lease is to send no signal: SIGIO, which it would be, ends a process that
  // does not expect it. The owner is set by F_SETLEASE and taken away after that; what comes in
  // between is a signal that is ignored unless somebody handles it (signal(7)).
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
  if (!mapping.ok()) return nullptr;  // with the descriptor, the lease ends
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

// In this order: without the lease there must be nothing left that could be touched.
void LeasedMapping::give_back() noexcept {
  mapping_.reset();
  // A child that was forked meanwhile has the open file too, so that closing it would not do.
  ::fcntl(fd_.get(), F_SETLEASE, F_UNLCK);
}

LeasedMapping::Hold LeasedMapping::hold(std::uint64_t offset, std::uint64_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    if (wanted_) return {};
    ++holds_;
  }
  Hold hold(*this, offset, bytes);
  // While somebody waits, what the lease is to become (fcntl(2), F_GETLEASE).
  if (::fcntl(fd_.get(), F_GETLEASE) != F_RDLCK) {
    const std::lock_guard lock(mutex_);
    wanted_ = true;
    return {};
  }
  // Without it, a page that cannot be read would be a SIGBUS.
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
  const std::lock_guard lock(mutex_);
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
