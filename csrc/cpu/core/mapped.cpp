#include "cpu/core/mapped.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>
#include <stdexcept>

namespace pymerge::cpu {

// begin == 0 where the entry is free. Written under `table_mutex`, read by the handler without it.
struct Mapping {
  std::atomic<uintptr_t> begin{0};
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> lost{false};
};

namespace {

// A list of blocks that only grows, so that the handler can walk it at any time. A merge of eight
// models in 200 files each takes a few dozen.
constexpr size_t kBlock = 64;
struct Block {
  Mapping entries[kBlock];
  std::atomic<Block*> next{nullptr};
};

Block first_block;
std::mutex table_mutex;
std::atomic<uint64_t> lost_count{0};
std::atomic<bool> any_mapping{false};  // and not those that are watched alone

std::mutex handler_mutex;
int handler_users = 0;
bool handler_placed =
    false;  // and not taken away again: one that was installed later may go on calling it
struct sigaction previous;  // written before the handler is set
uintptr_t page_bytes = 0;

static_assert(std::atomic<uintptr_t>::is_always_lock_free &&
                  std::atomic<Block*>::is_always_lock_free &&
                  std::atomic<bool>::is_always_lock_free,
              "a signal handler must not wait");

Mapping* find(uintptr_t address) {
  for (Block* block = &first_block; block != nullptr; block = block->next.load()) {
    for (Mapping& entry : block->entries) {
      const uintptr_t begin = entry.begin.load();
      if (begin != 0 && begin <= address && address < entry.end.load()) return &entry;
    }
  }
  return nullptr;
}

// What would have happened without this handler.
void pass_on(int signal, siginfo_t* info, void* context) {
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal, info, context);
    return;
  }
  if (previous.sa_handler == SIG_IGN && info->si_code <= 0) return;  // sent by a process
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
    return;
  }
  // A fault cannot be ignored: on the way back the access, or the signal raised here, ends the
  // process.
  struct sigaction usual = {};
  usual.sa_handler = SIG_DFL;
  sigaction(signal, &usual, nullptr);
  if (info->si_code <= 0) raise(signal);
}

// Zeros from a page on, or a page alone. Whether there are any.
bool put_zeros(uintptr_t page, uintptr_t bytes, int protection) {
  void* zeros = mmap(reinterpret_cast<void*>(page), bytes, protection,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (zeros == MAP_FAILED) return false;
  lost_count.fetch_add(1);
  return true;
}

// Calls nothing but what a handler may: mmap is a system call alone.
void on_bus_error(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  if (info->si_code == BUS_ADRERR) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
    const uintptr_t page = address - address % page_bytes;
    Mapping* mapping = find(address);
    // To the end of the mapping, since whatever follows cannot be had either or is of no use any
    // more.
    if (mapping != nullptr && put_zeros(page, mapping->end.load() - page, PROT_READ)) {
      mapping->lost.store(true);
      errno = error;
      return;
    }
    if (any_mapping.load() && put_zeros(page, page_bytes, PROT_READ | PROT_WRITE)) {
      errno = error;
      return;
    }
  }
  errno = error;
  pass_on(signal, info, context);
}

}  // namespace

Mapping* watch_mapping(uint64_t address, uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(table_mutex);
  for (Block* block = &first_block;; block = block->next.load()) {
    for (Mapping& entry : block->entries) {
      if (entry.begin.load() != 0) continue;
      entry.lost.store(false);
      entry.end.store(uintptr_t(address + bytes));
      entry.begin.store(uintptr_t(address));  // last: from here on the handler sees it
      return &entry;
    }
    if (block->next.load() == nullptr) block->next.store(new Block);
  }
}

void forget_mapping(Mapping* mapping) {
  const std::lock_guard<std::mutex> lock(table_mutex);
  mapping->begin.store(0);
  mapping->end.store(0);
}

bool mapping_lost(const Mapping* mapping) { return mapping->lost.load(); }

uint64_t lost_pages() { return lost_count.load(); }

void install_bus_handler(bool any) {
  const std::lock_guard<std::mutex> lock(handler_mutex);
  if (!handler_placed) {
    page_bytes = uintptr_t(sysconf(_SC_PAGESIZE));
    if (sigaction(SIGBUS, nullptr, &previous) != 0) {
      throw std::runtime_error("the handler of SIGBUS cannot be read");
    }
    struct sigaction own = {};
    own.sa_sigaction = on_bus_error;
    own.sa_mask = previous.sa_mask;
    own.sa_flags = SA_SIGINFO | SA_ONSTACK | (previous.sa_flags & SA_NODEFER);
    if (sigaction(SIGBUS, &own, nullptr) != 0) {
      throw std::runtime_error("a handler of SIGBUS cannot be installed");
    }
    handler_placed = true;
  }
  if (any) any_mapping.store(true);
  ++handler_users;
}

void remove_bus_handler() {
  const std::lock_guard<std::mutex> lock(handler_mutex);
  if (handler_users == 0 || --handler_users > 0) return;
  any_mapping.store(false);
  struct sigaction current;
  if (sigaction(SIGBUS, nullptr, &current) == 0 && (current.sa_flags & SA_SIGINFO) != 0 &&
      current.sa_sigaction == on_bus_error) {
    handler_placed = sigaction(SIGBUS, &previous, nullptr) != 0;
  }
}

bool bus_handler_installed() {
  const std::lock_guard<std::mutex> lock(handler_mutex);
  return handler_users > 0;
}

}  // namespace pymerge::cpu
