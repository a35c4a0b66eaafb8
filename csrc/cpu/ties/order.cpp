#include "cpu/ties/order.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "cpu/ties/select.h"

namespace pymerge::cpu {

constexpr unsigned kTurns = 4;

Order::Order(const Kernels& kernels, const uint32_t* keys, uint64_t count, uint32_t low,
             uint32_t high, uint32_t* spare)
    : kernels_(kernels), keys_(keys), count_(count), low_(low), spare_(spare), bins_{} {
  while ((high - 1 - low) >> shift_ >= kBins) ++shift_;
  // In turns, so that equal keys do not wait for one another.
  uint32_t turns[kTurns][kBins] = {};
  for (uint64_t j = 0; j < count; ++j) ++turns[j % kTurns][(keys[j] - low) >> shift_];
  for (const auto& turn : turns) {
    for (uint32_t bin = 0; bin < kBins; ++bin) bins_[bin] += turn[bin];
  }
}

uint32_t Order::nth(uint64_t rank) const {
  uint32_t bin = kBins - 1;
  for (; rank > bins_[bin]; --bin) rank -= bins_[bin];
  const uint32_t low = low_ + (bin << shift_);
  if (shift_ == 0) return low;
  const uint32_t high = low + (uint32_t(1) << shift_);
  uint64_t above = 0;
  const uint64_t inside = kernels_.partition(keys_, count_, low, high, spare_, &above);
  const uint32_t first = spare_[0];
  if (kernels_.count(spare_, inside, first, first + 1, &above) == inside) return first;
  if (inside > kFew) return Order(kernels_, spare_, inside, low, high, spare_).nth(rank);
  std::nth_element(spare_, spare_ + (rank - 1), spare_ + inside, std::greater<uint32_t>());
  return spare_[rank - 1];
}

uint32_t nth_key(const Kernels& kernels, uint32_t* keys, uint64_t count, uint64_t rank) {
  constexpr uint64_t kProbe = 1024;
  uint32_t low = 0, high = kInfinityKey + 1;
  uint64_t above = 0;
  if (count > 8 * kProbe) {  // a few of them say where it is
    uint32_t probe[kProbe + 16], spare[kProbe + 16];
    const uint64_t cell = count / kProbe;
    for (uint64_t j = 0; j < kProbe; ++j) probe[j] = keys[j * cell + mix(j) % cell];
    const double share = double(rank) / double(count), middle = share * double(kProbe);
    const double slack = 4 * std::sqrt(share * (1 - share) * double(kProbe)) + 4;
    const Order order(kernels, probe, kProbe, low, high, spare);
    const uint32_t least =
        middle + slack < double(kProbe) ? order.nth(uint64_t(middle + slack) + 1) : low;
    const uint32_t most = middle - slack >= 1 ? order.nth(uint64_t(middle - slack)) + 1 : high;
    const uint64_t inside = kernels.count(keys, count, least, most, &above);
    if (rank > above && rank <= above + inside) {
      if (most - least == 1) return least;
      low = least;
      high = most;
      uint64_t same = 0;
      count = kernels.partition(keys, count, low, high, keys, &same);
    } else {
      above = 0;
    }
  }
  return Order(kernels, keys, count, low, high, keys).nth(rank - above);
}

}  // namespace pymerge::cpu
