// Constants that change speed and never results. Unmeasured defaults, reasoned from the
// architecture, until benchmarks/gpu_check.py has run on a device and its figures stand beside
// them.
#pragma once

#include <cstdint>

namespace pymerge::cuda {

// Threads of a block, in every kernel. Unmeasured: 8 warps, so that a block's barrier stalls few of
// them.
constexpr int kThreads = 256;

// Elements that a block takes at a time. 12 bits of position in a candidate record depend on it.
constexpr int kTile = 4096;

// A tensor of at most this many elements is merged by one block, all of it in one launch.
// Unmeasured.
constexpr std::int64_t kSmall = 32768;

// Blocks of a persistent grid per multiprocessor. Unmeasured: 8 x 256 threads fill one where
// registers allow.
constexpr int kBlocksPerProcessor = 8;

// Selectors that share a block's histograms: 4 x 2048 bins x 4 bytes is 32 KB of shared memory.
constexpr int kGroup = 4;

// Bins of a radix level: 11 bits.
constexpr int kBins = 2048;

// Bytes of tables that one launch carries as its parameter (kernel parameters may be 32764 bytes
// from CUDA 12.1 on).
constexpr int kSmallPiece = 2048;
constexpr int kLargePiece = 28672;

}  // namespace pymerge::cuda
