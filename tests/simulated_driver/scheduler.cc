// When queued operations run, and what running one does.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>

#include "simulator.h"
#include "text.h"

namespace weightlift::simulated {
namespace {

constexpr std::size_t kAll = std::numeric_limits<std::size_t>::max();
constexpr std::size_t kSplitPiece = 4096;
constexpr std::size_t kPiece = 64 * 1024;
constexpr int kPendingFill = 0xEE;
constexpr double kUnlimited = 1e15;  // bytes per second
constexpr double kNever = std::numeric_limits<double>::infinity();

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Four independent lanes so that it runs at memory speed; not cryptographic.
std::uint64_t hash_bytes(const std::byte* bytes, std::size_t count) {
  constexpr std::uint64_t kFactor = 0x9FB21C651E98DF25u;
  std::uint64_t lanes[4] = {1, 2, 3, 4};
  const auto mix = [](std::uint64_t& lane, std::uint64_t word) {
    lane = (lane ^ word) * kFactor;
    lane ^= lane >> 32;
  };
  std::size_t at = 0;
  for (; at + 32 <= count; at += 32) {
    std::uint64_t words[4];
    std::memcpy(words, bytes + at, sizeof words);
    for (int i = 0; i < 4; ++i) mix(lanes[i], words[i]);
  }
  for (; at < count; at += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes + at, std::min<std::size_t>(8, count - at));
    mix(lanes[0], word);
  }
  std::uint64_t hash = count;
  for (const std::uint64_t lane : lanes) mix(hash, lane);
  return hash;
}

const std::byte* host_pointer(std::uint64_t address) {
  return reinterpret_cast<const std::byte*>(address);
}

// The first operation on another stream that this one must wait for.
const OperationPointer* blocker(const Operation& operation) {
  for (const OperationPointer& wait : operation.waits) {
    if (!wait->done) return &wait;
  }
  return nullptr;
}

}  // namespace

// --- Choosing -----------------------------------------------------------------------------------

std::vector<Stream*> Simulator::ready_streams() const {
  std::vector<Stream*> ready;
  for (const auto& stream : streams_) {
    if (!stream->queue.empty() && blocker(*stream->queue.front()) == nullptr) {
      ready.push_back(stream.get());
    }
  }
  std::ranges::sort(ready, {}, [](const Stream* stream) { return stream->queue.front()->order; });
  return ready;
}

void Simulator::turn() {
  if (timed()) {
    advance(now());
    return;
  }
  switch (policy_) {
    case SIM_EAGER:
      run_all(nullptr);
      break;
    case SIM_STALL:
      run_all(stalled());
      break;
    case SIM_RANDOM:
    case SIM_SPLIT:
      while (random_.below(kHostPace + device_pace_) < device_pace_ && run_something()) {
      }
      break;
    case SIM_PCT:
      run_by_priority();
      break;
    default:
      break;
  }
}

const Stream* Simulator::stalled() const {
  const Stream* lowest = nullptr;
  for (const auto& stream : streams_) {
    if (lowest == nullptr || stream->rank < lowest->rank) lowest = stream.get();
  }
  return lowest;
}

bool Simulator::run_something() {
  const auto ready = ready_streams();
  if (ready.empty()) return false;
  const OperationPointer operation = ready[random_.below(ready.size())]->queue.front();
  step(operation, policy_ == SIM_SPLIT ? 1 : kAll);
  return true;
}

void Simulator::run_all(const Stream* except) {
  for (bool again = true; again;) {
    again = false;
    for (Stream* stream : ready_streams()) {
      if (stream == except || stream->queue.empty()) continue;
      step(OperationPointer(stream->queue.front()), kAll);
      again = true;
    }
  }
}

// Probabilistic concurrency testing (Burckhardt, Kothari, Musuvathi, Nagarakatte, ASPLOS 2010): the
// host is a thread like the streams are.
void Simulator::run_by_priority() {
  for (;;) {
    const bool change = change_points_.contains(++steps_);
    Stream* top = nullptr;
    for (Stream* stream : ready_streams()) {
      if (top == nullptr || stream->priority > top->priority) top = stream;
    }
    if (top == nullptr || host_priority_ >= top->priority) {
      if (!change) return;
      host_priority_ = --low_priority_;
      continue;
    }
    step(OperationPointer(top->queue.front()), kAll);
    if (change) top->priority = --low_priority_;
  }
}

