// The rule on one element, read anew: for the few that the main pass cannot settle.
#pragma once

#include "cuda/ties/evaluate.cuh"

namespace pymerge::cuda {

struct OneElement {
  float value;
  int outcome;  // T4: the sign of S
  bool conflict, anyone;
  std::uint64_t kept;  // bit k: model k keeps it
  std::uint64_t odd;   // bit k: its task vector is not finite
};

__device__ __forceinline__ float one_delta(const TensorEntry& tensor, const ModelEntry& model,
                                           float base, std::int64_t i) {
  const float x = load_element<float>(model.data, model.dtype, i);
  return tensor.base == nullptr ? x : x - base;
}

__device__ __forceinline__ float one_base(const TensorEntry& tensor, std::int64_t i) {
  return tensor.base == nullptr ? 0.0f : load_element<float>(tensor.base, tensor.base_dtype, i);
}

// Element i under trim `none` or `magnitude` with the given limits.
inline __device__ __noinline__ OneElement one_element(const Batch& batch, const TensorEntry& tensor,
                                                      const ModelEntry* models, const Limit* limits,
                                                      int zero_sign, std::int64_t i) {
  const float base = one_base(tensor, i);
  Election<float> election;
  OneElement result = {};
  for (int k = 0; k < batch.models; ++k) {
    const float delta = one_delta(tensor, models[k], base, i);
    election.see(delta);
    if (!is_finite(delta)) result.odd |= std::uint64_t(1) << k;
    if (magnitude_key(delta) < static_cast<std::uint32_t>(limits[k].lower)) continue;
    result.kept |= std::uint64_t(1) << k;
    election.vote(rescaled(delta, batch.rescale, rescale_by<float>(batch, models[k], limits[k])),
                  static_cast<float>(models[k].elect));
  }
  result.outcome = election.outcome(batch.elect);
  result.conflict = election.conflict();
  result.anyone = election.anyone() && batch.elect != Elect::kNone;
  const int sign = result.outcome != 0 ? result.outcome : zero_sign;
  Disjoint<float> merge;
  for (int k = 0; k < batch.models; ++k) {
    if ((result.kept >> k & 1u) == 0) continue;
    const float delta = one_delta(tensor, models[k], base, i);
    const float trimmed =
        rescaled(delta, batch.rescale, rescale_by<float>(batch, models[k], limits[k]));
    if (agrees(batch.elect, sign, trimmed * static_cast<float>(models[k].elect))) {
      merge.add(batch.merge, trimmed, static_cast<float>(models[k].weight));
    }
  }
  const float merged =
      merge.merged(batch.merge, batch.elect, static_cast<float>(tensor.every_weight));
  result.value = output(tensor.base != nullptr, base, static_cast<float>(tensor.scaling), merged,
                        election.poisoned());
  return result;
}

}  // namespace pymerge::cuda
