// The host side of `ties` and `select`: jobs into batches of equal options, batches into tables,
// and the order of launches.

#include "cuda/ties/ties.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/ties/kernels.h"

namespace pymerge::cuda {
namespace {

constexpr std::int64_t kNormChunk = 16384;

// Cuts a block of memory into aligned arrays; with no memory it only counts.
class Arena {
 public:
  explicit Arena(void* begin = nullptr) : begin_(static_cast<unsigned char*>(begin)) {}
  template <class T>
  T* take(std::size_t count) {
    const std::size_t at = used_;
    used_ += (count * sizeof(T) + 15) / 16 * 16;
    return begin_ ? reinterpret_cast<T*>(begin_ + at) : nullptr;
  }
  std::size_t used() const { return used_; }
  void align() { used_ = (used_ + 255) / 256 * 256; }

 private:
  unsigned char* begin_;
  std::size_t used_ = 0;
};

// Jobs that can share launches: one working precision, one set of options, all small or all not.
struct Group {
  bool wide = false, small = false;
  int fast = -1;      // the one element type of what fast.cuh takes, or -1
  bool unit = false;  // see Batch
  Trim trim = Trim::kNone;
  Elect elect = Elect::kNone;
  Merge merge = Merge::kSum;
  Rescale rescale = Rescale::kNone;
  Norm norm = Norm::kNone;
  std::vector<std::size_t> jobs;
};

bool is_wide(const std::vector<Operand>& models, const std::optional<Operand>& base) {
  const auto wide = [](const Operand& x) { return x.dtype == DType::kFloat64; };
  return (base && wide(*base)) || std::any_of(models.begin(), models.end(), wide);
}

// Whether fast.cuh takes a job: its element type, or -1.
int fast_type(const Job& job) {
  const Rule& rule = job.rule;
  const DType type = job.out.dtype;
  const auto fits = [&](const Operand& x) { return x.dtype == type && x.data % 16 == 0; };
  const bool plain = (rule.trim == Trim::kNone || rule.trim == Trim::kMagnitude) &&
                     rule.rescale == Rescale::kNone && rule.elect != Elect::kCount &&
                     rule.merge != Merge::kMax;
  if (!plain || job.models.size() > 8 || type == DType::kFloat64 || !fits(job.out)) return -1;
  if (job.base && !fits(*job.base)) return -1;
  return std::all_of(job.models.begin(), job.models.end(), fits) ? static_cast<int>(type) : -1;
}

// Whether a job is a mean of models that all weigh and vote the same.
bool is_unit(const Rule& rule) {
  const auto one = [](double weight) { return weight == 1; };
  return (rule.merge == Merge::kMean || rule.merge == Merge::kWeightedMean) &&
         std::all_of(rule.weights.begin(), rule.weights.end(), one) &&
         std::all_of(rule.elect_weights.begin(), rule.elect_weights.end(), one);
}

std::vector<Group> group(const std::vector<Job>& jobs) {
  std::map<std::tuple<bool, bool, int, bool, int, int, int, int, int>, Group> groups;
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    const Job& job = jobs[j];
    const bool wide = is_wide(job.models, job.base) || job.out.dtype == DType::kFloat64,
               small = job.n <= kSmall;
    const int fast = small || wide ? -1 : fast_type(job);
    const bool unit = fast >= 0 && is_unit(job.rule);
    Group& into = groups[{wide, small, fast, unit, static_cast<int>(job.rule.trim),
                          static_cast<int>(job.rule.elect), static_cast<int>(job.rule.merge),
                          static_cast<int>(job.rule.rescale), static_cast<int>(job.rule.norm)}];
    into.wide = wide, into.small = small, into.fast = fast, into.unit = unit;
    into.trim = job.rule.trim, into.elect = job.rule.elect;
    into.merge = job.rule.merge, into.rescale = job.rule.rescale, into.norm = job.rule.norm;
    into.jobs.push_back(j);
  }
  std::vector<Group> all;
  for (auto& [key, value] : groups) all.push_back(std::move(value));
  return all;
}

double round_to(bool wide, double value) {
  return wide ? value : static_cast<double>(static_cast<float>(value));
}

// A threshold that is known already, as a key. NaN keeps none.
std::uint64_t key_of(bool wide, double threshold) {
  if (std::isnan(threshold)) return kKeepNone;
  if (threshold <= 0) return 0;
  if (wide) return bit_cast<std::uint64_t>(threshold);
  return bit_cast<std::uint32_t>(static_cast<float>(threshold));
}

bool is_aligned(const Operand& x) { return x.data % 16 == 0; }

const void* pointer(const Operand& x) { return reinterpret_cast<const void*>(x.data); }

// The descriptors of one batch on the host, laid out as they will lie on the device.
struct JobDescriptors {
  std::vector<TensorEntry> tensor;
  std::vector<ModelEntry> model;
  std::vector<Selector> selector;
  std::vector<Limit> limit;
  std::int64_t tiles = 0, chunks = 0, quads = 0, records = 0;
  bool search = false;   // some selector is active
  bool sampled = false;  // some tensor's thresholds are estimated first