// Operations only wait for ones submitted before them, so this ends.
void Simulator::force(const OperationPointer& target) {
  const bool detours = policy_ == SIM_RANDOM || policy_ == SIM_SPLIT;
  std::vector<OperationPointer> wanted{target};
  while (!wanted.empty()) {
    const OperationPointer operation = wanted.back();
    if (operation->done) {
      wanted.pop_back();
      continue;
    }
    if (detours && random_.coin() && run_something()) continue;
    const OperationPointer front = operation->stream->queue.front();
    if (const OperationPointer* other = blocker(*front)) {
      wanted.push_back(*other);
    } else {
      step(front, policy_ == SIM_SPLIT ? 1 : kAll);
    }
  }
}

bool Simulator::hold(double seconds) {
  const bool before = held();
  const std::chrono::duration<double> limit(seconds);
  held_until_ = std::chrono::steady_clock::now() +
                std::chrono::duration_cast<std::chrono::steady_clock::duration>(limit);
  changed_.notify_all();
  return before;
}

CUresult Simulator::complete(const OperationPointer& operation, Lock& lock) {
  while (held()) changed_.wait_until(lock, std::chrono::steady_clock::time_point(held_until_));
  if (!timed()) {
    force(operation);
  } else {
    advance(now());
    const bool sleeps = !operation->done;
    while (!operation->done) {
      if (time_mode_ == SIM_TIME_VIRTUAL) {
        start_ready();
        advance(next_finish());
        continue;
      }
      advance(now());
      if (operation->done) break;
      const double wait = std::max(0.0, next_finish() - now());
      changed_.wait_for(lock, std::chrono::duration<double>(std::min(wait, 1.0)));
    }
    if (sleeps && waking_cost_ > 0) spend(waking_cost_, lock);
  }
  const CUresult error = device(operation->stream->device)->error;
  if (error == CUDA_SUCCESS) learn(*operation);
  return error;
}

void Simulator::drain() {
  for (const auto& stream : streams_) {
    if (!stream->queue.empty()) force(OperationPointer(stream->queue.back()));
  }
}

// --- Running ------------------------------------------------------------------------------------

void Simulator::add_pieces(Operation& operation, std::uint64_t target, std::uint64_t source,
                           std::size_t bytes, bool hashed, bool of_pages) {
  const std::size_t size = policy_ == SIM_SPLIT ? kSplitPiece : kPiece;
  for (std::size_t at = 0; at < bytes; at += size) {
    Piece piece{target + at,
                source == 0 ? 0 : source + at,
                std::min(size, bytes - at),
                0,
                hashed && hashing_,
                of_pages};
    if (piece.hashed) piece.hash = hash_bytes(host_pointer(piece.source), piece.bytes);
    operation.pieces.push_back(piece);
  }
}

void Simulator::step(const OperationPointer& operation, std::size_t pieces) {
  if (!operation->prepared) {
    operation->prepared = true;
    if (operation->kind == Kind::kCopy || operation->kind == Kind::kKernel) {
      CUresult code = CUDA_SUCCESS;
      for (Fault& fault : faults_) {
        if (fault.name == "(operation)" && --fault.left == 0) code = fault.code;
      }
      std::erase_if(faults_, [](const Fault& fault) { return fault.left == 0; });
      if (code != CUDA_SUCCESS) {
        lose_context(operation->stream->device, code);
        return;
      }
    }
    if (operation->kind == Kind::kKernel) prepare_kernel(operation);
    // The parts of a copy and the blocks of a kernel run in no fixed order.
    if (policy_ == SIM_SPLIT || policy_ == SIM_RANDOM) {
      random_.shuffle(operation->pieces);
      random_.shuffle(operation->tiles);
    }
  }
  const bool kernel = operation->kind == Kind::kKernel;
  const std::size_t total = kernel ? operation->tiles.size() : operation->pieces.size();
  const std::size_t count = std::min(pieces, total - operation->next_piece);
  if (kernel && count > 0) {
    const auto& memory = device(operation->stream->device)->memory;
    const std::span all(operation->tiles);
    convert::scatter_on_host(memory.shadow(operation->launch.chunk),
                             all.subspan(operation->next_piece, count), operation->launch.rules);
  } else {
    for (std::size_t i = 0; i < count; ++i) {
      run_piece(*operation, operation->pieces[operation->next_piece + i]);
    }
  }
  operation->next_piece += count;
  if (operation->next_piece == total) finish(operation);
}

