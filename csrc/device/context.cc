#include "device/context.h"

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <ranges>
#include <string>
#include <utility>

#include "convert/scatter.h"
#include "device/driver.h"
#include "mutex.h"
#include "result.h"

namespace weightlift::device {
namespace {

struct Registry {
  Mutex mutex;
  std::atomic<pid_t> process = 0;  // the one that has used the driver
  std::map<int, std::unique_ptr<Device>> devices WL_GUARDED_BY(mutex);
};

Registry& registry() {
  static auto* const instance = new Registry;  // outlives every other static
  return *instance;
}

Error forked() {
  return {.code = ErrorCode::kForkedProcess,
          .message =
              "this process was forked from one that had used CUDA, which the CUDA driver "
              "does not support: start processes with the 'spawn' method"};
}

// Call it before taking a lock: a lock that another thread held during fork() stays locked.
Status check_not_forked(const Registry& state) {
  const pid_t process = state.process.load();
  if (process != 0 && process != ::getpid()) return forked();
  return {};
}

Result<const Driver*> initialized_driver(Registry& state) {
  WL_ASSIGN_OR_RETURN(const Driver* table, driver());
  const OutsideCaptures outside(*table);
  WL_RETURN_IF_ERROR(check(*table, table->cuInit(0), "cuInit"));
  state.process = ::getpid();
  return table;
}

Result<int> count_devices(const Driver& table) {
  int count = 0;
  WL_RETURN_IF_ERROR(check(table, table.cuDeviceGetCount(&count), "cuDeviceGetCount"));
  return count;
}

}  // namespace

Result<int> Device::count() {
  Registry& state = registry();
  WL_RETURN_IF_ERROR(check_not_forked(state));
  const MutexLock lock(state.mutex);
  WL_ASSIGN_OR_RETURN(const Driver* table, initialized_driver(state));
  return count_devices(*table);
}

bool Device::is_in_use(int ordinal) {
  if (!check_not_forked(registry()).ok()) return false;
  const auto table = device::driver();
  if (!table.ok()) return false;
  const Driver& calls = **table;
  const OutsideCaptures outside(calls);
  CUdevice handle = 0;
  unsigned flags = 0;
  int in_use = 0;
  return calls.cuDeviceGet(&handle, ordinal) == CUDA_SUCCESS &&
         calls.cuDevicePrimaryCtxGetState(handle, &flags, &in_use) == CUDA_SUCCESS && in_use != 0;
}

Result<Device*> Device::get(int ordinal) {
  Registry& state = registry();
  WL_RETURN_IF_ERROR(check_not_forked(state));
  const MutexLock lock(state.mutex);
  WL_ASSIGN_OR_RETURN(const Driver* table, initialized_driver(state));
  const auto found = state.devices.find(ordinal);
  if (found != state.devices.end()) return found->second.get();
  WL_ASSIGN_OR_RETURN(const int count, count_devices(*table));
  if (ordinal < 0 || ordinal >= count) {
    return Error{.code = ErrorCode::kNoSuchDevice,
                 .message = "there is no device cuda:" + std::to_string(ordinal) +
                            ": this process sees " + std::to_string(count) +
                            " (CUDA_VISIBLE_DEVICES may hide some)"};
  }
  const OutsideCaptures outside(*table);
  CUdevice handle = 0;
  WL_RETURN_IF_ERROR(check(*table, table->cuDeviceGet(&handle, ordinal), "cuDeviceGet"));
  // Allocates first: nothing may throw between retaining the context and giving it to its owner.
  std::map<int, std::unique_ptr<Device>> made;
  made.emplace(ordinal, std::unique_ptr<Device>(new Device(*table, ordinal, handle)));
  Device* const device = made.begin()->second.get();
  int node = -1;  // since CUDA 12.2
  if (table->cuDeviceGetAttribute(&node, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, handle) ==
      CUDA_SUCCESS) {
    device->node_ = node;
  }
  // A driver that does not know the attribute supports no such device.
  int shared = 0;
  device->uses_host_page_tables_ =
      table->cuDeviceGetAttribute(&shared,
                                  CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES,
                                  handle) == CUDA_SUCCESS &&
      shared != 0;
  WL_RETURN_IF_ERROR(check(*table, table->cuDevicePrimaryCtxRetain(&device->context_, handle),
                           "cuDevicePrimaryCtxRetain"));
  state.devices.merge(made);
  return device;
}

std::string Device::name() const {
  char text[256] = {};
  if (driver_->cuDeviceGetName(text, sizeof text - 1, handle_) != CUDA_SUCCESS) return "unknown";
  return text;
}

Result<CUfunction> Device::scatter_kernel() {
  kernel_is_requested_ = true;
  const MutexLock lock(kernel_mutex_);
  if (!kernel_) kernel_ = load_kernel();
  return *kernel_;
}

bool Device::kernel_is_requested(int ordinal) {
  Registry& state = registry();
  if (!check_not_forked(state).ok()) return false;  // in a child the lock may stay locked for ever
  const MutexLock lock(state.mutex);
  const auto found = state.devices.find(ordinal);
  return found != state.devices.end() && found->second->kernel_is_requested_;
}

std::string Device::kernel_form() {
  const MutexLock lock(kernel_mutex_);
  return kernel_form_;
}

// Loads the first image that the driver accepts: machine code before PTX, newer before older.
Result<CUfunction> Device::load_kernel() {
  const auto images = convert::scatter_images();
  if (images.empty()) {
    return Error{.code = ErrorCode::kDriverCallFailed,
                 .message =
                     "this build of weightlift has no CUDA kernels, because nvcc was missing: "
                     "install a wheel, or build it with nvcc"};
  }
  int major = 0;
  int minor = 0;
  const auto ask = [this](int& value, CUdevice_attribute attribute) {
    return check(*driver_, driver_->cuDeviceGetAttribute(&value, attribute, handle_),
                 "cuDeviceGetAttribute");
  };
  WL_RETURN_IF_ERROR(ask(major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR));
  WL_RETURN_IF_ERROR(ask(minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR));
  const CurrentContext current(*this);
  WL_RETURN_IF_ERROR(current.status());
  std::optional<Error> refusal;
  for (const bool ptx : {false, true}) {
    for (const convert::KernelImage& image : std::views::reverse(images)) {
      if (image.is_ptx != ptx || !convert::runs_on(image, 10 * major + minor)) continue;
      auto function = load_image(image);
      if (function.ok()) return function;
      if (!refusal) refusal = std::move(function).error();
    }
  }
  if (refusal) return *std::move(refusal);
  return Error{.code = ErrorCode::kDriverCallFailed,
               .message = "this build of weightlift has no CUDA kernel for compute capability " +
                          std::to_string(major) + "." + std::to_string(minor) +
                          ": install a newer weightlift"};
}

Result<CUfunction> Device::load_image(const convert::KernelImage& image) {
  std::string form = "sm_" + std::to_string(image.architecture);
  form =
      image.is_ptx ? "PTX for " + form + ", compiled by the driver" : form + ", by " + image.maker;
  const auto refused = [&](CUresult result, const char* call) {
    Status status = check(*driver_, result, call);
    status.error().message = form + ": " + status.error().message;
    return std::move(status).error();
  };
  struct Module {
    const Driver& driver;
    CUmodule handle = nullptr;
    ~Module() {
      if (handle != nullptr) driver.cuModuleUnload(handle);
    }
  } loaded{*driver_};
  CUresult result = driver_->cuModuleLoadData(&loaded.handle, image.bytes.data());
  if (result != CUDA_SUCCESS) return refused(result, "cuModuleLoadData");
  CUfunction function = nullptr;
  result = driver_->cuModuleGetFunction(&function, loaded.handle, convert::kScatterKernel);
  if (result != CUDA_SUCCESS) return refused(result, "cuModuleGetFunction");
  module_ = std::exchange(loaded.handle, nullptr);
  kernel_form_ = std::move(form);
  return function;
}

namespace {

// Synchronising a context breaks the captures of its streams, in any mode. For streams that wait
// for the default stream, cuStreamIsCapturing can tell first ("The blocking stream capture is not
// invalidated"); for other streams no call can.
bool synchronize(const Driver& table) noexcept {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  if (table.cuStreamIsCapturing(CU_STREAM_LEGACY, &status) == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) {
    return false;
  }
  return table.cuCtxSynchronize() != CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

}  // namespace

bool uses_driver() noexcept {
  return registry().process.load() == ::getpid();
}

// Makes no Device objects, which would need memory: destructors call this.
bool wait_for_devices() noexcept {
  if (!uses_driver()) return true;
  const Driver& table = **driver();
  const OutsideCaptures outside(table);
  int count = 0;
  if (table.cuDeviceGetCount(&count) != CUDA_SUCCESS) return true;
  bool waited = true;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    CUdevice handle = 0;
    unsigned flags = 0;
    int in_use = 0;
    CUcontext context = nullptr;
    if (table.cuDeviceGet(&handle, ordinal) != CUDA_SUCCESS) continue;
    if (table.cuDevicePrimaryCtxGetState(handle, &flags, &in_use) != CUDA_SUCCESS) continue;
    if (in_use == 0 || table.cuDevicePrimaryCtxRetain(&context, handle) != CUDA_SUCCESS) continue;
    if (table.cuCtxPushCurrent(context) == CUDA_SUCCESS) {
      if (!synchronize(table)) waited = false;
      table.cuCtxPopCurrent(&context);
    }
    table.cuDevicePrimaryCtxRelease(handle);
  }
  return waited;
}

CurrentContext::~CurrentContext() {
  CUcontext popped = nullptr;
  if (ok()) device_.driver().cuCtxPopCurrent(&popped);
}

Result<Stream> Stream::create(Device& device) {
  const CurrentContext current(device);
  WL_RETURN_IF_ERROR(current.status());
  CUstream stream = nullptr;
  WL_RETURN_IF_ERROR(check(device.driver(),
                           device.driver().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING),
                           "cuStreamCreate"));
  return Stream(device, stream);
}

