// The order in which tensors are used, for loads whose callers wait for single tensors.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/plan.h"

namespace weightlift::engine {

// Returns the number of its batch for each name. A batch has tensors that are used one after
// another, enough for a few reads. Batches are loaded in order, and the tensors of a batch in the
// order of the files: tensors that are used together lie together in a file, but in another order.
// The plan must have ranks.
[[nodiscard]] std::vector<std::uint32_t> batches_of_use(const LoadPlan& plan);

}  // namespace weightlift::engine