void Simulator::finish(const OperationPointer& operation) {
  SimLink& traffic = device(operation->stream->device)->traffic;
  traffic.bytes_to_device += operation->to_device;
  traffic.bytes_to_host += operation->to_host;
  traffic.bytes_of_pages += operation->of_pages;
  operation->done = true;
  operation->waits.clear();
  operation->pieces = {};
  operation->snapshots = {};
  operation->tiles = {};
  operation->stream->queue.pop_front();
  std::erase(moving_, operation);
  changed_.notify_all();
}

void Simulator::run_piece(Operation& operation, Piece& piece) {
  if (piece.bytes == 0 && operation.kind != Kind::kFree) return;  // cancelled
  const auto report = [&](std::string what) {
    if (!std::exchange(operation.reported, true)) violation(std::move(what));
  };
  const int target_device = device_of(piece.target);
  if (operation.kind == Kind::kFree) {
    DeviceMemory& memory = device(target_device)->memory;
    if (const auto gone = memory.release(piece.target)) {
      accesses_.forget(piece.target, piece.target + gone->bytes);
    }
    return;
  }
  const auto locate = [&](std::uint64_t address, int owner) -> std::byte* {
    if (owner < 0) return reinterpret_cast<std::byte*>(address);
    const DeviceMemory& memory = device(owner)->memory;
    if (memory.find(address, piece.bytes) == nullptr) {
      report(text("use after free: {} runs when {} bytes at {:#x} are gone", operation.stamp->what,
                  piece.bytes, address));
      return nullptr;
    }
    return memory.shadow(address);
  };
  std::byte* target = locate(piece.target, target_device);
  if (target == nullptr) return;
  if (operation.kind == Kind::kFill) {
    std::memset(target, kPendingFill, piece.bytes);
    return;
  }
  const std::byte* source = locate(piece.source, device_of(piece.source));
  if (source == nullptr) return;
  if (piece.of_pages && !mapped(piece.source, piece.bytes)) {
    report(text("unmapped: {} runs when {} bytes at {:#x} are gone", operation.stamp->what,
                piece.bytes, piece.source));
    return;
  }
  if (piece.hashed && hashing_ && hash_bytes(source, piece.bytes) != piece.hash) {
    report(text("host write in flight: the source of {} changed, {} bytes at {:#x}",
                operation.stamp->what, piece.bytes, piece.source));
  }
  std::memmove(target, source, piece.bytes);
  if (target_device < 0) rehash(piece.target, piece.target + piece.bytes);
}

// A copy to the host legally changes the bytes that queued copies from there will read.
void Simulator::rehash(std::uint64_t begin, std::uint64_t end) {
  for (const auto& stream : streams_) {
    for (const OperationPointer& operation : stream->queue) {
      for (Piece& piece : operation->pieces) {
        if (piece.hashed && piece.source < end && begin < piece.source + piece.bytes) {
          piece.hash = hash_bytes(host_pointer(piece.source), piece.bytes);
        }
      }
    }
  }
}