Status Stream::check_not_capturing(Device& device, CUstream stream) {
  const CurrentContext current(device);
  WL_RETURN_IF_ERROR(current.status());
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = device.driver().cuStreamIsCapturing(stream, &status);
  // Returned for the default stream while a stream that synchronises with it is capturing.
  const bool implied = result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  if (!implied) WL_RETURN_IF_ERROR(check(device.driver(), result, "cuStreamIsCapturing"));
  if (!implied && status == CU_STREAM_CAPTURE_STATUS_NONE) return {};
  return Error{.code = ErrorCode::kDriverCallFailed,
               .message = "the current stream of cuda:" + std::to_string(device.ordinal()) +
                          " is capturing a CUDA graph (cuStreamIsCapturing), which would record "
                          "the copies and not run them: load before the capture, or on another "
                          "stream"};
}

Stream::~Stream() {
  if (stream_ == nullptr) return;
  const CurrentContext current(*device_);
  if (current.ok()) device_->driver().cuStreamDestroy(stream_);
}

Result<Event> Event::create(Device& device) {
  const CurrentContext current(device);
  WL_RETURN_IF_ERROR(current.status());
  CUevent event = nullptr;
  WL_RETURN_IF_ERROR(
      check(device.driver(),
            device.driver().cuEventCreate(&event, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC),
            "cuEventCreate"));
  return Event(device, event);
}

Event::~Event() {
  if (event_ == nullptr) return;
  const CurrentContext current(*device_);
  if (current.ok()) device_->driver().cuEventDestroy(event_);
}

Status Event::record(CUstream stream) {
  const CurrentContext current(*device_);
  WL_RETURN_IF_ERROR(current.status());
  return check(device_->driver(), device_->driver().cuEventRecord(event_, stream), "cuEventRecord");
}

Status Event::wait() const {
  const CurrentContext current(*device_);
  WL_RETURN_IF_ERROR(current.status());
  return check(device_->driver(), device_->driver().cuEventSynchronize(event_),
               "cuEventSynchronize");
}

#ifdef WEIGHTLIFT_TESTING
void forget_devices() noexcept {
  Registry& state = registry();
  const MutexLock lock(state.mutex);
  for (auto& [ordinal, device] : state.devices) {
    const MutexLock kernel_lock(device->kernel_mutex_);
    if (device->module_ != nullptr) {
      const CurrentContext current(*device);
      device->driver().cuModuleUnload(device->module_);
    }
    device->driver().cuDevicePrimaryCtxRelease(device->handle_);
  }
  state.devices.clear();
  state.process = 0;
}
#endif

}  // namespace weightlift::device
