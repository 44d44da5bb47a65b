// Copies, gathers or casts a piece from its source bytes to its target in host memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "convert/cast.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/scratch.h"

namespace weightlift::engine {

// `source` points to byte `source_begin` of the piece's source. The elements go to `packed`, one
// after another, or, if that is null, to the copy's target.
void deliver(const LoadPlan& plan, const Piece& piece, const std::byte* source,
             std::uint64_t source_begin, std::byte* packed, const convert::Fp8Rules& fp8,
             Scratch& scratch);

}  // namespace weightlift::engine