  void append_tensor(const std::vector<Operand>& models, const std::optional<Operand>& base,
                     const Operand& out, std::int64_t n) {
    TensorEntry entry = {};
    if (base) {
      entry.base = pointer(*base);
      entry.base_dtype = base->dtype;
      entry.base_aligned = is_aligned(*base);
    }
    entry.out = reinterpret_cast<void*>(out.data);
    entry.n = n;
    entry.tile_begin = tiles;
    entry.chunk_begin = chunks;
    entry.out_dtype = out.dtype;
    entry.out_aligned = is_aligned(out);
    entry.zero_sign = 1;
    entry.quad_begin = quads;
    tensor.push_back(entry);
    tiles += (n + kTile - 1) / kTile;
    chunks += (n + kNormChunk - 1) / kNormChunk;
    for (const Operand& x : models) {
      ModelEntry one = {};
      one.data = pointer(x);
      one.dtype = x.dtype;
      one.aligned = is_aligned(x);
      model.push_back(one);
    }
  }

  // A search for the rank-th largest of n magnitudes; what needs no search is written to `end`:
  // rank 0 keeps none, and as a lower end a rank of n keeps all (T3, E1).
  void append_selector(std::int64_t rank, std::int64_t n, bool lower, std::uint64_t& end) {
    Selector one = {};
    if (rank <= 0 || n == 0) {
      end = kKeepNone;
    } else if (rank >= n && lower) {
      end = 0;
    } else {
      one.rank = static_cast<std::uint64_t>(rank);
      one.active = 1;
      search = true;
    }
    selector.push_back(one);
  }
};

// Whether one pass is tried: thresholds to be found, in binary32, and of a size that is worth it.
bool can_sample(const Job& job, bool wide) {
  const auto searched = [&](std::int64_t rank) { return rank > 0 && rank < job.n; };
  return !wide && job.rule.trim == Trim::kMagnitude && job.rule.norm == Norm::kNone &&
         !job.rule.thresholds && !job.rule.factors && job.n >= kSampledFrom &&
         job.models.size() <= kSampledModels &&
         std::any_of(job.rule.ranks.begin(), job.rule.ranks.end(), searched);
}

// Room for the candidates and size of the sample. Expected candidates of a model: its bracket's 7
// sigma, where sigma is sqrt(d (1 - d) / sample); the sample is as large as it takes for all
// models' to fit, within one in kSampleShare.
void plan_sample(JobDescriptors& tables, const Job& job) {
  TensorEntry& tensor = tables.tensor.back();
  const auto n = static_cast<double>(job.n);
  std::uint64_t smallest = size_of(job.out.dtype);
  double spread = 0;
  for (std::size_t k = 0; k < job.models.size(); ++k) {
    smallest = std::min(smallest, size_of(job.models[k].dtype));
    const double share = std::min(1.0, static_cast<double>(job.rule.ranks[k]) / n);
    spread = std::max(spread, share * (1 - share));
  }
  if (job.base) smallest = std::min(smallest, size_of(job.base->dtype));
  tensor.record_begin = tables.records;
  tensor.record_capacity =
      static_cast<std::int64_t>(n * static_cast<double>(smallest) * kRecordPercent / 400);
  tables.records += tensor.record_capacity;
  const double bracket = 0.7 * static_cast<double>(tensor.record_capacity) / n /
                         static_cast<double>(job.models.size());
  const double for_room = 4 * kBracketSigmas * kBracketSigmas * spread / (bracket * bracket);
  const double sample =
      std::min(n / kSampleShare, std::max(8 * std::cbrt(n) * std::cbrt(n), for_room));
  tensor.units = std::max<std::int64_t>(4, static_cast<std::int64_t>(sample) / kUnit / 4 * 4);
  tensor.sampled = 1;
  tables.quads += tensor.units / 4;
  tables.sampled = true;
}

void append_job(JobDescriptors& tables, const Job& job, bool wide, std::int64_t* stats) {
  const Rule& rule = job.rule;
  const std::size_t K = job.models.size();
  tables.append_tensor(job.models, job.base, job.out, job.n);
  TensorEntry& tensor = tables.tensor.back();
  tensor.stats = stats;
  tensor.key = rule.key;
  tensor.first = rule.first;
  tensor.scaling = round_to(wide, rule.scaling);
  tensor.zero_sign = rule.zero_sign;
  double every = 0;
  for (double w : rule.weights) every = round_to(wide, every + round_to(wide, w));
  tensor.every_weight = every;
  std::vector<Limit> limits(K);
  for (std::size_t k = 0; k < K; ++k) {
    ModelEntry& model = tables.model[tables.model.size() - K + k];
    const double density = rule.densities[k];
    const bool plain = density >= 1 || density == 0;  // T3r changes nothing
    model.weight = round_to(wide, rule.weights[k]);
    model.elect = round_to(wide, rule.elect_weights[k]);
    model.divisor = plain ? 1.0 : round_to(wide, density);
    model.cutoff =
        density >= 1 ? std::uint64_t(1) << 32 : static_cast<std::uint64_t>(density * 4294967296.0);
    limits[k] = Limit{0, ~std::uint64_t(0), rule.norm != Norm::kNone && !plain ? 0.0 : 1.0};
    if (rule.factors && rule.rescale == Rescale::kMultiply && !plain)
      limits[k].factor = round_to(wide, (*rule.factors)[k]);
  }
  if (rule.trim == Trim::kMagnitude || rule.trim == Trim::kOutliers) {
    for (std::size_t k = 0; k < K; ++k) {
      if (rule.thresholds) {
        limits[k].lower = key_of(wide, (*rule.thresholds)[k]);
        tables.selector.push_back(Selector{});
      } else {
        tables.append_selector(rule.ranks[k], job.n, true, limits[k].lower);
      }
    }
  }
  if (rule.trim == Trim::kOutliers) {
    for (std::size_t k = 0; k < K; ++k) {
      if (rule.dropped[k] <= 0) {
        tables.selector.push_back(Selector{});
      } else if (rule.bounds) {
        limits[k].upper = key_of(wide, (*rule.bounds)[k]);
        tables.selector.push_back(Selector{});
        if (limits[k].upper == kKeepNone)
          limits[k].lower = kKeepNone, limits[k].upper = 0;  // NaN keeps none
      } else {
        tables.append_selector(rule.dropped[k] + 1, job.n, false, limits[k].upper);
      }
    }
  }
  if (can_sample(job, wide)) plan_sample(tables, job);
  tables.limit.insert(tables.limit.end(), limits.begin(), limits.end());
}

// Where a batch's arrays lie in its scratch: tables first, then what has to start as zeros, then
// the rest.
struct Layout {
  Batch batch;
  std::size_t tables = 0, zero_begin = 0, zero_end = 0, end = 0;
};

struct Sizes {
  std::size_t tensors = 0, models = 0, rows = 0, selectors = 0;
  std::int64_t tiles = 0, chunks = 0, quads = 0, records = 0;
  bool histogram = false, norm = false, sampled = false;
};

Layout lay_out(void* scratch, const Sizes& sizes) {
  Arena arena(scratch);
  Layout layout;
  Batch& batch = layout.batch;
  batch = Batch{};
  const std::size_t T = sizes.tensors, K = sizes.models, searches = sizes.rows * sizes.selectors;
  const auto tiles = static_cast<std::size_t>(sizes.tiles);
  batch.models = static_cast<std::int32_t>(K);
  batch.tensors = static_cast<std::int32_t>(T);
  batch.rows = static_cast<std::int32_t>(sizes.rows);
  batch.selectors = static_cast<std::int32_t>(sizes.selectors);
  batch.tiles = sizes.tiles;
  batch.chunks = sizes.chunks;
  batch.quads = sizes.quads;
  // A sample's histogram holds counts, smallest and largest keys, in 32 bits each; a radix level's
  // counts have 64.
  batch.histogram_words = sizes.sampled ? 3 * kBins / 2 : kBins;
  batch.tensor = arena.take<TensorEntry>(T);
  batch.model = arena.take<ModelEntry>(T * K);
  batch.selector = arena.take<Selector>(searches);
  batch.limit = arena.take<Limit>(sizes.rows * K);
  layout.tables = layout.zero_begin = arena.used();
  batch.state = arena.take<TensorState>(T);
  batch.ticket = arena.take<unsigned>(8);
  if (sizes.sampled) batch.sampled = arena.take<SampledThreshold>(T * K);
  batch.histogram = arena.take<std::uint64_t>(
      sizes.histogram ? searches * static_cast<std::size_t>(batch.histogram_words) : 0);
  layout.zero_end = arena.used();
  if (sizes.norm) batch.norm = arena.take<double>(2 * K * static_cast<std::size_t>(sizes.chunks));
  if (sizes.sampled) {
    batch.estimate = arena.take<Limit>(T * K);
    batch.tile_record = arena.take<std::uint32_t>(tiles);
    batch.tile_count = arena.take<std::uint16_t>(tiles * K);
    batch.record = arena.take<std::uint32_t>(static_cast<std::size_t>(sizes.records));
  }
  arena.align();
  layout.end = arena.used();
  return layout;
}

template <class T>
void put(std::vector<unsigned char>& image, std::size_t& at, const std::vector<T>& from) {
  if (!from.empty()) std::memcpy(image.data() + at, from.data(), from.size() * sizeof(T));
  at += (from.size() * sizeof(T) + 15) / 16 * 16;
}

void send(const JobDescriptors& tables, const Layout& layout, void* scratch, Blank stats,
          cudaStream_t stream) {
  std::vector<unsigned char> image(layout.tables);
  std::size_t at = 0;
  put(image, at, tables.tensor);
  put(image, at, tables.model);
  put(image, at, tables.selector);
  put(image, at, tables.limit);
  auto* zero =
      reinterpret_cast<std::uint64_t*>(static_cast<unsigned char*>(scratch) + layout.zero_begin);
  launch_prepare(image.data(), image.size(), scratch,
                 Blank{zero, static_cast<std::int64_t>((layout.zero_end - layout.zero_begin) / 8)},
                 stats, stream);
}

std::size_t selectors_of(Trim trim, std::size_t K) {
  return trim == Trim::kMagnitude ? K : trim == Trim::kOutliers ? 2 * K : 0;
}

JobDescriptors tables_of(const std::vector<Job>& jobs, const Group& group, std::int64_t* stats) {
  JobDescriptors tables;
  const std::size_t words =
      static_cast<std::size_t>(stats_words(static_cast<int>(jobs[group.jobs[0]].models.size())));
  for (std::size_t j : group.jobs)
    append_job(tables, jobs[j], group.wide, stats ? stats + j * words : nullptr);
  return tables;
}

Layout layout_of(const JobDescriptors& tables, const Group& group, std::size_t K, void* scratch) {
  Sizes sizes;
  sizes.tensors = sizes.rows = group.jobs.size();
  sizes.models = K;
  sizes.selectors = selectors_of(group.trim, K);
  sizes.tiles = tables.tiles;
  sizes.chunks = tables.chunks;
  sizes.histogram = tables.search && !group.small;
  sizes.norm = group.norm != Norm::kNone && !group.small;
  sizes.sampled = tables.sampled && !group.small;
  sizes.quads = tables.quads;
  sizes.records = tables.records;
  return lay_out(scratch, sizes);
}

void check_models(std::size_t K, std::size_t want) {
  if (K < 1 || K > kMaxModels) {
    throw std::invalid_argument("models: " + std::to_string(K) +
                                " given; the CUDA backend takes 1 to 64 at a time");
  }
  if (K != want)
    throw std::invalid_argument("all tensors of a call have the same number of models");
}

void check_job(const Job& job, std::size_t K) {
  check_models(job.models.size(), K);
  const Rule& rule = job.rule;
  for (const std::size_t length :
       {rule.weights.size(), rule.elect_weights.size(), rule.densities.size(), rule.ranks.size(),
        rule.dropped.size(), rule.thresholds ? rule.thresholds->size() : K,
        rule.bounds ? rule.bounds->size() : K, rule.factors ? rule.factors->size() : K}) {
    if (length != K)
      throw std::invalid_argument("a rule has one weight, density and rank per model");
  }
}

void check_scratch(std::size_t have, std::size_t need) {
  if (have < need) {
    throw std::invalid_argument("scratch has " + std::to_string(have) + " bytes, " +
                                std::to_string(need) + " are needed; ask scratch_bytes");
  }
}

void launch_pass(const Batch& batch, const Group& group, Pass pass, int processors,
                 cudaStream_t stream) {
  const bool fast = group.fast >= 0 && !(pass == Pass::kSampled && group.elect == Elect::kNone);
  if (fast && group.fast == static_cast<int>(DType::kFloat32))
    launch_fast_f32(batch, processors, pass, stream);
  else if (fast && group.fast == static_cast<int>(DType::kFloat16))
    launch_fast_f16(batch, processors, pass, stream);
  else if (fast)
    launch_fast_bf16(batch, processors, pass, stream);
  else if (pass == Pass::kSampled)
    launch_sampled_pass(batch, processors, stream);
  else
    launch_apply(batch, group.wide, processors, stream);
}

}  // namespace

