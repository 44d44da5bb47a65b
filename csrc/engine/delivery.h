// Takes a piece from where its source bytes lie to its target in host memory: copies, gathers,
// casts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "convert/cast.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/scratch.h"

namespace weightlift::engine {

// `source` is where byte `source_begin` of the piece's source lies. With `packed`, the elements go
// there one after another; without, to the copy's target.
void deliver(const LoadPlan& plan, const Piece& piece, const std::byte* source,
             std::uint64_t source_begin, std::byte* packed, const convert::Fp8Rules& fp8,
             Scratch& scratch);

}  // namespace weightlift::engine
