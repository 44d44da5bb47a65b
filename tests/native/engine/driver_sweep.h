// Every call of the driver fails once.
#pragma once

namespace weightlift::engine::test {

// The n-th call of `name` (any where null) fails in the n-th round, until there are no more calls.
// Whatever fails: an error that says so or a right result, nothing left, a right load after it.
void sweep(const char* name, int code, bool sticky);

}  // namespace weightlift::engine::test
