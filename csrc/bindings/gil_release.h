#pragma once

#include <Python.h>
#include <unistd.h>

namespace metagpt_fast {

// Gives Python's lock up while it lives. Unlike pybind11's gil_scoped_release it survives the end of the interpreter:
// up to Python 3.13, a daemon thread that asks for the lock then is unwound by pthread_exit, which ends the whole
// process with std::terminate when it leaves a destructor. Here such a thread sleeps until the process is gone, as it
// does from Python 3.14 on.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) ::pause();
    }
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace metagpt_fast
