// Which operations are ordered before which: vector clocks over lanes, and the last accesses to
// bytes. The order comes from the client's calls (streams, events, synchronisation), not from the
// schedule, so that a race is also found in schedules in which it does no harm.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace weightlift::simulated {

// One lane for each stream. All host threads share one, in the order of their driver calls, because
// synchronisation between the client's threads is invisible here; a thread sanitizer checks that.
using Lane = std::uint32_t;
inline constexpr Lane kHostLane = 0;

class Clock {
 public:
  [[nodiscard]] bool covers(Lane lane, std::uint64_t number) const {
    return lane < numbers_.size() && numbers_[lane] >= number;
  }
  void set(Lane lane, std::uint64_t number);
  void join(const Clock& other);

 private:
  std::vector<std::uint64_t> numbers_;
};

// The place of one operation in the order; `clock` covers all that is ordered before it and itself.
struct Stamp {
  Lane lane = kHostLane;
  std::uint64_t number = 0;
  Clock clock;
  std::string what;
};
using StampPointer = std::shared_ptr<const Stamp>;

[[nodiscard]] bool ordered(const Stamp& one, const Stamp& other);

// Device and host addresses never overlap, so one map serves both.
class AccessMap {
 public:
  // Records an access and returns an earlier one that conflicts with it. Drops accesses that the
  // host knows to be complete, because they conflict with no later one.
  StampPointer touch(std::uint64_t begin, std::uint64_t end, bool write, const StampPointer& stamp,
                     const Clock& host);
  // An access to these bytes that `known` does not cover.
  [[nodiscard]] StampPointer unfinished(std::uint64_t begin, std::uint64_t end,
                                        const Clock& known) const;
  void forget(std::uint64_t begin, std::uint64_t end);
  void clear() { spans_.clear(); }

 private:
  struct Span {
    std::uint64_t end = 0;
    StampPointer write;
    std::vector<StampPointer> reads;  // the last of each lane since the write
  };
  using Spans = std::map<std::uint64_t, Span>;

  Spans::iterator split(std::uint64_t at);  // the first span that starts at or after `at`
  static void drop_known(Span& span, const Clock& host);

  Spans spans_;
};

}  // namespace weightlift::simulated
