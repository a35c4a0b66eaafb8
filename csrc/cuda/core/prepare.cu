// Carries the tables to the device as kernel parameters and clears the counters: no host memory has
// to outlive the call, nothing waits, and a captured graph keeps its own copy. One launch for a
// tensor, one per 28 KB of tables for many.

#include <algorithm>
#include <cstring>

#include "cuda/core/runtime.h"

namespace pymerge::cuda {
namespace {

template <int Bytes>
struct Piece {
  uint4 word[Bytes / 16];
};

template <int Bytes>
__global__ void __launch_bounds__(kThreads)
    prepare(const __grid_constant__ Piece<Bytes> piece, uint4* to, int words, Blank first,
            Blank second) {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t all = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t j = thread; j < words; j += all) to[j] = piece.word[j];
  for (std::int64_t j = thread; j < first.words; j += all) first.begin[j] = 0;
  for (std::int64_t j = thread; j < second.words; j += all) second.begin[j] = 0;
}

template <int Bytes>
void send(const unsigned char* from, std::size_t bytes, void* to, Blank first, Blank second,
          cudaStream_t stream) {
  Piece<Bytes> piece = {};
  std::memcpy(&piece, from, bytes);
  const std::int64_t words = static_cast<std::int64_t>(bytes) / 16;
  const std::int64_t most = std::max({words, first.words, second.words, std::int64_t(1)});
  const std::int64_t blocks = std::min<std::int64_t>(512, (most + kThreads - 1) / kThreads);
  const auto kernel = &prepare<Bytes>;
  PYMERGE_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), stream, piece,
                 static_cast<uint4*>(to), static_cast<int>(words), first, second);
}

}  // namespace

void launch_prepare(const void* tables, std::size_t bytes, void* to, Blank scratch, Blank stats,
                    cudaStream_t stream) {
  const auto* from = static_cast<const unsigned char*>(tables);
  auto* into = static_cast<unsigned char*>(to);
  do {
    const std::size_t part =
        std::min<std::size_t>(bytes, bytes <= kSmallPiece ? kSmallPiece : kLargePiece);
    if (bytes <= kSmallPiece)
      send<kSmallPiece>(from, part, into, scratch, stats, stream);
    else
      send<kLargePiece>(from, part, into, scratch, stats, stream);
    from += part, into += part, bytes -= part;
    scratch.words = stats.words = 0;
  } while (bytes > 0);
}

}  // namespace pymerge::cuda
