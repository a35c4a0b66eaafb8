// The interpreter's lock, released while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <exception>

#include <pthread.h>
#include <unistd.h>

namespace pymerge {

// Without the lock for a scope. A daemon thread may come to the end of it when the interpreter is
// being finalized: Python up to 3.13 then ends the thread where it asks for the lock, by
// pthread_exit, which unwinds its stack. That must not go on through frames of C++, which may not
// be left so (destructors, noexcept) and would abort the process; the thread stays here instead
// until the process is gone, as Python's own do from 3.14 on.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) pause();
    }
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

// What the ops call between kernels is torch's, whose frames abort the process where the above does
// not: a thread that does so while the interpreter is being finalized, and not because of an
// exception, waits for the end of the process too.
class HeldAtExit {
 public:
  static void begin() {
    finalizing() = pthread_self();
    if (std::get_terminate() != &wait) usual() = std::set_terminate(&wait);
  }

 private:
  static pthread_t& finalizing() {
    static pthread_t thread;
    return thread;
  }
  static std::terminate_handler& usual() {
    static std::terminate_handler handler;
    return handler;
  }
  [[noreturn]] static void wait() {
    const bool unwound = !std::current_exception() && !pthread_equal(pthread_self(), finalizing());
    while (unwound) pause();
    if (usual() != nullptr) usual()();
    std::abort();
  }
};

}  // namespace pymerge
