// Work without the interpreter's lock.
#pragma once

#include <pybind11/pybind11.h>

namespace weightlift::bind {

// py::gil_scoped_release, but for its end: where the interpreter has ended meanwhile, CPython
// before 3.14 ends a daemon thread that wants the lock back by pthread_exit(3), which unwinds the
// stack as an exception does. Out of a destructor that may not throw, that would abort the process.
class UnlockedGil {
 public:
  UnlockedGil() : state_(PyEval_SaveThread()) {}
  UnlockedGil(const UnlockedGil&) = delete;
  UnlockedGil& operator=(const UnlockedGil&) = delete;
  // NOLINTNEXTLINE(bugprone-unsafe-to-allow-exceptions)
  ~UnlockedGil() noexcept(false) { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

}  // namespace weightlift::bind
