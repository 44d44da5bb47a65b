// Devices by ordinal, with their primary contexts, streams and events.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "device/driver.h"
#include "mutex.h"
#include "result.h"

namespace weightlift::convert {
struct KernelImage;
}

namespace weightlift::device {

// One device of this process. Retains its primary context (which torch uses too) until the process
// ends. Made at first use and never destroyed, because copies may be in flight at exit.
class Device {
 public:
  // kNoSuchDevice states the number of devices. kForkedProcess in a child of a process that has
  // used CUDA: the driver supports fork() only before that, or followed by exec().
  [[nodiscard]] static Result<Device*> get(int ordinal);
  [[nodiscard]] static Result<int> count();
  // Whether any code of this process has made the device's context. Makes none and does not start
  // the driver.
  [[nodiscard]] static bool is_in_use(int ordinal);

  [[nodiscard]] int ordinal() const noexcept { return ordinal_; }
  [[nodiscard]] const Driver& driver() const noexcept { return *driver_; }
  [[nodiscard]] CUcontext context() const noexcept { return context_; }
  [[nodiscard]] std::string name() const;
  // The NUMA node to which the device is attached; -1 if the driver does not say.
  [[nodiscard]] int node() const noexcept { return node_; }
  // Whether the device reads this process's memory through the host's page tables, as GH200 and
  // GB200 do. It can then copy from memory that is not pinned.
  [[nodiscard]] bool uses_host_page_tables() const noexcept { return uses_host_page_tables_; }

  // The scatter kernel (convert/scatter.h), loaded at first use. If it cannot be loaded, the error
  // says why, and later calls return the same error.
  [[nodiscard]] Result<CUfunction> scatter_kernel();
  // Whether scatter_kernel() was called, so that the kernel is loaded, being loaded or refused.
  // Does not start the driver.
  [[nodiscard]] static bool kernel_is_requested(int ordinal);
  // The image that was loaded, such as "sm_90, by ptxas 12.9.86". Empty before that.
  [[nodiscard]] std::string kernel_form();

 private:
  friend void forget_devices() noexcept;
  Device(const Driver& table, int ordinal, CUdevice handle)
      : driver_(&table), ordinal_(ordinal), handle_(handle) {}

  [[nodiscard]] Result<CUfunction> load_kernel() WL_REQUIRES(kernel_mutex_);
  [[nodiscard]] Result<CUfunction> load_image(const convert::KernelImage& image)
      WL_REQUIRES(kernel_mutex_);

  const Driver* driver_;
  int ordinal_;
  CUdevice handle_;
  CUcontext context_ = nullptr;
  int node_ = -1;
  bool uses_host_page_tables_ = false;
  std::atomic<bool> kernel_is_requested_ = false;  // read while kernel_mutex_ is held to load it
  Mutex kernel_mutex_;
  CUmodule module_ WL_GUARDED_BY(kernel_mutex_) = nullptr;
  std::optional<Result<CUfunction>> kernel_ WL_GUARDED_BY(kernel_mutex_);
  std::string kernel_form_ WL_GUARDED_BY(kernel_mutex_);
};

// For a scope, this thread's calls do not break a graph capture in this process: no call of the
// engine belongs to one (cuThreadExchangeStreamCaptureMode).
class OutsideCaptures {
 public:
  explicit OutsideCaptures(const Driver& driver) noexcept
      : driver_(driver),
        changed_(driver.cuThreadExchangeStreamCaptureMode(&mode_) == CUDA_SUCCESS) {}
  OutsideCaptures(const OutsideCaptures&) = delete;
  OutsideCaptures& operator=(const OutsideCaptures&) = delete;
  ~OutsideCaptures() {
    if (changed_) driver_.cuThreadExchangeStreamCaptureMode(&mode_);
  }

 private:
  const Driver& driver_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;  // then the mode to restore
  bool changed_;
};

// Makes a device's context current on the calling thread for a scope, outside of captures.
class CurrentContext {
 public:
  explicit CurrentContext(Device& device)
      : device_(device),
        outside_captures_(device.driver()),
        result_(device.driver().cuCtxPushCurrent(device.context())) {}
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;
  ~CurrentContext();

  [[nodiscard]] bool ok() const noexcept { return result_ == CUDA_SUCCESS; }
  [[nodiscard]] Status status() const {
    return check(device_.driver(), result_, "cuCtxPushCurrent");
  }

 private:
  Device& device_;
  OutsideCaptures outside_captures_;
  CUresult result_;
};

// A stream that does not wait for the legacy default stream.
class Stream {
 public:
  [[nodiscard]] static Result<Stream> create(Device& device);
  Stream(Stream&& other) noexcept
      : device_(other.device_), stream_(std::exchange(other.stream_, nullptr)) {}
  Stream& operator=(Stream&& other) = delete;
  ~Stream();

  [[nodiscard]] CUstream get() const noexcept { return stream_; }

  // An error if a stream of the caller is part of a graph capture: copies ordered after it would be
  // recorded and not run.
  [[nodiscard]] static Status check_not_capturing(Device& device, CUstream stream);

 private:
  Stream(Device& device, CUstream stream) : device_(&device), stream_(stream) {}

  Device* device_;
  CUstream stream_;
};

// An event without timing. Threads that wait for it sleep.
class Event {
 public:
  [[nodiscard]] static Result<Event> create(Device& device);
  Event(Event&& other) noexcept
      : device_(other.device_), event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) = delete;
  ~Event();

  [[nodiscard]] Status record(CUstream stream);
  [[nodiscard]] Status wait() const;  // for the work before the last record()
  [[nodiscard]] CUevent get() const noexcept { return event_; }

 private:
  Event(Device& device, CUevent event) : device_(&device), event_(event) {}

  Device* device_;
  CUevent event_;
};

// Whether this process itself has used the driver. False in a child of a process that has.
[[nodiscard]] bool uses_driver() noexcept;

// Waits for every device that any code of this process uses: before memory is unpinned, torch may
// still copy from it, and torch records no event for memory that it did not allocate. Returns false
// if a graph capture on a device forbids the wait. Ignores errors of a driver that is shut down.
bool wait_for_devices() noexcept;

#ifdef WEIGHTLIFT_TESTING
void forget_devices() noexcept;  // for device/testing.cc: releases the contexts
#endif

}  // namespace weightlift::device
