// The memory of one simulated device. Clients hold addresses inside a range without access rights,
// so that a host access faults as it would with a GPU; the bytes live in a shadow of the same size
// that only the simulator knows. No rights are ever changed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>

namespace weightlift::simulated {

struct Allocation {
  std::uint64_t bytes = 0;
  bool external = false;  // made by sim_alloc in torch's place
};

class DeviceMemory {
 public:
  DeviceMemory() = default;
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // Forgets all allocations. New addresses continue after the old ones for a while, so that an
  // address of an earlier run is not mistaken for a live one.
  void reset(std::uint64_t bytes);
  void resize(std::uint64_t bytes) { limit_ = bytes; }

  [[nodiscard]] std::optional<std::uint64_t> allocate(std::uint64_t bytes, bool external);
  std::optional<Allocation> release(std::uint64_t address);
  void release_all(bool external);

  [[nodiscard]] bool contains(std::uint64_t address) const { return address - base_ < size_; }
  // The live allocation that holds all of [address, address + bytes), else nullptr.
  [[nodiscard]] const std::pair<const std::uint64_t, Allocation>* find(std::uint64_t address,
                                                                       std::uint64_t bytes) const;
  [[nodiscard]] std::byte* shadow(std::uint64_t address) const {
    return shadow_ + (address - base_);
  }

  [[nodiscard]] std::uint64_t limit() const { return limit_; }
  [[nodiscard]] std::uint64_t used() const { return client_bytes_ + external_bytes_; }
  [[nodiscard]] std::uint64_t client_bytes() const { return client_bytes_; }
  [[nodiscard]] std::uint64_t external_bytes() const { return external_bytes_; }
  [[nodiscard]] std::uint64_t client_count() const { return client_count_; }
  [[nodiscard]] std::uint64_t external_count() const { return external_count_; }
  [[nodiscard]] std::uint64_t peak() const { return peak_; }
  [[nodiscard]] std::uint64_t client_peak() const { return client_peak_; }

 private:
  void unmap();
  void forget(std::map<std::uint64_t, Allocation>::iterator allocation);

  std::uint64_t base_ = 0;
  std::uint64_t size_ = 0;
  std::byte* shadow_ = nullptr;
  std::uint64_t next_ = 0;
  std::uint64_t limit_ = 0;
  std::uint64_t client_bytes_ = 0, external_bytes_ = 0;
  std::uint64_t client_count_ = 0, external_count_ = 0;
  std::uint64_t peak_ = 0, client_peak_ = 0;
  std::map<std::uint64_t, Allocation> live_;
};

}  // namespace weightlift::simulated
