#include "cpu/core/scratch.h"

#include <mutex>
#include <new>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>

namespace pymerge::cpu {
namespace {

// Never destroyed: calls may still run while the process exits.
struct FreeList {
  std::mutex mutex;
  std::vector<char*> arenas;
};

FreeList* list = new FreeList;

void forget_list() {
  // In a forked child the mutex may be held by a thread that does not exist.
  list = new FreeList;
}

FreeList& free_list() {
  static const bool registered = pthread_atfork(nullptr, nullptr, forget_list) == 0;
  static_cast<void>(registered);
  return *list;
}

}  // namespace

Scratch::Scratch() : data_(nullptr) {
  FreeList& list = free_list();
  {
    std::lock_guard<std::mutex> lock(list.mutex);
    if (!list.arenas.empty()) {
      data_ = list.arenas.back();
      list.arenas.pop_back();
      return;
    }
  }
  // One huge page more than needed, to start on a boundary of huge pages.
  constexpr size_t kHuge = size_t(2) << 20;
  void* mapped = mmap(nullptr, kScratchBytes + kHuge, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  data_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mapped) + kHuge - 1) & ~(kHuge - 1));
#if defined(MADV_HUGEPAGE)
  madvise(data_, kScratchBytes, MADV_HUGEPAGE);
#endif
}

Scratch::~Scratch() {
  FreeList& list = free_list();
  std::lock_guard<std::mutex> lock(list.mutex);
  list.arenas.push_back(data_);
}

void* Scratch::take_bytes(size_t bytes) {
  const size_t rounded = (bytes + 63) & ~size_t(63);
  if (rounded > left())
    throw std::length_error("scratch arena exhausted; this is a defect of pymerge");
  void* result = data_ + used_;
  used_ += rounded;
  return result;
}

}  // namespace pymerge::cpu
