#include "format/index.h"

#include <sys/random.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "format/by_name.h"
#include "format/common.h"
#include "result.h"

namespace weightlift::format {
namespace {

struct HashKey {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
};

const HashKey& hash_key() noexcept {
  static const HashKey key = [] {
    HashKey fresh;
    // GRND_NONBLOCK, because early in boot a weaker key is better than waiting. Without random
    // bytes, the key comes from the randomised addresses of the process.
    if (getrandom(&fresh, sizeof fresh, GRND_NONBLOCK) != sizeof fresh) {
      fresh.low = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
      fresh.high = reinterpret_cast<std::uintptr_t>(&hash_key);
    }
    return fresh;
  }();
  return key;
}

// SipHash-1-3 (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012), with the number of
// rounds that the hash tables of Rust and Python use.
class SipHash {
 public:
  explicit SipHash(const HashKey& key) noexcept
      : v0_(key.low ^ 0x736f6d6570736575),
        v1_(key.high ^ 0x646f72616e646f6d),
        v2_(key.low ^ 0x6c7967656e657261),
        v3_(key.high ^ 0x7465646279746573) {}

  std::uint64_t operator()(std::string_view text) noexcept {
    const char* at = text.data();
    std::size_t left = text.size();
    for (; left >= 8; at += 8, left -= 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, at, 8);
      absorb(word);
    }
    std::uint64_t last = 0;
    if (left > 0) std::memcpy(&last, at, left);
    absorb(last | static_cast<std::uint64_t>(text.size()) << 56);
    v2_ ^= 0xff;
    for (int i = 0; i < 3; ++i) round();
    return v0_ ^ v1_ ^ v2_ ^ v3_;
  }

 private:
  void absorb(std::uint64_t word) noexcept {
    v3_ ^= word;
    round();
    v0_ ^= word;
  }
  void round() noexcept {
    v0_ += v1_;
    v1_ = std::rotl(v1_, 13) ^ v0_;
    v0_ = std::rotl(v0_, 32);
    v2_ += v3_;
    v3_ = std::rotl(v3_, 16) ^ v2_;
    v0_ += v3_;
    v3_ = std::rotl(v3_, 21) ^ v0_;
    v2_ += v1_;
    v1_ = std::rotl(v1_, 17) ^ v2_;
    v2_ = std::rotl(v2_, 32);
  }

  std::uint64_t v0_, v1_, v2_, v3_;
};

std::uint64_t hash_of(std::string_view name) noexcept {
  return SipHash(hash_key())(name);
}

// The low half of the hash chooses the slot; the slot keeps the high half.
std::uint32_t remembered(std::uint64_t hash) noexcept {
  return static_cast<std::uint32_t>(hash >> 32);
}

}  // namespace

Index::Index() = default;
Index::~Index() = default;

std::optional<std::uint32_t> Index::find(std::string_view name) const noexcept {
  return by_name_->find(tensors_, name);
}

Index::ByName::ByName(std::size_t count) : slots_(std::bit_ceil(2 * count + 1)) {}

std::size_t Index::ByName::locate(std::span<const TensorInfo> tensors, std::string_view name,
                                  std::uint64_t hash) const noexcept {
  const std::size_t mask = slots_.size() - 1;
  std::size_t i = static_cast<std::size_t>(hash) & mask;
  while (slots_[i].position != kFree &&
         (slots_[i].hash != remembered(hash) || tensors[slots_[i].position].name != name)) {
    i = (i + 1) & mask;
  }
  return i;
}

std::optional<std::uint32_t> Index::ByName::insert(std::span<const TensorInfo> tensors,
                                                   std::uint32_t position) {
  const std::string_view name = tensors[position].name;
  const std::uint64_t hash = hash_of(name);
  Slot& slot = slots_[locate(tensors, name, hash)];
  if (slot.position != kFree) return slot.position;
  slot = {remembered(hash), position};
  return std::nullopt;
}

std::optional<std::uint32_t> Index::ByName::find(std::span<const TensorInfo> tensors,
                                                 std::string_view name) const noexcept {
  const Slot& slot = slots_[locate(tensors, name, hash_of(name))];
  if (slot.position == kFree) return std::nullopt;
  return slot.position;
}

class EntriesIndexer {
 public:
  static Result<std::shared_ptr<const Index>> index(std::vector<TensorEntry>& entries,
                                                    std::uint64_t file_size) {
    std::size_t names = 0;
    std::size_t extents = 0;
    std::vector<Placed> placed;
    placed.reserve(entries.size());
    for (const TensorEntry& entry : entries) {
      auto bytes = bytes_of(entry.shape, entry.dtype);
      if (!bytes.ok()) {
        bytes.error().tensor = entry.name;
        bytes.error().message += "; " + std::string(kDamaged);
        return std::move(bytes).error();
      }
      if (entry.begin > file_size || *bytes > file_size - entry.begin) {
        return make_error(ErrorCode::kOffsetsInvalid,
                          "its " + bytes_text(*bytes) + " begin at byte " +
                              std::to_string(entry.begin) + ", but the file ends at byte " +
                              std::to_string(file_size) + "; " + std::string(kDamaged),
                          std::nullopt, entry.name);
      }
      names += entry.name.size();
      extents += entry.shape.size();
      placed.push_back({&entry, *bytes});
    }
    std::sort(placed.begin(), placed.end());

    const std::shared_ptr<Index> index(new Index());
    // Reserved, so that views into them stay valid.
    index->names_.reserve(names);
    index->extents_.reserve(extents);
    index->tensors_.reserve(placed.size());
    for (const Placed& one : placed) {
      index->names_ += one.entry->name;
      index->extents_.insert(index->extents_.end(), one.entry->shape.begin(),
                             one.entry->shape.end());
      index->tensors_.push_back(
          {std::string_view(index->names_).substr(index->names_.size() - one.entry->name.size()),
           one.entry->dtype, std::span(index->extents_).last(one.entry->shape.size()),
           one.entry->begin, one.bytes});
    }
    index->by_name_ = std::make_unique<Index::ByName>(placed.size());
    for (std::uint32_t i = 0; i < placed.size(); ++i) {
      if (index->by_name_->insert(index->tensors_, i)) {
        return make_error(ErrorCode::kDuplicateName,
                          "two tensors have this name: save the file again with different names",
                          std::nullopt, index->tensors_[i].name);
      }
    }
    return std::shared_ptr<const Index>(index);
  }

 private:
  struct Placed {
    const TensorEntry* entry;
    std::uint64_t bytes;

    bool operator<(const Placed& other) const noexcept {
      return std::tie(entry->begin, bytes, entry->name) <
             std::tie(other.entry->begin, other.bytes, other.entry->name);
    }
  };
};

Result<std::shared_ptr<const Index>> make_index(std::vector<TensorEntry> entries,
                                                std::uint64_t file_size, const std::string& path) {
  return guarded(path, [&] { return EntriesIndexer::index(entries, file_size); });
}

}  // namespace weightlift::format
