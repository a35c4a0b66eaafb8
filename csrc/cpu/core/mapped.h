// Mapped input files that lose their pages: a file that is truncated, or whose disk fails, while a
// kernel reads it.
//
// The kernel's answer to such a read is SIGBUS, which ends the process. While the handler here is
// installed, the rest of the mapping becomes zeros instead, the reading goes on, and `mapping_lost`
// tells that what was read is worth nothing. A SIGBUS from anywhere else goes to the handler that
// was there before.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pymerge::cpu {

struct Mapping;  // one that is watched

// From any thread. The mapping must be watched before it is read and forgotten before it is
// unmapped.
Mapping* watch_mapping(uint64_t address, uint64_t bytes);
void forget_mapping(Mapping* mapping);

// Whether pages of this mapping were replaced by zeros.
bool mapping_lost(const Mapping* mapping);

// How many faults were survived since the process began: what a caller looks at often.
uint64_t lost_pages();

// For the whole process; may be nested. Throws std::runtime_error where the system refuses.
// any: until the last one is removed, pages of every mapped file become zeros, one by one, those of
// other libraries too; `lost_pages` tells that it happened.
void install_bus_handler(bool any);
void remove_bus_handler();
bool bus_handler_installed();

}  // namespace pymerge::cpu