int stats_words(std::size_t models) { return stats_words(static_cast<int>(models)); }

std::size_t scratch_bytes(const std::vector<Job>& jobs) {
  for (const Job& job : jobs) check_job(job, jobs[0].models.size());
  std::size_t total = 0;
  for (const Group& one : group(jobs)) {
    const std::size_t K = jobs[one.jobs[0]].models.size();
    total += layout_of(tables_of(jobs, one, nullptr), one, K, nullptr).end;
  }
  return std::max<std::size_t>(total, 256);
}

void ties(const std::vector<Job>& jobs, void* scratch, std::size_t scratch_size,
          std::int64_t* stats, Place place) {
  if (jobs.empty()) return;
  const DeviceGuard guard(place.device);
  const auto stream = reinterpret_cast<cudaStream_t>(place.stream);
  const int processors = place.processors;
  const std::size_t K = jobs[0].models.size();
  for (const Job& job : jobs) check_job(job, K);
  auto* at = static_cast<unsigned char*>(scratch);
  std::size_t left = scratch_size;
  Blank blank{reinterpret_cast<std::uint64_t*>(stats),
              static_cast<std::int64_t>(jobs.size()) * stats_words(static_cast<int>(K))};
  for (const Group& one : group(jobs)) {
    const JobDescriptors tables = tables_of(jobs, one, stats);
    Layout layout = layout_of(tables, one, K, at);
    check_scratch(left, layout.end);
    Batch& batch = layout.batch;
    batch.trim = one.trim, batch.elect = one.elect, batch.merge = one.merge,
    batch.rescale = one.rescale, batch.unit = one.unit;
    send(tables, layout, at, blank, stream);
    blank = Blank{};
    if (one.small) {
      launch_small(batch, one.wide, one.norm, stream);
    } else {
      if (batch.sampled != nullptr) {
        launch_sample(batch, processors, stream);
        launch_pass(batch, one, Pass::kSampled, processors, stream);
        launch_resolve(batch, processors, stream);
      }
      // From here on only what is still to be done is done: nothing, where the brackets held.
      if (tables.search) launch_radix(batch, one.wide, processors, stream);
      if (one.norm != Norm::kNone) launch_norms(batch, one.wide, one.norm, stream);
      launch_pass(batch, one, Pass::kFirst, processors, stream);
      const auto undecided = [](const TensorEntry& t) { return t.zero_sign == 0; };
      if (one.elect != Elect::kNone &&
          std::any_of(tables.tensor.begin(), tables.tensor.end(), undecided)) {
        launch_again(batch, one.wide, processors, stream);
      }
      launch_report(batch, one.wide, nullptr, stream);
    }
    at += layout.end;
    left -= layout.end;
  }
}

