// Stream capture: work queued on a capturing stream goes into a graph and never runs here, and a
// call that the capture forbids breaks it. Quotations are from cuda.h (CUDA 13.0).
#include <algorithm>
#include <array>
#include <memory>
#include <string_view>
#include <thread>
#include <utility>

#include "simulator.h"
#include "text.h"

namespace weightlift::simulated {
namespace {

struct ThreadMode {
  std::uint64_t generation = 0;
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;  // "This is the default mode."
};
thread_local ThreadMode thread_mode;

// "Some actions, such as a call to cudaMalloc, may be unsafe": actions that a capture cannot
// observe. The documentation has no list; these are all calls that allocate, register, load, wait
// or query.
constexpr std::array<std::string_view, 18> kUnsafe = {
    "cuMemAlloc",        "cuMemFree",
    "cuMemHostAlloc",    "cuMemFreeHost",
    "cuMemHostRegister", "cuMemHostUnregister",
    "cuModuleLoadData",  "cuModuleUnload",
    "cuCtxSynchronize",  "cuStreamSynchronize",
    "cuStreamQuery",     "cuEventSynchronize",
    "cuEventQuery",      "cuStreamDestroy",
    "cuStreamCreate",    "cuDevicePrimaryCtxRetain",
    "cuMemcpyDtoHAsync", "cuDevicePrimaryCtxRelease"};

}  // namespace

bool Simulator::begin_capture(int index, std::uint64_t stream, int mode) {
  Stream* on = find_stream(index, stream);
  // "The legacy stream is not supported for stream capture."
  if (on == nullptr || stream == 0 || on->capture) return false;
  on->capture = std::make_shared<Capture>();
  on->capture->mode = static_cast<CUstreamCaptureMode>(mode);
  on->capture->thread = std::this_thread::get_id();
  on->capture->name = on->name;
  captures_.push_back(on->capture);
  return true;
}

bool Simulator::end_capture(int index, std::uint64_t stream) {
  Stream* on = find_stream(index, stream);
  if (on == nullptr || !on->capture) return false;
  const std::shared_ptr<Capture> capture = on->capture;
  for (const auto& each : streams_) {
    if (each->capture == capture) each->capture.reset();
  }
  std::erase(captures_, capture);
  return !capture->broken;
}

CUresult Simulator::exchange_capture_mode(CUstreamCaptureMode* mode) {
  if (mode == nullptr || *mode < CU_STREAM_CAPTURE_MODE_GLOBAL ||
      *mode > CU_STREAM_CAPTURE_MODE_RELAXED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (thread_mode.generation != generation_) thread_mode = {.generation = generation_};
  std::swap(*mode, thread_mode.mode);
  return CUDA_SUCCESS;
}

CUresult Simulator::is_capturing(CUstream stream, CUstreamCaptureStatus* status) {
  Stream* on = find_stream(stream);
  if (on == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (status == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (on == device(on->device)->default_stream) {
    // "If this is called on CU_STREAM_LEGACY while a blocking stream in the same context is
    // capturing, it will return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT. The blocking stream capture is
    // not invalidated."
    const bool blocked = std::ranges::any_of(streams_, [&](const auto& each) {
      return each->device == on->device && each->blocking && each->capture;
    });
    if (blocked) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  *status = !on->capture          ? CU_STREAM_CAPTURE_STATUS_NONE
            : on->capture->broken ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                  : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  return CUDA_SUCCESS;
}

void Simulator::break_capture(Capture& capture, std::string_view call) {
  if (std::exchange(capture.broken, true)) return;
  violation(text("capture: {} breaks the one on {}", call, capture.name));
}

// "If the local thread has an ongoing capture sequence that was not initiated with RELAXED, or if
// any other thread has a concurrent capture sequence initiated with GLOBAL, this thread is
// prohibited from potentially unsafe API calls."
bool Simulator::prohibited(std::string_view call) {
  if (captures_.empty() || std::ranges::find(kUnsafe, call) == kUnsafe.end()) return false;
  if (thread_mode.generation != generation_) thread_mode = {.generation = generation_};
  if (thread_mode.mode == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
  bool found = false;
  for (const auto& capture : captures_) {
    const bool own = capture->thread == std::this_thread::get_id();
    const bool counts = own ? capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED
                            : capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
                                  thread_mode.mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
    if (!counts) continue;
    break_capture(*capture, call);
    found = true;
  }
  return found;
}

// A stream or an event that is part of a capture cannot be waited for or asked, nor can a context
// with such a stream (CUDA C++ Programming Guide, "Prohibited and Unhandled Operations").
bool Simulator::conflicts(const std::shared_ptr<Capture>& capture, std::string_view call) {
  if (!capture) return false;
  break_capture(*capture, call);
  return true;
}

bool Simulator::context_conflicts(int index, std::string_view call) {
  bool found = false;
  for (const auto& stream : streams_) {
    if (stream->device == index && conflicts(stream->capture, call)) found = true;
  }
  return found;
}

}  // namespace weightlift::simulated
