// Scratch memory that is kept between calls, since the first touch of fresh memory costs more than
// the arithmetic (0.5 s a GB with 4 KB pages), and that is bounded whatever the size of the
// tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace pymerge::cpu {

// One call's scratch: an arena of kScratchBytes, of which only what is used is ever backed by
// memory. Taken from a free list and given back; as many exist as there were calls at the same
// time.
inline constexpr size_t kScratchBytes = size_t(56) << 20;

class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // `count` values of T on a cache line boundary, not initialised.
  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }
  size_t left() const { return kScratchBytes - used_; }
  size_t mark() const { return used_; }
  void release(size_t mark) { used_ = mark; }

 private:
  void* take_bytes(size_t bytes);

  char* data_;
  size_t used_ = 0;
};

}  // namespace pymerge::cpu