void Simulator::cancel(std::uint64_t begin, std::uint64_t end) {
  // Already reported; running them would only turn the report into a crash.
  for (const auto& stream : streams_) {
    for (const OperationPointer& operation : stream->queue) {
      if (operation->kind != Kind::kCopy) continue;
      const auto touches = [&](std::uint64_t address, std::size_t bytes) {
        return address < end && begin < address + bytes;
      };
      for (std::size_t i = operation->next_piece; i < operation->pieces.size(); ++i) {
        Piece& piece = operation->pieces[i];
        if (touches(piece.source, piece.bytes) || touches(piece.target, piece.bytes)) {
          piece.target = piece.source = 0;
          piece.bytes = 0;
          piece.hashed = false;
        }
      }
    }
  }
}

void Simulator::prepare_kernel(const OperationPointer& operation) {
  const Launch& launch = operation->launch;
  const std::string& what = operation->stamp->what;
  const DeviceMemory& memory = device(operation->stream->device)->memory;
  const std::uint64_t table = launch.chunk + launch.tiles_offset;
  const std::uint64_t end = table + std::uint64_t{launch.tile_count} * sizeof(convert::Tile);
  const auto report = [&](std::string problem) {
    if (!std::exchange(operation->reported, true)) violation(std::move(problem));
  };
  const auto* chunk = memory.find(launch.chunk, end - launch.chunk);
  if (chunk == nullptr) {
    report(text("out of bounds: {} reads {} bytes there, which are not inside a live allocation",
                what, end - launch.chunk));
    return;
  }
  if (table % alignof(convert::Tile) != 0) {
    report(text("launch: {} has its table at the misaligned {:#x}", what, table));
  }
  std::vector<convert::Tile> tiles(launch.tile_count);
  std::memcpy(tiles.data(), memory.shadow(table), tiles.size() * sizeof(convert::Tile));
  const std::uint64_t chunk_bytes = chunk->first + chunk->second.bytes - launch.chunk;
  std::map<std::uint64_t, std::uint64_t> targets;
  for (convert::Tile& tile : tiles) {
    if (tile.count == 0) continue;
    std::uint64_t source_bytes = tile.count;
    std::uint64_t target_bytes = tile.count;
    if (tile.cast != convert::kTileCopy) {
      constexpr auto kFormats = static_cast<std::uint32_t>(convert::kFloatFormatCount);
      if (tile.cast >= kFormats * kFormats) {
        report(text("launch: a tile of {} has cast {}", what, tile.cast));
        continue;
      }
      source_bytes *= convert::float_bytes(static_cast<convert::FloatFormat>(tile.cast / kFormats));
      target_bytes *= convert::float_bytes(static_cast<convert::FloatFormat>(tile.cast % kFormats));
    }
    if (tile.source > chunk_bytes || source_bytes > chunk_bytes - tile.source) {
      report(text("out of bounds: a tile of {} reads {} bytes at {} of a chunk of {}", what,
                  source_bytes, tile.source, chunk_bytes));
      continue;
    }
    const int owner = device_of(tile.target);
    if (owner != operation->stream->device) {
      report(text("wrong device: a tile of {} writes to {:#x}, which is not this device's", what,
                  tile.target));
      continue;
    }
    if (memory.find(tile.target, target_bytes) == nullptr) {
      report(
          text("out of bounds: a tile of {} writes {} bytes at {:#x}, not inside a live "
               "allocation",
               what, target_bytes, tile.target));
      continue;
    }
    const std::uint64_t target_end = tile.target + target_bytes;
    const auto after = targets.lower_bound(target_end);
    if (after != targets.begin() && std::prev(after)->second > tile.target) {
      report(text("race: two tiles of {} write to {:#x}", what, tile.target));
    }
    targets.emplace(tile.target, target_end);
    if (tile.target < end && launch.chunk < target_end) {
      report(text("race: {} writes to its own chunk", what));
    }
    touch(operation, operation->stamp, tile.target, target_end, true);
    convert::Tile translated = tile;
    translated.target = reinterpret_cast<std::uint64_t>(memory.shadow(tile.target));
    operation->tiles.push_back(translated);
  }
}

// --- Time ---------------------------------------------------------------------------------------

void Simulator::set_time(int mode) {
  drain();
  time_mode_ = mode;
  started_ = steady_seconds();
  time_ = 0;
}

