#include "clocks.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace weightlift::simulated {

void Clock::set(Lane lane, std::uint64_t number) {
  if (numbers_.size() <= lane) numbers_.resize(std::size_t{lane} + 1);
  numbers_[lane] = number;
}

void Clock::join(const Clock& other) {
  if (numbers_.size() < other.numbers_.size()) numbers_.resize(other.numbers_.size());
  for (std::size_t lane = 0; lane < other.numbers_.size(); ++lane) {
    numbers_[lane] = std::max(numbers_[lane], other.numbers_[lane]);
  }
}

bool ordered(const Stamp& one, const Stamp& other) {
  return &one == &other || other.clock.covers(one.lane, one.number) ||
         one.clock.covers(other.lane, other.number);
}

AccessMap::Spans::iterator AccessMap::split(std::uint64_t at) {
  auto next = spans_.lower_bound(at);
  if (next == spans_.begin()) return next;
  auto previous = std::prev(next);
  if (previous->second.end <= at) return next;
  Span tail = previous->second;
  previous->second.end = at;
  return spans_.emplace_hint(next, at, std::move(tail));
}

void AccessMap::drop_known(Span& span, const Clock& host) {
  if (span.write && host.covers(span.write->lane, span.write->number)) span.write.reset();
  std::erase_if(span.reads,
                [&](const StampPointer& read) { return host.covers(read->lane, read->number); });
}

StampPointer AccessMap::touch(std::uint64_t begin, std::uint64_t end, bool write,
                              const StampPointer& stamp, const Clock& host) {
  if (begin >= end) return nullptr;
  StampPointer conflict;
  const auto compare = [&](const StampPointer& earlier) {
    if (!conflict && earlier && !ordered(*earlier, *stamp)) conflict = earlier;
  };
  split(end);
  auto span = split(begin);
  std::uint64_t covered = begin;
  while (span != spans_.end() && span->first < end) {
    // The operation that is being noted may itself be older than what the host knows (a kernel's
    // targets are noted when it runs), so compare first and drop after.
    compare(span->second.write);
    if (write) {
      for (const StampPointer& read : span->second.reads) compare(read);
      span = spans_.erase(span);
      continue;
    }
    drop_known(span->second, host);
    if (covered < span->first) {
      spans_.emplace_hint(span, covered, Span{span->first, nullptr, {stamp}});
    }
    covered = span->second.end;
    auto& reads = span->second.reads;
    std::erase_if(reads, [&](const StampPointer& read) {
      return read->lane == stamp->lane && read->number <= stamp->number;
    });
    reads.push_back(stamp);
    ++span;
  }
  if (write) {
    spans_.emplace(begin, Span{end, stamp, {}});
  } else if (covered < end) {
    spans_.emplace(covered, Span{end, nullptr, {stamp}});
  }
  return conflict;
}

StampPointer AccessMap::unfinished(std::uint64_t begin, std::uint64_t end,
                                   const Clock& known) const {
  auto span = spans_.upper_bound(begin);
  if (span != spans_.begin()) --span;
  for (; span != spans_.end() && span->first < end; ++span) {
    if (span->second.end <= begin) continue;
    const StampPointer& write = span->second.write;
    if (write && !known.covers(write->lane, write->number)) return write;
    for (const StampPointer& read : span->second.reads) {
      if (!known.covers(read->lane, read->number)) return read;
    }
  }
  return nullptr;
}

void AccessMap::forget(std::uint64_t begin, std::uint64_t end) {
  if (begin >= end) return;
  auto last = split(end);
  auto first = split(begin);
  spans_.erase(first, last);
}

}  // namespace weightlift::simulated
