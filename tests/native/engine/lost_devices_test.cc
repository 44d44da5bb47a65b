// Devices that are lost. What they may still read stays pinned for good, so these tests come last.
#include <cuda.h>
#include <gtest/gtest.h>

#include "engine/driver_sweep.h"

namespace weightlift::engine::test {
namespace {

TEST(LoadWithLostDevice, AtAnyCall) {
  sweep(nullptr, CUDA_ERROR_ILLEGAL_ADDRESS, true);
}

TEST(LoadWithLostDevice, AtAnyOperation) {
  sweep("(operation)", CUDA_ERROR_ILLEGAL_ADDRESS, false);
}

}  // namespace
}  // namespace weightlift::engine::test
