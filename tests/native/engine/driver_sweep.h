// Every call of the driver fails once.
#pragma once

namespace weightlift::engine::test {

// In the n-th round, the n-th call of `name` (of any function if null) fails, until there are no
// more calls. Each time, the load must return an error that says so or the right result, leave
// nothing behind, and the next load must be right.
void sweep(const char* name, int code, bool sticky);

}  // namespace weightlift::engine::test
