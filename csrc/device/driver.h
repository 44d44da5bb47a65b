// The CUDA driver as a table of function pointers, opened with dlopen at first use, not at import.
// So one build runs with and without a GPU and links no CUDA library.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstddef>
#include <memory>
#include <string>

#include "result.h"

namespace weightlift::device {

// X(name, version): a driver function and the CUDA version that introduced the wanted form of it.
// Each form has a type in cudaTypedefs.h (PFN_cuMemAlloc_v3020) and a symbol, which
// cuGetProcAddress returns.
#define WL_DRIVER_REQUIRED(X)         \
  X(cuInit, 2000)                     \
  X(cuDriverGetVersion, 2020)         \
  X(cuGetErrorName, 6000)             \
  X(cuGetErrorString, 6000)           \
  X(cuDeviceGetCount, 2000)           \
  X(cuDeviceGet, 2000)                \
  X(cuDeviceGetName, 2000)            \
  X(cuDeviceGetAttribute, 2000)       \
  X(cuDeviceTotalMem, 3020)           \
  X(cuDevicePrimaryCtxRetain, 7000)   \
  X(cuDevicePrimaryCtxRelease, 11000) \
  X(cuDevicePrimaryCtxGetState, 7000) \
  X(cuCtxPushCurrent, 4000)           \
  X(cuCtxPopCurrent, 4000)            \
  X(cuCtxSynchronize, 2000)           \
  X(cuStreamCreate, 2000)             \
  X(cuStreamDestroy, 4000)            \
  X(cuStreamSynchronize, 2000)        \
  X(cuStreamWaitEvent, 3020)          \
  X(cuEventCreate, 2000)              \
  X(cuEventDestroy, 4000)             \
  X(cuEventRecord, 2000)              \
  X(cuEventSynchronize, 2000)         \
  X(cuMemAlloc, 3020)                 \
  X(cuMemFree, 3020)                  \
  X(cuMemcpyHtoDAsync, 3020)          \
  X(cuMemcpyDtoHAsync, 3020)          \
  X(cuMemcpyDtoDAsync, 3020)          \
  X(cuMemHostAlloc, 2020)             \
  X(cuMemFreeHost, 2000)              \
  X(cuMemHostRegister, 6050)          \
  X(cuMemHostUnregister, 4000)        \
  X(cuModuleLoadData, 2000)           \
  X(cuModuleUnload, 2000)             \
  X(cuModuleGetFunction, 2000)        \
  X(cuLaunchKernel, 4000)             \
  X(cuStreamIsCapturing, 10000)       \
  X(cuThreadExchangeStreamCaptureMode, 10010)

// X(field, name, version): older drivers lack these functions, and the engine works without them.
#define WL_DRIVER_OPTIONAL(X)                      \
  X(cuMemcpyBatchAsync, cuMemcpyBatchAsync, 13000) \
  X(cuMemcpyBatchAsync_12, cuMemcpyBatchAsync, 12080)

struct Driver {
#define WL_DRIVER_FIELD(name, version) PFN_##name##_v##version name = nullptr;
#define WL_DRIVER_OPTIONAL_FIELD(field, name, version) PFN_##name##_v##version field = nullptr;
  WL_DRIVER_REQUIRED(WL_DRIVER_FIELD)
  WL_DRIVER_OPTIONAL(WL_DRIVER_OPTIONAL_FIELD)
#undef WL_DRIVER_FIELD
#undef WL_DRIVER_OPTIONAL_FIELD
  int version = 0;      // 13000 is CUDA 13.0
  std::string library;  // the library that was opened

  // The CUDA version whose form of cuMemcpyBatchAsync the driver has; null if it has none.
  [[nodiscard]] const char* batch_form() const noexcept {
    if (cuMemcpyBatchAsync != nullptr) return "13.0";
    return cuMemcpyBatchAsync_12 != nullptr ? "12.8" : nullptr;
  }
  // Many copies in one call with the same attributes. The driver must have a batch_form().
  CUresult copy_batch(CUdeviceptr* targets, CUdeviceptr* sources, std::size_t* sizes,
                      std::size_t count, CUmemcpyAttributes& attributes, CUstream stream) const;
};

// Opens a driver library and resolves its functions. Calls only cuDriverGetVersion.
[[nodiscard]] Result<std::unique_ptr<const Driver>> load_driver(const std::string& library);

// The process's driver: "libcuda.so.1", unless a test has replaced it. Loaded once and never
// unloaded, because device memory and pinned pages may outlive all static objects. An error is kept
// as well.
[[nodiscard]] Result<const Driver*> driver();

#ifdef WEIGHTLIFT_TESTING
// Replaces the process's driver by the library at `path` (the simulated driver); "" restores the
// default. No device object may exist.
void use_driver_for_testing(const std::string& path);
#endif

// For a failed call, kDriverCallFailed (or kOutOfMemory for CUDA_ERROR_OUT_OF_MEMORY) with the name
// of the call and CUDA's name of the error.
[[nodiscard]] Status check(const Driver& driver, CUresult result, const char* call);

}  // namespace weightlift::device
