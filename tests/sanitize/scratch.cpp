// The scratch arena of csrc/cpu/core/scratch.h for AddressSanitizer: whatever no block holds is
// poisoned, and behind each block lies as much again, so that a list that is written past its end
// is found.
#include "cpu/core/scratch.h"

#include <algorithm>
#include <new>

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

namespace pymerge::cpu {
namespace {

constexpr size_t kHead = 4096;  // holds where the open bytes end
constexpr size_t kMapped = kHead + 2 * kScratchBytes;

size_t& open_end(char* data) { return *reinterpret_cast<size_t*>(data - kHead); }

}  // namespace

Scratch::Scratch() : data_(nullptr) {
  void* mapped = mmap(nullptr, kMapped, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<char*>(mapped) + kHead;
  open_end(data_) = 0;
  __asan_poison_memory_region(data_, 2 * kScratchBytes);
}

Scratch::~Scratch() {
  __asan_unpoison_memory_region(data_, 2 * kScratchBytes);
  munmap(data_ - kHead, kMapped);
}

void* Scratch::take_bytes(size_t bytes) {
  const size_t rounded = (bytes + 63) & ~size_t(63);
  if (rounded > left()) throw std::length_error("scratch arena exhausted");
  char* result = data_ + 2 * used_;
  const size_t end = 2 * used_ + bytes;
  __asan_unpoison_memory_region(result, bytes);
  // What was released is open until now.
  if (end < open_end(data_)) __asan_poison_memory_region(data_ + end, open_end(data_) - end);
  open_end(data_) = end;
  used_ += rounded;
  return result;
}

}  // namespace pymerge::cpu