namespace {

JobDescriptors segment_tables(const std::vector<Segment>& segments,
                              const std::vector<std::int64_t>& ranks) {
  JobDescriptors tables;
  std::int64_t total = 0;
  for (const Segment& segment : segments) {
    if (segment.n == 0) continue;
    tables.append_tensor(segment.models, segment.base, Operand{}, segment.n);
    total += segment.n;
  }
  for (const std::int64_t rank : ranks) {
    Limit limit{0, ~std::uint64_t(0), 1.0};
    tables.append_selector(rank, total, true, limit.lower);
    tables.limit.push_back(limit);
  }
  return tables;
}

Layout segment_layout(const JobDescriptors& tables, std::size_t K, void* scratch) {
  Sizes sizes;
  sizes.tensors = tables.tensor.size();
  sizes.models = sizes.selectors = K;
  sizes.rows = 1;
  sizes.tiles = tables.tiles;
  sizes.chunks = tables.chunks;
  sizes.histogram = tables.search;
  return lay_out(scratch, sizes);
}

}  // namespace

std::size_t scratch_bytes(const std::vector<Segment>& segments, std::size_t models) {
  return segment_layout(segment_tables(segments, std::vector<std::int64_t>(models, 1)), models,
                        nullptr)
      .end;
}

void select(const std::vector<Segment>& segments, const std::vector<std::int64_t>& ranks,
            void* scratch, std::size_t scratch_size, double* thresholds, Place place) {
  const DeviceGuard guard(place.device);
  const auto stream = reinterpret_cast<cudaStream_t>(place.stream);
  const std::size_t K = ranks.size();
  bool wide = false;
  check_models(K, K);
  for (const Segment& segment : segments) {
    check_models(segment.models.size(), K);
    wide = wide || is_wide(segment.models, segment.base);
  }
  const JobDescriptors tables = segment_tables(segments, ranks);
  const Layout layout = segment_layout(tables, K, scratch);
  check_scratch(scratch_size, layout.end);
  send(tables, layout, scratch, Blank{}, stream);
  if (tables.search) launch_radix(layout.batch, wide, place.processors, stream);
  launch_report(layout.batch, wide, thresholds, stream);
}

}  // namespace pymerge::cuda
