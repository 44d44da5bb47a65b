#include "engine/delivery.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "convert/cast.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/scratch.h"

namespace weightlift::engine {
namespace {

// Elements gathered at a time if source or target is strided. An element has at most 16 bytes
// (C128).
constexpr std::uint64_t kBlock = 256;

std::byte* at_address(std::uint64_t address) {
  return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(address));
}

class RowDelivery {
 public:
  RowDelivery(const Copy& copy, const convert::Fp8Rules& fp8)
      : source_item_(copy.source_item()), target_item_(copy.target_item()), fp8_(fp8) {
    if (copy.casts()) {
      cast_ = convert::host_cast(*convert::float_format(copy.source_dtype),
                                 *convert::float_format(copy.target_dtype));
    }
  }

  // Contiguous on both sides.
  void plain(const std::byte* source, std::byte* target, std::uint64_t count) const {
    if (cast_ != nullptr) {
      cast_(source, target, count, fp8_);
    } else {
      std::memcpy(target, source, count * source_item_);
    }
  }

  void row(const std::byte* source, std::int64_t source_stride, std::byte* target,
           std::int64_t target_stride, std::uint64_t count) const {
    const bool from_plain = source_stride == static_cast<std::int64_t>(source_item_);
    const bool to_plain = target_stride == static_cast<std::int64_t>(target_item_);
    if (from_plain && to_plain) {
      plain(source, target, count);
      return;
    }
    std::array<std::byte, kBlock * 16> gathered;
    std::array<std::byte, kBlock * 16> converted;
    for (std::uint64_t done = 0; done < count; done += kBlock) {
      const std::uint64_t now = std::min(kBlock, count - done);
      const auto step = static_cast<std::int64_t>(done);
      const std::byte* from = source + step * source_stride;
      std::byte* const to = target + step * target_stride;
      if (!from_plain) {
        for (std::uint64_t i = 0; i < now; ++i) {
          std::memcpy(gathered.data() + i * source_item_,
                      from + static_cast<std::int64_t>(i) * source_stride, source_item_);
        }
        from = gathered.data();
      }
      if (to_plain) {
        plain(from, to, now);
        continue;
      }
      if (cast_ != nullptr) {
        cast_(from, converted.data(), now, fp8_);
        from = converted.data();
      }
      for (std::uint64_t i = 0; i < now; ++i) {
        std::memcpy(to + static_cast<std::int64_t>(i) * target_stride, from + i * target_item_,
                    target_item_);
      }
    }
  }

 private:
  std::uint64_t source_item_;
  std::uint64_t target_item_;
  convert::HostCast cast_ = nullptr;
  const convert::Fp8Rules& fp8_;
};

void deliver_strided(const LoadPlan& plan, const Copy& copy, const Piece& piece,
                     const std::byte* source, std::uint64_t source_begin, std::byte* packed,
                     const RowDelivery& rows, Scratch& scratch) {
  const Dimension* const dims = &plan.dimensions[copy.dimensions];
  const std::uint32_t rank = copy.dimension_count;
  const Dimension& inner = dims[rank - 1];
  const std::span<std::uint64_t> index = scratch.index(rank);
  std::uint64_t rest = piece.first;
  for (std::uint32_t i = rank; i > 0; --i) {
    index[i - 1] = rest % dims[i - 1].extent;
    rest /= dims[i - 1].extent;
  }
  std::uint64_t left = piece.count;
  while (left > 0) {
    const std::uint64_t now = std::min(left, inner.extent - index[rank - 1]);
    std::int64_t from = static_cast<std::int64_t>(copy.source - source_begin);
    std::int64_t to = 0;
    for (std::uint32_t i = 0; i < rank; ++i) {
      from += static_cast<std::int64_t>(index[i]) * dims[i].source_stride;
      to += static_cast<std::int64_t>(index[i]) * dims[i].target_stride;
    }
    if (packed != nullptr) {
      rows.row(source + from, inner.source_stride, packed,
               static_cast<std::int64_t>(copy.target_item()), now);
      packed += now * copy.target_item();
    } else {
      rows.row(source + from, inner.source_stride, at_address(copy.target) + to,
               inner.target_stride, now);
    }
    left -= now;
    index[rank - 1] = 0;
    for (std::uint32_t i = rank - 1; i > 0; --i) {
      if (++index[i - 1] < dims[i - 1].extent) break;
      index[i - 1] = 0;
    }
  }
}

}  // namespace

void deliver(const LoadPlan& plan, const Piece& piece, const std::byte* source,
             std::uint64_t source_begin, std::byte* packed, const convert::Fp8Rules& fp8,
             Scratch& scratch) {
  Copy copy = plan.copies[piece.copy];
  if (!piece.host_cast) copy.target_dtype = copy.source_dtype;  // the device casts, or nobody
  const RowDelivery rows(copy, fp8);
  if (copy.dimension_count != 0) {
    deliver_strided(plan, copy, piece, source, source_begin, packed, rows, scratch);
    return;
  }
  const std::uint64_t from = copy.source - source_begin + piece.first * copy.source_item();
  std::byte* const target =
      packed != nullptr ? packed : at_address(copy.target) + piece.first * copy.target_item();
  rows.plain(source + from, target, piece.count);
}

}  // namespace weightlift::engine
