#include "device/driver.h"

#include <dlfcn.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "device/process_driver.h"
#include "mutex.h"
#include "result.h"

namespace weightlift::device {
namespace {

// CUDA 12.0 introduced the form of cuGetProcAddress that reports why a symbol is missing.
constexpr int kOldestDriver = 12000;

using GetProcAddress = PFN_cuGetProcAddress_v12000;

Error driver_missing(const std::string& library, const char* reason) {
  return {.code = ErrorCode::kNoDriver,
          .message = "no CUDA driver: cannot open " + library + " (" +
                     (reason != nullptr ? reason : "unknown reason") +
                     "); install the NVIDIA driver, or load to the CPU"};
}

struct ProcessDriver {
  Mutex mutex;
  std::string library WL_GUARDED_BY(mutex) = "libcuda.so.1";
  std::unique_ptr<const Driver> loaded WL_GUARDED_BY(mutex);
  std::optional<Error> failure WL_GUARDED_BY(mutex);
};

ProcessDriver& process_driver() {
  static auto* const instance = new ProcessDriver;  // outlives every other static
  return *instance;
}

}  // namespace

Result<std::unique_ptr<const Driver>> load_driver(const std::string& library) {
  // RTLD_LOCAL: torch resolves the driver itself, and neither may see the other's symbols.
  void* const handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return driver_missing(library, ::dlerror());
  const auto get = reinterpret_cast<GetProcAddress>(::dlsym(handle, "cuGetProcAddress_v2"));
  if (get == nullptr) {
    return Error{.code = ErrorCode::kDriverTooOld,
                 .message = library + " is older than CUDA 12.0: update the NVIDIA driver"};
  }
  auto table = std::make_unique<Driver>();
  table->library = library;
  const auto resolve = [&](const char* name, int version) -> void* {
    void* symbol = nullptr;
    CUdriverProcAddressQueryResult found{};
    const CUresult result = get(name, &symbol, version, CU_GET_PROC_ADDRESS_DEFAULT, &found);
    return result == CUDA_SUCCESS && found == CU_GET_PROC_ADDRESS_SUCCESS ? symbol : nullptr;
  };
#define WL_RESOLVE_REQUIRED(name, version)                                           \
  table->name = reinterpret_cast<decltype(table->name)>(resolve(#name, version));    \
  if (table->name == nullptr) {                                                      \
    return Error{.code = ErrorCode::kDriverTooOld,                                   \
                 .message = library + " lacks " #name ": update the NVIDIA driver"}; \
  }
  WL_DRIVER_REQUIRED(WL_RESOLVE_REQUIRED)
#undef WL_RESOLVE_REQUIRED
  WL_RETURN_IF_ERROR(
      check(*table, table->cuDriverGetVersion(&table->version), "cuDriverGetVersion"));
  // Functions newer than the driver are not requested: an older driver might return the previous
  // form, which takes other arguments. (Drivers from 13.0 on are documented to refuse.)
#define WL_RESOLVE_OPTIONAL(field, name, since)                                       \
  if (table->version >= (since)) {                                                    \
    table->field = reinterpret_cast<decltype(table->field)>(resolve(#name, (since))); \
  }
  WL_DRIVER_OPTIONAL(WL_RESOLVE_OPTIONAL)
#undef WL_RESOLVE_OPTIONAL
  if (table->version < kOldestDriver) {
    return Error{.code = ErrorCode::kDriverTooOld,
                 .message = library + " is for CUDA " + std::to_string(table->version / 1000) +
                            ", but weightlift needs 12.0 or newer: update the NVIDIA driver"};
  }
  return std::unique_ptr<const Driver>(std::move(table));
}

CUresult Driver::copy_batch(CUdeviceptr* targets, CUdeviceptr* sources, std::size_t* sizes,
                            std::size_t count, CUmemcpyAttributes& attributes,
                            CUstream stream) const {
  std::size_t first = 0;  // the attributes apply from this copy on
  if (cuMemcpyBatchAsync != nullptr) {
    return cuMemcpyBatchAsync(targets, sources, sizes, count, &attributes, &first, 1, stream);
  }
  std::size_t failed = 0;
  return cuMemcpyBatchAsync_12(targets, sources, sizes, count, &attributes, &first, 1, &failed,
                               stream);
}

Result<const Driver*> driver() {
  ProcessDriver& process = process_driver();
  const MutexLock lock(process.mutex);
  if (process.failure) return *process.failure;
  if (process.loaded == nullptr) {
    auto loaded = load_driver(process.library);
    if (!loaded.ok()) {
      process.failure = loaded.error();
      return loaded.error();
    }
    process.loaded = *std::move(loaded);
  }
  return process.loaded.get();
}

void replace_process_driver(const std::string& library) {
  ProcessDriver& process = process_driver();
  const MutexLock lock(process.mutex);
  process.library = library.empty() ? "libcuda.so.1" : library;
  process.loaded.reset();
  process.failure.reset();
}

Status check(const Driver& table, CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return {};
  const char* name = nullptr;
  const char* text = nullptr;
  if (table.cuGetErrorName(result, &name) != CUDA_SUCCESS || name == nullptr) name = "unknown";
  if (table.cuGetErrorString(result, &text) != CUDA_SUCCESS || text == nullptr) text = "";
  std::string message = std::string(call) + " failed: " + name + " (" + text + ")";
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    return Error{
        .code = ErrorCode::kOutOfMemory,
        .message =
            message +
            "; free device memory, use a smaller dtype, or spread the model with device_map"};
  }
  if (result == CUDA_ERROR_DEINITIALIZED || result == CUDA_ERROR_NOT_INITIALIZED) {
    message +=
        "; the CUDA driver is shut down, or this process was forked after CUDA was used: "
        "load in a new process";
  }
  return Error{.code = ErrorCode::kDriverCallFailed, .message = std::move(message)};
}

}  // namespace weightlift::device
