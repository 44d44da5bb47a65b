#include "device/pinned.h"

namespace weightlift::device {

Result<PinnedMemory> PinnedMemory::adopt(Device& device, io::AnonymousMemory memory) {
  const CurrentContext current(device);
  WL_RETURN_IF_ERROR(current.status());
  const Driver& table = device.driver();
  WL_RETURN_IF_ERROR(check(
      table, table.cuMemHostRegister(memory.data(), memory.size(), CU_MEMHOSTREGISTER_PORTABLE),
      "cuMemHostRegister"));
  std::byte* const data = memory.data();
  const std::size_t bytes = memory.size();
  return PinnedMemory(device, std::move(memory), data, bytes);
}

Result<PinnedMemory> PinnedMemory::allocate(Device& device, std::size_t bytes) {
  WL_ASSIGN_OR_RETURN(io::AnonymousMemory memory, io::AnonymousMemory::allocate(bytes));
  memory.keep_from_children();
  WL_RETURN_IF_ERROR(memory.populate(0, memory.size()));
  auto registered = adopt(device, std::move(memory));
  if (registered.ok()) return registered;

  const CurrentContext current(device);
  WL_RETURN_IF_ERROR(current.status());
  void* data = nullptr;
  Status allocated =
      check(device.driver(), device.driver().cuMemHostAlloc(&data, bytes, CU_MEMHOSTALLOC_PORTABLE),
            "cuMemHostAlloc");
  if (!allocated.ok()) {
    Error error = registered.error();
    error.message += "; " + allocated.error().message +
                     "; pinned memory may be limited by `ulimit -l` or the container";
    return error;
  }
  return PinnedMemory(device, io::AnonymousMemory(), static_cast<std::byte*>(data), bytes);
}

PinnedMemory::~PinnedMemory() {
  if (device_ == nullptr) return;
  if (!uses_driver()) {  // a child: neither the driver nor the pages are its own
    memory_.forget();
    return;
  }
  const CurrentContext current(*device_);
  // A driver that is shut down answers with an error, and has let go of the pages already.
  if (!current.ok()) return;
  if (memory_.data() != nullptr) {
    device_->driver().cuMemHostUnregister(data_);
  } else {
    device_->driver().cuMemFreeHost(data_);
  }
}

}  // namespace weightlift::device
