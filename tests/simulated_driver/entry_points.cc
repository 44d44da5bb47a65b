// The driver's own functions. Each is its work in simulator.cc behind what all have in common
// (Simulator::call): the lock, the counts, injected faults, initialisation, the current context.
#include <cuda.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "device/driver.h"  // the list of functions, nothing else
#include "simulator.h"

using weightlift::simulated::Copy;
using weightlift::simulated::Device;
using weightlift::simulated::kContext;
using weightlift::simulated::kInitialised;
using weightlift::simulated::kNothing;
using weightlift::simulated::kPush;
using weightlift::simulated::kRelease;
using weightlift::simulated::kReleaseInContext;
using weightlift::simulated::kUncounted;
using weightlift::simulated::Simulator;

namespace {

using Lock = Simulator::Lock;

Simulator& sim() {
  return Simulator::instance();
}

std::uint64_t number(const void* pointer) {
  return reinterpret_cast<std::uint64_t>(pointer);
}

#define SIM_ERRORS(X)                                                                   \
  X(CUDA_SUCCESS, "no error")                                                           \
  X(CUDA_ERROR_INVALID_VALUE, "invalid argument")                                       \
  X(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")                                          \
  X(CUDA_ERROR_NOT_INITIALIZED, "initialization error")                                 \
  X(CUDA_ERROR_DEINITIALIZED, "driver shutting down")                                   \
  X(CUDA_ERROR_STUB_LIBRARY, "CUDA driver is a stub library")                           \
  X(CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA-capable device(s) is/are busy or unavailable") \
  X(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected")                         \
  X(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal")                                \
  X(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid")                         \
  X(CUDA_ERROR_INVALID_CONTEXT, "invalid device context")                               \
  X(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution")         \
  X(CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error encountered")                \
  X(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed")                             \
  X(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the provided PTX has an unsupported version")  \
  X(CUDA_ERROR_INVALID_SOURCE, "device kernel image is invalid")                        \
  X(CUDA_ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported")           \
  X(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle")                               \
  X(CUDA_ERROR_NOT_FOUND, "named symbol not found")                                     \
  X(CUDA_ERROR_NOT_READY, "device not ready")                                           \
  X(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")             \
  X(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed")                            \
  X(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "memory is already registered")          \
  X(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "memory is not registered")                  \
  X(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure")                             \
  X(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address")                                \
  X(CUDA_ERROR_NOT_PERMITTED, "operation not permitted")                                \
  X(CUDA_ERROR_NOT_SUPPORTED, "operation not supported")                                \
  X(CUDA_ERROR_SYSTEM_NOT_READY, "system not yet initialized")                          \
  X(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "system has unsupported driver / library")       \
  X(CUDA_ERROR_UNKNOWN, "unknown error")

CUresult error_text(CUresult error, const char** text, bool name) {
  if (text == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *text = nullptr;
  switch (error) {
#define SIM_ERROR_CASE(code, description) \
  case code:                              \
    *text = name ? #code : description;   \
    return CUDA_SUCCESS;
    SIM_ERRORS(SIM_ERROR_CASE)
#undef SIM_ERROR_CASE
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
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
    const std::string text = "Simulated " + std::to_string(device);
    const std::size_t count = std::min(text.size(), static_cast<std::size_t>(length) - 1);
    std::memcpy(name, text.data(), count);
    name[count] = '\0';
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return sim().call("cuDeviceGetAttribute", kInitialised, [&](Lock&) {
    if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const Device* is = sim().device(device);
    if (is == nullptr) return CUDA_ERROR_INVALID_DEVICE;
    if (const auto found = is->attributes.find(attribute); found != is->attributes.end()) {
      *value = found->second;
      return CUDA_SUCCESS;
    }
    switch (attribute) {
      case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *value = 9;
        break;
      case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
        *value = 132;
        break;
      case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
        *value = 3;
        break;
      case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
        *value = device + 1;
        break;
      case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
      case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
      case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
      case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
      case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
        *value = 1;
        break;
      default:
        *value = 0;
        break;
    }
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
  return sim().call("cuMemcpyBatchAsync", kContext, [&](Lock& lock) {
    // "Must not be legacy NULL stream."
    if (stream == nullptr || stream == CU_STREAM_LEGACY) return CUDA_ERROR_INVALID_VALUE;
    if (targets == nullptr || sources == nullptr || bytes == nullptr || count == 0 ||
        attributes == nullptr || attribute_starts == nullptr || attribute_count == 0 ||
        attribute_count > count || attribute_starts[0] != 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    std::vector<Copy> copies;
    copies.reserve(count);
    std::size_t attribute = 0;
    for (std::size_t i = 0; i < count; ++i) {
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
      copies.push_back(Copy{targets[i], sources[i], bytes[i], order});
    }
    if (attribute + 1 != attribute_count) return CUDA_ERROR_INVALID_VALUE;
    return sim().copy("cuMemcpyBatchAsync", stream, std::move(copies), Simulator::Direction::kAny,
                      lock);
  });
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

CUresult CUDAAPI cuGetProcAddress(const char* symbol, void** function, int version,
                                  cuuint64_t /*flags*/, CUdriverProcAddressQueryResult* status) {
  struct Entry {
    const char* name;
    int version;
    void* function;
  };
#define SIM_ENTRY(name, since) Entry{#name, since, reinterpret_cast<void*>(&::name)},
  // What the product asks for, and some more that a client may.
  static const Entry entries[] = {
      WL_DRIVER_REQUIRED(SIM_ENTRY) WL_DRIVER_OPTIONAL(SIM_ENTRY) SIM_ENTRY(cuCtxSetCurrent, 4000)
          SIM_ENTRY(cuCtxGetCurrent, 4000) SIM_ENTRY(cuCtxGetDevice, 2000)
              SIM_ENTRY(cuStreamQuery, 2000) SIM_ENTRY(cuEventQuery, 2000)
                  SIM_ENTRY(cuMemGetInfo, 3020) SIM_ENTRY(cuGetProcAddress, 12000)};
#undef SIM_ENTRY
  return sim().call("cuGetProcAddress", kUncounted, [&](Lock&) {
    if (symbol == nullptr || function == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *function = nullptr;
    const auto answer = [&](CUdriverProcAddressQueryResult value, CUresult result) {
      if (status != nullptr) *status = value;
      return result;
    };
    // "If the specified CUDA version is greater than the driver version, the API will return
    // CUDA_ERROR_INVALID_VALUE."
    if (version > sim().version()) {
      return answer(CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND, CUDA_ERROR_INVALID_VALUE);
    }
    if (const auto how = sim().hidden(symbol)) {
      return answer(CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND,
                    *how == SIM_HIDE_NULL ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND);
    }
    for (const Entry& entry : entries) {
      if (std::strcmp(entry.name, symbol) != 0) continue;
      if (entry.version > sim().version()) break;  // this driver is older than the function
      if (entry.version > version) {
        return answer(CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT, CUDA_ERROR_NOT_FOUND);
      }
      *function = entry.function;
      return answer(CU_GET_PROC_ADDRESS_SUCCESS, CUDA_SUCCESS);
    }
    return answer(CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND, CUDA_ERROR_NOT_FOUND);
  });
}

}  // extern "C"
