// The driver's functions. Each calls simulator.cc through Simulator::call, which has the common
// parts: the lock, the counts, injected faults, initialisation, the current context.
#include <cuda.h>
#include <cudaTypedefs.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "simulator.h"
#include "text.h"

using weightlift::simulated::Copy;
using weightlift::simulated::Device;
using weightlift::simulated::kContext;
using weightlift::simulated::kInitialised;
using weightlift::simulated::kNothing;
using weightlift::simulated::kPush;
using weightlift::simulated::kRelaxing;
using weightlift::simulated::kRelease;
using weightlift::simulated::kReleaseInContext;
using weightlift::simulated::kUncounted;
using weightlift::simulated::Simulator;
using weightlift::simulated::text;

namespace {

using Lock = Simulator::Lock;

Simulator& sim() {
  return Simulator::instance();
}

std::uint64_t number(const void* pointer) {
  return reinterpret_cast<std::uint64_t>(pointer);
}

#define SIM_ERRORS(X)                                                                          \
  X(CUDA_SUCCESS, "no error")                                                                  \
  X(CUDA_ERROR_INVALID_VALUE, "invalid argument")                                              \
  X(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")                                                 \
  X(CUDA_ERROR_NOT_INITIALIZED, "initialization error")                                        \
  X(CUDA_ERROR_DEINITIALIZED, "driver shutting down")                                          \
  X(CUDA_ERROR_STUB_LIBRARY, "CUDA driver is a stub library")                                  \
  X(CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA-capable device(s) is/are busy or unavailable")        \
  X(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected")                                \
  X(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal")                                       \
  X(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid")                                \
  X(CUDA_ERROR_INVALID_CONTEXT, "invalid device context")                                      \
  X(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution")                \
  X(CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error encountered")                       \
  X(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed")                                    \
  X(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the provided PTX has an unsupported version")         \
  X(CUDA_ERROR_INVALID_SOURCE, "device kernel image is invalid")                               \
  X(CUDA_ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported")                  \
  X(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle")                                      \
  X(CUDA_ERROR_NOT_FOUND, "named symbol not found")                                            \
  X(CUDA_ERROR_NOT_READY, "device not ready")                                                  \
  X(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")                    \
  X(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed")                                   \
  X(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "memory is already registered")                 \
  X(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "memory is not registered")                         \
  X(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure")                                    \
  X(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address")                                       \
  X(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing") \
  X(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,                                                     \
    "operation failed due to a previous error during capture")                                 \
  X(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,                                                        \
    "operation would make the legacy stream depend on a capturing blocking stream")            \
  X(CUDA_ERROR_NOT_PERMITTED, "operation not permitted")                                       \
  X(CUDA_ERROR_NOT_SUPPORTED, "operation not supported")                                       \
  X(CUDA_ERROR_SYSTEM_NOT_READY, "system not yet initialized")                                 \
  X(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "system has unsupported driver / library")              \
  X(CUDA_ERROR_UNKNOWN, "unknown error")

CUresult error_text(CUresult error, const char** is, bool name) {
  if (is == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *is = nullptr;
  switch (error) {
#define SIM_ERROR_CASE(code, description) \
  case code:                              \
    *is = name ? #code : description;     \
    return CUDA_SUCCESS;
    SIM_ERRORS(SIM_ERROR_CASE)
#undef SIM_ERROR_CASE
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

struct Batch {
  CUdeviceptr* targets;
  CUdeviceptr* sources;
  size_t* bytes;
  size_t count;
};

CUresult copy_batch(const Batch& batch, CUmemcpyAttributes* attributes, size_t* attribute_starts,
                    size_t attribute_count, CUstream stream) {
  return sim().call("cuMemcpyBatchAsync", kContext, [&](Lock& lock) {
    // "Must not be legacy NULL stream."
    if (stream == nullptr || stream == CU_STREAM_LEGACY) return CUDA_ERROR_INVALID_VALUE;
    if (batch.targets == nullptr || batch.sources == nullptr || batch.bytes == nullptr ||
        batch.count == 0 || attributes == nullptr || attribute_starts == nullptr ||
        attribute_count == 0 || attribute_count > batch.count || attribute_starts[0] != 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    std::vector<Copy> copies;
    copies.reserve(batch.count);
    std::size_t attribute = 0;
    for (std::size_t i = 0; i < batch.count; ++i) {
      while (attribute + 1 < attribute_count && attribute_starts[attribute + 1] <= i) {
        if (attribute_starts[attribute + 1] <= attribute_starts[attribute]) {
          return CUDA_ERROR_INVALID_VALUE;
        }
        ++attribute;
      }
      const CUmemcpySrcAccessOrder order = attributes[attribute].srcAccessOrder;
      if (order < CU_MEMCPY_SRC_ACCESS_ORDER_STREAM || order > CU_MEMCPY_SRC_ACCESS_ORDER_ANY) {
        return CUDA_ERROR_INVALID_VALUE;
      }
      copies.push_back(Copy{batch.targets[i], batch.sources[i], batch.bytes[i], order});
    }
    if (attribute + 1 != attribute_count) return CUDA_ERROR_INVALID_VALUE;
    return sim().copy("cuMemcpyBatchAsync", stream, std::move(copies), Simulator::Direction::kAny,
                      lock);
  });
}

// The form of CUDA 12.8 and 12.9, which says which copy was refused: "The value will be SIZE_MAX if
// the error doesn't pertain to any specific copy" (cuda.h of 12.9).
CUresult copy_batch_12080(CUdeviceptr* targets, CUdeviceptr* sources, size_t* bytes, size_t count,
                          CUmemcpyAttributes* attributes, size_t* attribute_starts,
                          size_t attribute_count, size_t* failed, CUstream stream) {
  if (failed == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *failed = SIZE_MAX;
  return copy_batch({targets, sources, bytes, count}, attributes, attribute_starts, attribute_count,
                    stream);
}

}  // namespace

extern "C" {

CUresult CUDAAPI cuInit(unsigned int flags) {
  return sim().call("cuInit", kNothing,
                    [&](Lock&) { return flags != 0 ? CUDA_ERROR_INVALID_VALUE : sim().init(); });
}

CUresult CUDAAPI cuDriverGetVersion(int* version) {
  return sim().call("cuDriverGetVersion", kNothing, [&](Lock&) {
    if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *version = sim().version();
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuGetErrorName(CUresult error, const char** text) {
  return error_text(error, text, true);
}

CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
  return error_text(error, text, false);
}

CUresult CUDAAPI cuDeviceGetCount(int* count) {
  return sim().call("cuDeviceGetCount", kInitialised, [&](Lock&) {
    if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *count = sim().device_count();
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  return sim().call("cuDeviceGet", kInitialised, [&](Lock&) {
    if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (sim().device(ordinal) == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceGetName(char* name, int length, CUdevice device) {
  return sim().call("cuDeviceGetName", kInitialised, [&](Lock&) {
    if (name == nullptr || length <= 0) return CUDA_ERROR_INVALID_VALUE;
    if (sim().device(device) == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    const std::string is = "Simulated " + std::to_string(device);
    const std::size_t count = std::min(is.size(), static_cast<std::size_t>(length) - 1);
    std::memcpy(name, is.data(), count);
    name[count] = '\0';
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return sim().call("cuDeviceGetAttribute", kInitialised, [&](Lock&) {
    if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (sim().device(device) == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    *value = sim().attribute(device, attribute);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceTotalMem(size_t* bytes, CUdevice device) {
  return sim().call("cuDeviceTotalMem", kInitialised, [&](Lock&) {
    if (bytes == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const Device* is = sim().device(device);
    if (is == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = is->memory.limit();
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return sim().call("cuDevicePrimaryCtxRetain", kInitialised,
                    [&](Lock&) { return sim().retain(context, device); });
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice device) {
  return sim().call("cuDevicePrimaryCtxRelease", kRelease,
                    [&](Lock&) { return sim().release(device); });
}

CUresult CUDAAPI cuDevicePrimaryCtxGetState(CUdevice device, unsigned int* flags, int* active) {
  return sim().call("cuDevicePrimaryCtxGetState", kInitialised, [&](Lock&) {
    if (flags == nullptr || active == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const Device* is = sim().device(device);
    if (is == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    *flags = 0;
    *active = is->active() ? 1 : 0;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxPushCurrent(CUcontext context) {
  return sim().call("cuCtxPushCurrent", kPush, [&](Lock&) { return sim().push(context); });
}

CUresult CUDAAPI cuCtxPopCurrent(CUcontext* context) {
  return sim().call("cuCtxPopCurrent", kRelease, [&](Lock&) { return sim().pop(context); });
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
  return sim().call("cuCtxSetCurrent", kInitialised,
                    [&](Lock&) { return sim().set_current(context); });
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
  return sim().call("cuCtxGetCurrent", kInitialised, [&](Lock&) {
    if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const auto current = sim().current();
    *context = current ? sim().context_handle(*current) : nullptr;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxGetDevice(CUdevice* device) {
  return sim().call("cuCtxGetDevice", kContext, [&](Lock&) {
    if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *device = *sim().current();
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxSynchronize() {
  return sim().call("cuCtxSynchronize", kContext,
                    [&](Lock& lock) { return sim().context_synchronize(lock); });
}

CUresult CUDAAPI cuStreamCreate(CUstream* stream, unsigned int flags) {
  return sim().call("cuStreamCreate", kContext,
                    [&](Lock&) { return sim().stream_create(stream, flags); });
}

CUresult CUDAAPI cuStreamDestroy(CUstream stream) {
  return sim().call("cuStreamDestroy", kReleaseInContext,
                    [&](Lock&) { return sim().stream_destroy(stream); });
}

CUresult CUDAAPI cuStreamSynchronize(CUstream stream) {
  return sim().call("cuStreamSynchronize", kContext,
                    [&](Lock& lock) { return sim().stream_synchronize(stream, lock); });
}

CUresult CUDAAPI cuStreamQuery(CUstream stream) {
  return sim().call("cuStreamQuery", kContext, [&](Lock&) { return sim().stream_query(stream); });
}

CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
  return sim().call("cuStreamWaitEvent", kContext,
                    [&](Lock&) { return sim().stream_wait(stream, event, flags); });
}

CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  return sim().call("cuThreadExchangeStreamCaptureMode", kRelaxing,
                    [&](Lock&) { return sim().exchange_capture_mode(mode); });
}

CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return sim().call("cuStreamIsCapturing", kContext,
                    [&](Lock&) { return sim().is_capturing(stream, status); });
}

CUresult CUDAAPI cuEventCreate(CUevent* event, unsigned int flags) {
  return sim().call("cuEventCreate", kContext,
                    [&](Lock&) { return sim().event_create(event, flags); });
}

CUresult CUDAAPI cuEventDestroy(CUevent event) {
  return sim().call("cuEventDestroy", kReleaseInContext,
                    [&](Lock&) { return sim().event_destroy(event); });
}

CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
  return sim().call("cuEventRecord", kContext,
                    [&](Lock&) { return sim().event_record(event, stream); });
}

CUresult CUDAAPI cuEventSynchronize(CUevent event) {
  return sim().call("cuEventSynchronize", kContext,
                    [&](Lock& lock) { return sim().event_synchronize(event, lock); });
}

CUresult CUDAAPI cuEventQuery(CUevent event) {
  return sim().call("cuEventQuery", kContext, [&](Lock&) { return sim().event_query(event); });
}

CUresult CUDAAPI cuMemAlloc(CUdeviceptr* pointer, size_t bytes) {
  return sim().call("cuMemAlloc", kContext, [&](Lock&) { return sim().mem_alloc(pointer, bytes); });
}

CUresult CUDAAPI cuMemFree(CUdeviceptr pointer) {
  return sim().call("cuMemFree", kReleaseInContext, [&](Lock&) { return sim().mem_free(pointer); });
}

CUresult CUDAAPI cuMemGetInfo(size_t* available, size_t* total) {
  return sim().call("cuMemGetInfo", kContext,
                    [&](Lock&) { return sim().mem_info(available, total); });
}

CUresult CUDAAPI cuMemHostRegister(void* address, size_t bytes, unsigned int flags) {
  return sim().call("cuMemHostRegister", kContext,
                    [&](Lock&) { return sim().host_register(address, bytes, flags); });
}

CUresult CUDAAPI cuMemHostUnregister(void* address) {
  return sim().call("cuMemHostUnregister", kReleaseInContext,
                    [&](Lock&) { return sim().host_unregister(address); });
}

CUresult CUDAAPI cuMemHostAlloc(void** address, size_t bytes, unsigned int flags) {
  return sim().call("cuMemHostAlloc", kContext,
                    [&](Lock&) { return sim().host_alloc(address, bytes, flags); });
}

CUresult CUDAAPI cuMemFreeHost(void* address) {
  return sim().call("cuMemFreeHost", kReleaseInContext,
                    [&](Lock&) { return sim().host_free(address); });
}

CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr target, const void* source, size_t bytes,
                                   CUstream stream) {
  return sim().call("cuMemcpyHtoDAsync", kContext, [&](Lock& lock) {
    return sim().copy("cuMemcpyHtoDAsync", stream, {Copy{target, number(source), bytes}},
                      Simulator::Direction::kHostToDevice, lock);
  });
}

CUresult CUDAAPI cuMemcpyDtoHAsync(void* target, CUdeviceptr source, size_t bytes,
                                   CUstream stream) {
  return sim().call("cuMemcpyDtoHAsync", kContext, [&](Lock& lock) {
    return sim().copy("cuMemcpyDtoHAsync", stream, {Copy{number(target), source, bytes}},
                      Simulator::Direction::kDeviceToHost, lock);
  });
}

CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes,
                                   CUstream stream) {
  return sim().call("cuMemcpyDtoDAsync", kContext, [&](Lock& lock) {
    return sim().copy("cuMemcpyDtoDAsync", stream, {Copy{target, source, bytes}},
                      Simulator::Direction::kDeviceToDevice, lock);
  });
}

CUresult CUDAAPI cuMemcpyBatchAsync(CUdeviceptr* targets, CUdeviceptr* sources, size_t* bytes,
                                    size_t count, CUmemcpyAttributes* attributes,
                                    size_t* attribute_starts, size_t attribute_count,
                                    CUstream stream) {
  return copy_batch({targets, sources, bytes, count}, attributes, attribute_starts, attribute_count,
                    stream);
}

CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void* image) {
  return sim().call("cuModuleLoadData", kContext,
                    [&](Lock&) { return sim().module_load(module, image); });
}

CUresult CUDAAPI cuModuleUnload(CUmodule module) {
  return sim().call("cuModuleUnload", kReleaseInContext,
                    [&](Lock&) { return sim().module_unload(module); });
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return sim().call("cuModuleGetFunction", kContext,
                    [&](Lock&) { return sim().module_function(function, module, name); });
}

CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                                unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                                unsigned int block_z, unsigned int /*shared_bytes*/,
                                CUstream stream, void** parameters, void** extra) {
  return sim().call("cuLaunchKernel", kContext, [&](Lock&) {
    if (extra != nullptr || parameters == nullptr) return CUDA_ERROR_INVALID_VALUE;
    return sim().launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, stream,
                        parameters);
  });
}

}  // extern "C"

namespace {

struct Form {
  std::string_view name;
  int version;
};
// All forms of all functions that cudaTypedefs.h declares.
constexpr Form kForms[] = {
#include "symbols.inc"
};

// The newest form that came with CUDA `version` or earlier; null if there is none.
const Form* newest_form(std::string_view name, int version) {
  const Form* newest = nullptr;
  for (const Form& form : kForms) {
    if (form.name != name || form.version > version) continue;
    if (newest == nullptr || form.version > newest->version) newest = &form;
  }
  return newest;
}

// The simulated functions: the forms that cuda.h declares by these names, and the batch copy of
// 12.8.
// clang-format off
#define SIM_FUNCTIONS(X) \
  X(cuInit, 2000) X(cuDriverGetVersion, 2020) X(cuGetErrorName, 6000) X(cuGetErrorString, 6000) \
  X(cuGetProcAddress, 12000) X(cuDeviceGetCount, 2000) X(cuDeviceGet, 2000) \
  X(cuDeviceGetName, 2000) X(cuDeviceGetAttribute, 2000) X(cuDeviceTotalMem, 3020) \
  X(cuDevicePrimaryCtxRetain, 7000) X(cuDevicePrimaryCtxRelease, 11000) \
  X(cuDevicePrimaryCtxGetState, 7000) X(cuCtxPushCurrent, 4000) X(cuCtxPopCurrent, 4000) \
  X(cuCtxSetCurrent, 4000) X(cuCtxGetCurrent, 4000) X(cuCtxGetDevice, 2000) \
  X(cuCtxSynchronize, 2000) X(cuStreamCreate, 2000) X(cuStreamDestroy, 4000) \
  X(cuStreamSynchronize, 2000) X(cuStreamQuery, 2000) X(cuStreamWaitEvent, 3020) \
  X(cuEventCreate, 2000) X(cuEventDestroy, 4000) X(cuEventRecord, 2000) \
  X(cuEventSynchronize, 2000) X(cuEventQuery, 2000) X(cuMemAlloc, 3020) X(cuMemFree, 3020) \
  X(cuMemGetInfo, 3020) X(cuMemcpyHtoDAsync, 3020) X(cuMemcpyDtoHAsync, 3020) \
  X(cuMemcpyDtoDAsync, 3020) X(cuMemcpyBatchAsync, 13000) X(cuMemHostAlloc, 2020) \
  X(cuMemFreeHost, 2000) X(cuMemHostRegister, 6050) X(cuMemHostUnregister, 4000) \
  X(cuModuleLoadData, 2000) X(cuModuleUnload, 2000) X(cuModuleGetFunction, 2000) \
  X(cuLaunchKernel, 4000) X(cuThreadExchangeStreamCaptureMode, 10010) \
  X(cuStreamIsCapturing, 10000)
// clang-format on
#define SIM_CHECK(function, since) \
  static_assert(std::is_same_v<decltype(&::function), PFN_##function##_v##since>);
SIM_FUNCTIONS(SIM_CHECK)
#undef SIM_CHECK

void* function_of(const Form& form) {
  if (form.name == "cuMemcpyBatchAsync" && form.version == 12080) {
    return reinterpret_cast<void*>(&copy_batch_12080);
  }
#define SIM_FUNCTION(function, since)                      \
  if (form.name == #function && form.version == (since)) { \
    return reinterpret_cast<void*>(&::function);           \
  }
  SIM_FUNCTIONS(SIM_FUNCTION)
#undef SIM_FUNCTION
  return nullptr;
}

// A driver before 13.0 may return its newest form: its documentation does not say what happens if a
// newer version is requested.
CUresult find_function(std::string_view name, int version, void** function,
                       CUdriverProcAddressQueryResult& status) {
  status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  if (version > sim().version() && sim().version() >= 13000) {
    // "If the specified CUDA version is greater than the driver version, the API will return
    // CUDA_ERROR_INVALID_VALUE."
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (const auto how = sim().hidden(std::string(name))) {
    return *how == SIM_HIDE_NULL ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
  }
  const Form* const form = newest_form(name, std::min(version, sim().version()));
  if (form == nullptr) {
    if (newest_form(name, sim().version()) == nullptr) return CUDA_ERROR_NOT_FOUND;
    status = CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
    return CUDA_ERROR_NOT_FOUND;
  }
  if (const Form* const asked = newest_form(name, version); asked != form) {
    sim().report(text("symbol: {} is asked for in its form of {}, and this driver has that of {}",
                      name, asked->version, form->version));
  }
  *function = function_of(*form);
  if (*function == nullptr) {
    sim().report(text("symbol: {} is asked for in its form of {}, which is not cuda.h's", name,
                      form->version));
    return CUDA_ERROR_NOT_FOUND;
  }
  status = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult CUDAAPI cuGetProcAddress(const char* symbol, void** function, int version,
                                  cuuint64_t /*flags*/, CUdriverProcAddressQueryResult* status) {
  return sim().call("cuGetProcAddress", kUncounted, [&](Lock&) {
    if (symbol == nullptr || function == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *function = nullptr;
    CUdriverProcAddressQueryResult found{};
    const CUresult result = find_function(symbol, version, function, found);
    if (status != nullptr) *status = found;
    return result;
  });
}

}  // extern "C"
