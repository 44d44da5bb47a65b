// Work without the interpreter's lock.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace weightlift::bind {

// py::gil_scoped_release, but for its end: where the interpreter has ended meanwhile, CPython
// before 3.14 ends a daemon thread that wants the lock back by pthread_exit(3), which unwinds the
// stack as an exception does. A frame on the way that may not throw would abort the process, and
// destructors would touch Python's objects without the lock. So the thread stays where it is until
// the process is gone, as CPython 3.14 has it (gh-87135).
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