double Simulator::now() const {
  return time_mode_ == SIM_TIME_VIRTUAL ? time_ : steady_seconds() - started_;
}

bool Simulator::queues(std::string_view call) {
  return call.starts_with("cuMemcpy") || call == "cuLaunchKernel" || call == "cuEventRecord" ||
         call == "cuStreamWaitEvent";
}

// Other threads and the links continue meanwhile.
void Simulator::spend(double seconds, Lock& held) {
  if (time_mode_ == SIM_TIME_VIRTUAL) {
    const double end = time_ + seconds;
    while (time_ < end) advance(end);
  } else if (time_mode_ == SIM_TIME_REAL) {
    held.unlock();
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    held.lock();
  }
}

void Simulator::start_ready() {
  for (bool again = true; again;) {
    again = false;
    for (Stream* stream : ready_streams()) {
      if (stream->queue.empty()) continue;
      const OperationPointer operation = stream->queue.front();
      if (operation->moving) continue;
      Device& is = *device(stream->device);
      const std::uint64_t bytes = operation->to_device + operation->to_host;
      if (bytes != 0 && is.traffic.bytes_to_device + is.traffic.bytes_to_host == 0 &&
          is.traffic.first_start == 0) {
        is.traffic.first_start = time_;
      }
      if (bytes == 0 || (is.link <= 0 && host_rate_ <= 0)) {
        step(operation, kAll);
        if (bytes != 0) is.traffic.last_finish = time_;
        again = true;
        continue;
      }
      const bool up = operation->to_device != 0;
      const bool busy = std::ranges::any_of(moving_, [&](const OperationPointer& other) {
        return other->stream->device == stream->device && (other->to_device != 0) == up;
      });
      if (busy) continue;
      operation->moving = true;
      operation->left = static_cast<double>(bytes);
      moving_.push_back(operation);
    }
  }
}

// Each link has its own rate. If the host's memory cannot feed them all, it is shared evenly among
// those that need more than their share.
std::vector<double> Simulator::rates() const {
  std::vector<double> rates;
  for (const OperationPointer& operation : moving_) {
    const double link = devices_[static_cast<std::size_t>(operation->stream->device)]->link;
    rates.push_back(link > 0 ? link : kUnlimited);
  }
  if (host_rate_ <= 0) return rates;
  std::vector<std::size_t> by_rate(rates.size());
  for (std::size_t i = 0; i < by_rate.size(); ++i) by_rate[i] = i;
  std::ranges::sort(by_rate, {}, [&](std::size_t i) { return rates[i]; });
  double left = host_rate_;
  for (std::size_t i = 0; i < by_rate.size(); ++i) {
    double& rate = rates[by_rate[i]];
    rate = std::min(rate, left / static_cast<double>(by_rate.size() - i));
    left -= rate;
  }
  return rates;
}

double Simulator::next_finish() const {
  const auto speeds = rates();
  double first = kNever;
  for (std::size_t i = 0; i < moving_.size(); ++i) {
    first = std::min(first, time_ + moving_[i]->left / speeds[i]);
  }
  return first;
}

void Simulator::advance(double to) {
  for (;;) {
    start_ready();
    if (moving_.empty()) {
      if (std::isfinite(to)) time_ = std::max(time_, to);
      return;
    }
    const auto speeds = rates();
    const double finish = next_finish();
    const double until = std::min(finish, to);
    const double passed = std::max(0.0, until - time_);
    for (std::size_t i = 0; i < moving_.size(); ++i) moving_[i]->left -= speeds[i] * passed;
    time_ = std::max(time_, until);
    if (finish > to) return;
    std::vector<OperationPointer> finished;
    for (const OperationPointer& operation : moving_) {
      if (operation->left < 0.5) finished.push_back(operation);  // half a byte: rounding
    }
    for (const OperationPointer& operation : finished) {
      device(operation->stream->device)->traffic.last_finish = time_;
      step(operation, kAll);
    }
    if (time_mode_ == SIM_TIME_VIRTUAL) {
      start_ready();
      return;
    }
  }
}

}  // namespace weightlift::simulated
