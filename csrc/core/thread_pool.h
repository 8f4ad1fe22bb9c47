// The pool that all kernel calls share.
#pragma once

#include <cstddef>
#include <functional>

namespace metagpt_fast {

// Threads that a call uses unless told otherwise: set_num_threads, else METAGPT_FAST_THREADS, else the processors
// that this process may run on. `num_threads` 0 returns to the default.
// Both throw std::invalid_argument for a number (or a text in the variable) outside 1 to 1024.
int num_threads();
void set_num_threads(int num_threads);

// Calls body(item, worker) once for every item in [0, num_items), in ascending order of start, on up to `num_workers`
// threads of which the caller is one; `worker` is in [0, num_workers). Returns when all are done. The first exception
// thrown by `body` stops the handing out of items and is thrown again here. Every worker runs in the default
// floating-point environment (round to nearest, subnormals kept), whatever the caller has set. One call at a time;
// further callers wait, so `body` must not call it. Fewer threads do the work if the system grants no more. Safe after
// fork(), and at exit.
// `num_workers` is an argument because num_threads() may change between two calls of it: who has scratch memory per
// worker asks once.
void parallel_for(std::size_t num_items, int num_workers,
                  const std::function<void(std::size_t item, int worker)>& body);

}  // namespace metagpt_fast
