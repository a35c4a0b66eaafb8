// Constants that change speed and never results. Unmeasured defaults, reasoned from the
// architecture, until benchmarks/gpu_check.py has run on a device and its figures stand beside
// them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pymerge::cuda {

// Threads of a block, in every kernel. Unmeasured: 8 warps, so that a block's barrier stalls few of
// them.
constexpr int kThreads = 256;

// Elements that a thread takes at a time outside of the fast kernels: one access of 16 bytes to a
// 16-bit type, two to fp32, four to fp64.
constexpr int kWidth = 8;

// Elements that a block takes at a time. 12 bits of position in a candidate record depend on it.
constexpr int kTile = 4096;

// A tensor of at most this many elements is merged by one block, all of it in one launch.
// Unmeasured.
#if !defined(PYMERGE_SMALL)
#define PYMERGE_SMALL 32768
#endif
constexpr std::int64_t kSmall = PYMERGE_SMALL;

// Blocks of a persistent grid per multiprocessor. Unmeasured: 8 x 256 threads fill one where
// registers allow.
constexpr int kBlocksPerProcessor = 8;

// Blocks a multiprocessor that the general kernels are compiled for: two spill, by a few registers,
// where the working precision is binary64 and kWidth elements take twice the registers (nvcc 13.0,
// sm_80 and sm_90).
constexpr int general_blocks(std::size_t element_size) { return element_size == 8 ? 1 : 2; }

// The same for the fast kernels: as many as their registers allow without spilling, which with
// weights and sampled thresholds is one model fewer (fp16 on sm_100). Each thread has 16 bytes a
// model in flight. Unmeasured.
constexpr int fast_blocks(int models, bool sampled, bool unit) {
  return models <= (!sampled ? 3 : unit ? 2 : 1) ? 3 : 2;
}

// Selectors that share a block's histograms: 4 x 2048 bins x 4 bytes is 32 KB of shared memory.
constexpr int kGroup = 4;

// Up to this many order statistics, one block descends in all histograms after a radix level
// instead of a launch of its own.
constexpr int kFewSelectors = 8;

// Blocks a multiprocessor that histograms are compiled for: as many as their shared memory lets on
// sm_80, one less in binary64, whose kWidth elements do not fit. Left to itself ptxas spills to fit
// one more.
constexpr int histogram_blocks(std::size_t element_size) { return element_size == 8 ? 3 : 4; }

// Bins of a radix level: 11 bits.
constexpr int kBins = 2048;

// Sampled thresholds (ties/sampled_threshold.cu). A tensor of at least this many elements has its
// thresholds bracketed from a sample, so that one pass is enough; below it the radix passes run
// from cache. Unmeasured.
#if !defined(PYMERGE_SAMPLED_FROM)
#define PYMERGE_SAMPLED_FROM 1048576
#endif
constexpr std::int64_t kSampledFrom = PYMERGE_SAMPLED_FROM;
constexpr int kSampledModels = 16;  // at most this many: the records of more do not fit

// Elements sampled at one place: 128 bytes of binary32, two sectors of the 16-bit types.
constexpr int kUnit = 32;
// Units of the first, coarse sample: 8192 keys fit in shared memory.
constexpr int kCoarseUnits = 256;
// Half widths, in standard deviations, of the coarse window and of the bracket; the last is for a
// bracket whose candidates would not fit otherwise. 3.5 misses one threshold in 2000, at the price
// of the exact passes.
constexpr double kWindowSigmas = 4.5;
constexpr double kBracketSigmas = 3.5;
constexpr double kTightSigmas = 2.6;
// The sample is at most one element in so many.
#if !defined(PYMERGE_SAMPLE_SHARE)
#define PYMERGE_SAMPLE_SHARE 16
#endif
constexpr double kSampleShare = PYMERGE_SAMPLE_SHARE;
// Candidates that a block can hold for one tile.
constexpr int kTileRecords = 1024;
// Share of one input that the candidates may take, in percent: with the directory under 4.
#if !defined(PYMERGE_RECORD_PERCENT)
#define PYMERGE_RECORD_PERCENT 3.5
#endif
constexpr double kRecordPercent = PYMERGE_RECORD_PERCENT;

// Bytes of tables that one launch carries as its parameter (kernel parameters may be 32764 bytes
// from CUDA 12.1 on).
constexpr int kSmallPiece = 2048;
constexpr int kLargePiece = 28672;

}  // namespace pymerge::cuda
