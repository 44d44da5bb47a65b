// The order in which tensors are used, for loads whose tensors are waited for one by one.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/plan.h"

namespace weightlift::engine {

// Of each name, the number of its batch: tensors that are used one after another, as many as make a
// few reads. Batches are loaded in this order, and within one the order is that of the files: what
// is used together lies together in a file, but in an order of its own. The plan has ranks.
[[nodiscard]] std::vector<std::uint32_t> batches_of_use(const LoadPlan& plan);

}  // namespace weightlift::engine
