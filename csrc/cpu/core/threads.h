// A pool of worker threads of our own: no OpenMP, so that nothing is shared or fought over with the
// host program's.
#pragma once

#include <cstdint>
#include <functional>

namespace pymerge::cpu {

// Processors that this process may run on.
int available_threads();

// Calls body(thread, task) for every task in [0, tasks), on up to `threads` threads of which the
// caller is number 0. Tasks are handed out in order. Workers start at the first call that needs
// them and then wait; in a forked child they start anew. Every thread runs with round to nearest
// and without flushing subnormals. An exception of the body is rethrown here. One call at a time
// has the workers; others wait their turn.
void parallel_for(int threads, uint64_t tasks, const std::function<void(int, uint64_t)>& body);

// Round to nearest, subnormals kept (docs/spec/ties.md, Notation), for a scope.
class FloatEnvironment {
 public:
  FloatEnvironment();
  ~FloatEnvironment();
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace pymerge::cpu
