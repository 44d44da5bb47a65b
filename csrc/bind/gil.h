// Releases the interpreter's lock for a scope.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace weightlift::bind {

// Like py::gil_scoped_release, except after the interpreter has ended. CPython before 3.14 then
// ends a daemon thread that takes the lock again with pthread_exit(3), which unwinds the stack like
// an exception. A noexcept frame would abort the process, and destructors would use Python objects
// without the lock. So the thread stops here until the process ends, as in CPython 3.14 (gh-87135).
class UnlockedGil {
 public:
  UnlockedGil() : state_(PyEval_SaveThread()) {}
  UnlockedGil(const UnlockedGil&) = delete;
  UnlockedGil& operator=(const UnlockedGil&) = delete;
  // NOLINTNEXTLINE(bugprone-unsafe-to-allow-exceptions)
  ~UnlockedGil() noexcept(false) {
    StayWhenUnwound stay;
    PyEval_RestoreThread(state_);
    stay.unwound = false;
  }

 private:
  struct StayWhenUnwound {
    bool unwound = true;
    StayWhenUnwound() = default;
    StayWhenUnwound(const StayWhenUnwound&) = delete;
    StayWhenUnwound& operator=(const StayWhenUnwound&) = delete;
    ~StayWhenUnwound() {
      while (unwound) pause();
    }
  };

  PyThreadState* state_;
};

}  // namespace weightlift::bind
