// The module pymerge._C: addresses, sizes and options come as integers and floats, the GIL is
// released (gil.h), results go back as plain tuples. cuda/bindings.cpp adds its submodule `cuda`.
// pymerge/backends/native.py is the only module that imports it; pymerge/_C.pyi says what is here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/core/finite.h"
#include "cpu/core/levels.h"
#include "cpu/core/mapped.h"
#include "cpu/core/threads.h"
#include "cpu/gram/gram.h"
#include "cpu/masked/masked.h"
#include "cpu/low_rank/low_rank.h"
#include "cpu/mats/cg.h"
#include "cpu/ties/ties.h"
#include "gil.h"

#if defined(PYMERGE_WITH_CUDA)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using pymerge::DType;
using pymerge::cpu::Buffer;
using pymerge::cpu::Context;
using pymerge::cpu::Segment;
using pymerge::cpu::TiesRule;

using Address = std::pair<uint64_t, int>;  // address, DType
using SegmentTuple = std::tuple<std::vector<Address>, std::optional<Address>, uint64_t>;

Buffer buffer(const Address& address) {
  if (address.second < 0 || address.second > 3) throw std::invalid_argument("unknown dtype code");
  return {reinterpret_cast<const void*>(address.first), DType(address.second)};
}

// A base of no elements may have no address, and still is a base.
Buffer base_buffer(const std::optional<Address>& address) {
  if (!address) return {};
  Buffer result = buffer(*address);
  static const double nothing = 0;
  if (result.data == nullptr) result.data = &nothing;
  return result;
}

std::vector<Buffer> buffers(const std::vector<Address>& addresses) {
  std::vector<Buffer> result;
  for (const Address& address : addresses) result.push_back(buffer(address));
  return result;
}

int thread_count(int threads) { return threads > 0 ? threads : pymerge::cpu::available_threads(); }

// The numbers of a TiesRule of pymerge/rules/ties.py, for `count` models.
TiesRule rule_of(const py::dict& given, size_t count) {
  using Doubles = std::vector<double>;
  using Ranks = std::vector<uint64_t>;
  TiesRule rule{pymerge::Trim(py::cast<int>(given["trim"])),
                pymerge::Elect(py::cast<int>(given["elect"])),
                pymerge::Merge(py::cast<int>(given["merge"])),
                py::cast<bool>(given["zero_majority"]),
                TiesRule::Norm(py::cast<int>(given["rescale"])),
                py::cast<Doubles>(given["weights"]),
                py::cast<Doubles>(given["elect_weights"]),
                py::cast<Doubles>(given["densities"]),
                py::cast<Ranks>(given["ranks"]),
                py::cast<Ranks>(given["dropped"]),
                py::cast<double>(given["scaling"]),
                py::cast<uint64_t>(given["key"]),
                py::cast<std::optional<Doubles>>(given["thresholds"]),
                py::cast<std::optional<Doubles>>(given["bounds"]),
                py::cast<int>(given["majority"]),
                py::cast<std::optional<Doubles>>(given["factors"]),
                py::cast<uint64_t>(given["first"]),
                py::cast<Doubles>(given["epsilons"]),
                py::cast<uint64_t>(given["row_length"]),
                py::cast<uint64_t>(given["row_step"])};
  const auto fits = [&](const std::optional<Doubles>& x) { return !x || x->size() == count; };
  if (count == 0 || rule.weights.size() != count || rule.elect_weights.size() != count ||
      rule.densities.size() != count || rule.ranks.size() != count ||
      rule.dropped.size() != count || rule.epsilons.size() != count || !fits(rule.thresholds) ||
      !fits(rule.bounds) || !fits(rule.factors)) {
    throw std::invalid_argument("the rule is for another number of models than " +
                                std::to_string(count));
  }
  return rule;
}

py::tuple run_ties(const std::vector<Address>& models, const std::optional<Address>& base,
                   const Address& out, uint64_t n, const py::dict& given, int threads,
                   const std::string& level) {
  const TiesRule rule = rule_of(given, models.size());
  const Buffer target = buffer(out);
  pymerge::cpu::TiesStats stats;
  {
    pymerge::ReleasedGil release;
    pymerge::cpu::Scratch scratch;
    const Context context{pymerge::cpu::kernels(level), thread_count(threads), scratch};
    stats = pymerge::cpu::ties(context, buffers(models), base_buffer(base),
                               const_cast<void*>(target.data), target.type, n, rule);
  }
  return py::make_tuple(
      py::tuple(py::cast(stats.kept)), stats.conflicts, py::tuple(py::cast(stats.non_finite)),
      py::tuple(py::cast(stats.thresholds)), stats.positive, stats.negative, stats.path);
}

// The least time that one call takes, in seconds, on one thread: what the loops cost where the
// tensors stay in the caches, without the interpreter's share.
double run_ties_seconds(const std::vector<Address>& models, const std::optional<Address>& base,
                        const Address& out, uint64_t n, const py::dict& given, uint64_t repeats,
                        const std::string& level) {
  const TiesRule rule = rule_of(given, models.size());
  const Buffer target = buffer(out);
  const std::vector<Buffer> sources = buffers(models);
  pymerge::ReleasedGil release;
  pymerge::cpu::Scratch scratch;
  const Context context{pymerge::cpu::kernels(level), 1, scratch};
  using Clock = std::chrono::steady_clock;
  std::chrono::duration<double> least = std::chrono::duration<double>::max();
  for (uint64_t j = 0; j < repeats; ++j) {
    const Clock::time_point begin = Clock::now();
    pymerge::cpu::ties(context, sources, base_buffer(base), const_cast<void*>(target.data),
                       target.type, n, rule);
    least = std::min<std::chrono::duration<double>>(least, Clock::now() - begin);
  }
  return least.count();
}

py::tuple run_precompute(const std::vector<Address>& models, const std::optional<Address>& base,
                         int out_type, uint64_t n, const py::dict& given, int threads,
                         const std::string& level) {
  const TiesRule rule = rule_of(given, models.size());
  pymerge::cpu::Precomputed found;
  {
    pymerge::ReleasedGil release;
    pymerge::cpu::Scratch scratch;
    const Context context{pymerge::cpu::kernels(level), thread_count(threads), scratch};
    found = pymerge::cpu::precompute(context, buffers(models), base_buffer(base), DType(out_type),
                                     n, rule);
  }
  return py::make_tuple(py::tuple(py::cast(found.thresholds)), py::tuple(py::cast(found.bounds)),
                        py::tuple(py::cast(found.factors)));
}

std::vector<double> run_select(const std::vector<SegmentTuple>& tensors,
                               const std::vector<uint64_t>& ranks, int threads,
                               const std::string& level) {
  pymerge::ReleasedGil release;
  std::vector<std::vector<Buffer>> models;
  std::vector<Segment> segments;
  bool wide = false;
  for (const auto& [addresses, base, n] : tensors) {
    if (addresses.size() != ranks.size()) {
      throw std::invalid_argument("a tensor has " + std::to_string(addresses.size()) +
                                  " models for " + std::to_string(ranks.size()) + " ranks");
    }
    models.push_back(buffers(addresses));
    wide |= base && base->second == int(DType::kFloat64);
    for (const Address& address : addresses) wide |= address.second == int(DType::kFloat64);
  }
  for (size_t s = 0; s < tensors.size(); ++s) {
    const auto& [addresses, base, n] = tensors[s];
    if (n > 0) segments.push_back({models[s].data(), base_buffer(base), n});
  }
  pymerge::cpu::FloatEnvironment environment;
  pymerge::cpu::Scratch scratch;
  const Context context{pymerge::cpu::kernels(level), thread_count(threads), scratch};
  if (wide) return pymerge::cpu::select<double>(context, segments, ranks);
  const std::vector<float> thresholds = pymerge::cpu::select<float>(context, segments, ranks);
  return {thresholds.begin(), thresholds.end()};
}

// What the ops under masks take: MaskedRule of pymerge/rules/masked.py, with the addresses.
struct MaskedCall {
  pymerge::cpu::MaskedInputs inputs;
  pymerge::cpu::MaskedRule rule;
};

MaskedCall masked_call(const std::vector<Address>& models, const Address& base, uint64_t n,
                       const py::dict& given, int threads, const std::string& level) {
  using pymerge::cpu::MaskedKey;
  using pymerge::cpu::MaskedRule;
  MaskedCall call{
      {buffers(models), base_buffer(base), n, py::cast<bool>(given["wide"]), thread_count(threads),
       level},
      {MaskedRule::Merge(py::cast<int>(given["merge"])),
       {MaskedKey::Kind(py::cast<int>(given["key"])),
        buffer(py::cast<Address>(given["divergences"])), py::cast<uint64_t>(given["row"])},
       py::cast<double>(given["bound"]),
       py::cast<bool>(given["whole"]),
       py::cast<std::vector<double>>(given["factors"]),
       py::cast<double>(given["floor"])}};
  if (models.empty() || call.rule.factors.size() != models.size() || call.rule.key.row == 0) {
    throw std::invalid_argument("the rule is for another number of models than " +
                                std::to_string(models.size()));
  }
  return call;
}

py::tuple run_masked(const std::vector<Address>& models, const Address& base, const Address& out,
                     uint64_t n, const py::dict& given, int threads, const std::string& level) {
  const MaskedCall call = masked_call(models, base, n, given, threads, level);
  const Buffer target = buffer(out);
  pymerge::cpu::MaskedStats stats;
  {
    pymerge::ReleasedGil release;
    pymerge::cpu::FloatEnvironment environment;
    stats =
        pymerge::cpu::masked(call.inputs, call.rule, const_cast<void*>(target.data), target.type);
  }
  return py::make_tuple(py::tuple(py::cast(stats.kept)), stats.conflicts,
                        py::tuple(py::cast(stats.non_finite)));
}

uint64_t run_masked_nonzero(const std::vector<Address>& models, const Address& base, uint64_t n,
                            const py::dict& given, int threads, const std::string& level) {
  const MaskedCall call = masked_call(models, base, n, given, threads, level);
  pymerge::ReleasedGil release;
  pymerge::cpu::FloatEnvironment environment;
  return pymerge::cpu::masked_nonzero(call.inputs, call.rule.key);
}

std::vector<double> run_masked_energies(const std::vector<Address>& models, const Address& base,
                                        uint64_t n, const py::dict& given, int threads,
                                        const std::string& level) {
  const MaskedCall call = masked_call(models, base, n, given, threads, level);
  pymerge::ReleasedGil release;
  pymerge::cpu::FloatEnvironment environment;
  return pymerge::cpu::masked_energies(call.inputs, call.rule);
}

std::vector<std::pair<uint64_t, uint64_t>> run_masked_overlaps(const std::vector<Address>& models,
                                                               const Address& base, uint64_t n,
                                                               const py::dict& given, int threads,
                                                               const std::string& level) {
  const MaskedCall call = masked_call(models, base, n, given, threads, level);
  pymerge::ReleasedGil release;
  pymerge::cpu::FloatEnvironment environment;
  return pymerge::cpu::masked_overlaps(call.inputs, call.rule.bound);
}

// To `out`, in the working precision; returns the least.
double run_masked_divergences(const std::vector<Address>& models, const Address& base, uint64_t n,
                              const py::dict& given, bool exact, uint64_t out, int threads,
                              const std::string& level) {
  const MaskedCall call = masked_call(models, base, n, given, threads, level);
  pymerge::ReleasedGil release;
  pymerge::cpu::FloatEnvironment environment;
  return pymerge::cpu::masked_divergences(call.inputs, call.rule.key.row, exact,
                                          reinterpret_cast<void*>(out));
}

// The ranks[j]-th largest key, by the selection of `ties`: NaN for rank 0 and for no elements.
template <class Work>
std::vector<double> select_masked(const MaskedCall& call, const std::vector<uint64_t>& ranks) {
  using Source = pymerge::cpu::KeySource<pymerge::Key<Work>>;
  const Source keys = [&](uint64_t i, uint64_t count, pymerge::Key<Work>* dst) {
    pymerge::cpu::masked_keys<Work>(call.inputs, call.rule.key, i, count, dst);
  };
  // One more key, 0, is the last of all: `select` has another answer for the rank of the last.
  const Source zero = [](uint64_t, uint64_t count, pymerge::Key<Work>* dst) {
    std::fill(dst, dst + count, pymerge::Key<Work>(0));
  };
  const std::vector<Buffer> read(ranks.size(), call.inputs.models[0]);
  std::vector<Segment> segments;
  for (const Source* source : {&keys, &zero}) {
    Segment segment{read.data(), call.inputs.base, source == &zero ? 1 : call.inputs.n};
    if constexpr (std::is_same_v<Work, float>) {
      segment.derived = source;
    } else {
      segment.wide = source;
    }
    if (segment.n > 0) segments.push_back(segment);
  }
  pymerge::cpu::Scratch scratch;
  const Context context{pymerge::cpu::kernels(call.inputs.level), call.inputs.threads, scratch};
  const std::vector<Work> found = pymerge::cpu::select<Work>(context, segments, ranks);
  return {found.begin(), found.end()};
}

std::vector<double> run_masked_select(const std::vector<Address>& models, const Address& base,
                                      uint64_t n, const py::dict& given,
                                      const std::vector<uint64_t>& ranks, int threads,
                                      const std::string& level) {
  const MaskedCall call = masked_call(models, base, n, given, threads, level);
  pymerge::ReleasedGil release;
  pymerge::cpu::FloatEnvironment environment;
  if (call.inputs.wide) return select_masked<double>(call, ranks);
  return select_masked<float>(call, ranks);
}

// The vector work of conjugate gradient, for layers of n elements of float32 or float64, one behind
// the other.
template <typename Run>
auto with_type(int dtype, const Run& run) {
  if (dtype == int(DType::kFloat32)) return run(static_cast<float*>(nullptr));
  if (dtype == int(DType::kFloat64)) return run(static_cast<double*>(nullptr));
  throw std::invalid_argument("conjugate gradient runs in float32 or float64");
}

template <typename T>
T* at(uint64_t address, T*) {
  return reinterpret_cast<T*>(address);
}

pymerge::cpu::CgShape cg_shape(uint64_t layers, uint64_t n, int threads, const std::string& level) {
  return {layers, n, thread_count(threads), level};
}

std::vector<double> run_cg_dot(uint64_t x, uint64_t y, uint64_t layers, uint64_t n, int dtype,
                               int threads, const std::string& level) {
  pymerge::ReleasedGil release;
  return with_type(dtype, [&](auto* t) {
    return pymerge::cpu::cg_dot(cg_shape(layers, n, threads, level), at(x, t), at(y, t));
  });
}

std::vector<std::pair<double, double>> run_cg_advance(uint64_t step, uint64_t r, uint64_t p,
                                                      uint64_t q, const std::vector<double>& alpha,
                                                      uint64_t n, int dtype, int threads,
                                                      const std::string& level) {
  pymerge::ReleasedGil release;
  return with_type(dtype, [&](auto* t) {
    return pymerge::cpu::cg_advance(cg_shape(alpha.size(), n, threads, level), at(step, t),
                                    at(r, t), at(p, t), at(q, t), alpha);
  });
}

std::vector<std::pair<double, double>> run_cg_turn(uint64_t p, uint64_t z, uint64_t step,
                                                   const std::vector<double>& beta, uint64_t n,
                                                   int dtype, int threads,
                                                   const std::string& level) {
  pymerge::ReleasedGil release;
  return with_type(dtype, [&](auto* t) {
    return pymerge::cpu::cg_turn(cg_shape(beta.size(), n, threads, level), at(p, t), at(z, t),
                                 at(step, t), beta);
  });
}

// The dot products of each row, or each column, to `out`, float64; coefficients lie at an address
// too.
void run_gram(const std::vector<Address>& models, const std::optional<Address>& base, uint64_t rows,
              uint64_t columns, bool by_column, uint64_t out, int threads,
              const std::string& level) {
  pymerge::ReleasedGil release;
  const pymerge::cpu::FloatEnvironment environment;
  const pymerge::cpu::GramShape shape{rows, columns, thread_count(threads), level};
  (by_column ? pymerge::cpu::gram_columns : pymerge::cpu::gram_rows)(
      shape, buffers(models), base_buffer(base), reinterpret_cast<double*>(out));
}

void run_combine(const std::vector<Address>& models, const std::optional<Address>& base,
                 uint64_t rows, uint64_t columns, bool by_column, uint64_t coefficients,
                 const Address& out, int threads, const std::string& level) {
  pymerge::ReleasedGil release;
  const pymerge::cpu::FloatEnvironment environment;
  const pymerge::cpu::GramShape shape{rows, columns, thread_count(threads), level};
  const Buffer target = buffer(out);
  (by_column ? pymerge::cpu::combine_columns : pymerge::cpu::combine_rows)(
      shape, buffers(models), base_buffer(base), reinterpret_cast<const double*>(coefficients),
      const_cast<void*>(target.data), target.type);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pymerge; use them through pymerge.backends.native.";
  // Called when the threads that are no daemons have ended, and the others still run.
  py::module_::import("atexit").attr("register")(py::cpp_function(&pymerge::HeldAtExit::begin));
  m.def("ties", &run_ties, py::arg("models"), py::arg("base"), py::arg("out"), py::arg("n"),
        py::arg("rule"), py::arg("threads"), py::arg("level"));
  m.def("ties_seconds", &run_ties_seconds, py::arg("models"), py::arg("base"), py::arg("out"),
        py::arg("n"), py::arg("rule"), py::arg("repeats"), py::arg("level"));
  m.def("precompute", &run_precompute, py::arg("models"), py::arg("base"), py::arg("out_dtype"),
        py::arg("n"), py::arg("rule"), py::arg("threads"), py::arg("level"));
  m.def("select", &run_select, py::arg("tensors"), py::arg("ranks"), py::arg("threads"),
        py::arg("level"));
  m.def("masked", &run_masked, py::arg("models"), py::arg("base"), py::arg("out"), py::arg("n"),
        py::arg("rule"), py::arg("threads"), py::arg("level"));
  m.def("masked_nonzero", &run_masked_nonzero, py::arg("models"), py::arg("base"), py::arg("n"),
        py::arg("rule"), py::arg("threads"), py::arg("level"));
  m.def("masked_energies", &run_masked_energies, py::arg("models"), py::arg("base"), py::arg("n"),
        py::arg("rule"), py::arg("threads"), py::arg("level"));
  m.def("masked_overlaps", &run_masked_overlaps, py::arg("models"), py::arg("base"), py::arg("n"),
        py::arg("rule"), py::arg("threads"), py::arg("level"));
  m.def("masked_divergences", &run_masked_divergences, py::arg("models"), py::arg("base"),
        py::arg("n"), py::arg("rule"), py::arg("exact"), py::arg("out"), py::arg("threads"),
        py::arg("level"));
  m.def("masked_select", &run_masked_select, py::arg("models"), py::arg("base"), py::arg("n"),
        py::arg("rule"), py::arg("ranks"), py::arg("threads"), py::arg("level"));
  m.def(
      "copy",
      [](const std::vector<uint64_t>& sources, uint64_t out, uint64_t bytes, int threads,
         const std::string& level) {
        pymerge::ReleasedGil release;
        pymerge::cpu::copy(pymerge::cpu::kernels(level), sources, out, bytes,
                           thread_count(threads));
      },
      py::arg("sources"), py::arg("out"), py::arg("bytes"), py::arg("threads"), py::arg("level"));
  m.def(
      "count_non_finite",
      [](const Address& tensor, uint64_t n, int threads, const std::string& level) {
        const Buffer x = buffer(tensor);
        pymerge::ReleasedGil release;
        return pymerge::cpu::count_non_finite(x.data, x.type, n, thread_count(threads), level);
      },
      py::arg("tensor"), py::arg("n"), py::arg("threads"), py::arg("level"));
  m.def("gram", &run_gram, py::arg("models"), py::arg("base"), py::arg("rows"), py::arg("columns"),
        py::arg("by_column"), py::arg("out"), py::arg("threads"), py::arg("level"));
  m.def("combine", &run_combine, py::arg("models"), py::arg("base"), py::arg("rows"),
        py::arg("columns"), py::arg("by_column"), py::arg("coefficients"), py::arg("out"),
        py::arg("threads"), py::arg("level"));
  m.def(
      "add_low_rank",
      [](const Address& base, uint64_t left, uint64_t right, uint64_t stride, uint64_t rank,
         double scale, const Address& out, uint64_t rows, uint64_t columns,
         const std::string& level) {
        const Buffer weight = buffer(base), sum = buffer(out);
        pymerge::ReleasedGil release;
        pymerge::cpu::add_low_rank(weight.data, weight.type, reinterpret_cast<const void*>(left),
                                   reinterpret_cast<const void*>(right), stride, rank, scale,
                                   sum.type == DType::kFloat64, const_cast<void*>(sum.data), rows,
                                   columns, level);
      },
      py::arg("base"), py::arg("left"), py::arg("right"), py::arg("stride"), py::arg("rank"),
      py::arg("scale"), py::arg("out"), py::arg("rows"), py::arg("columns"), py::arg("level"));
  m.def("cg_dot", &run_cg_dot, py::arg("x"), py::arg("y"), py::arg("layers"), py::arg("n"),
        py::arg("dtype"), py::arg("threads"), py::arg("level"));
  m.def("cg_advance", &run_cg_advance, py::arg("step"), py::arg("r"), py::arg("p"), py::arg("q"),
        py::arg("alpha"), py::arg("n"), py::arg("dtype"), py::arg("threads"), py::arg("level"));
  m.def("cg_turn", &run_cg_turn, py::arg("p"), py::arg("z"), py::arg("step"), py::arg("beta"),
        py::arg("n"), py::arg("dtype"), py::arg("threads"), py::arg("level"));
  m.def("cpu_levels", &pymerge::cpu::levels);
  m.def(
      "cpu_level",
      [](const std::string& level) { return std::string(pymerge::cpu::kernels(level).name); },
      py::arg("level"));
  m.def("available_threads", &pymerge::cpu::available_threads);
  using pymerge::cpu::Mapping;
  const auto mapping = [](uint64_t handle) { return reinterpret_cast<Mapping*>(handle); };
  m.def(
      "watch_mapping",
      [](uint64_t address, uint64_t bytes) {
        return reinterpret_cast<uint64_t>(pymerge::cpu::watch_mapping(address, bytes));
      },
      py::arg("address"), py::arg("bytes"));
  m.def(
      "forget_mapping", [=](uint64_t handle) { pymerge::cpu::forget_mapping(mapping(handle)); },
      py::arg("handle"));
  m.def(
      "mapping_lost", [=](uint64_t handle) { return pymerge::cpu::mapping_lost(mapping(handle)); },
      py::arg("handle"));
  m.def("lost_pages", &pymerge::cpu::lost_pages);
  m.def("install_bus_handler", &pymerge::cpu::install_bus_handler);
  m.def("remove_bus_handler", &pymerge::cpu::remove_bus_handler);
  m.def("bus_handler_installed", &pymerge::cpu::bus_handler_installed);
#if defined(PYMERGE_WITH_CUDA)
  m.attr("with_cuda") = true;
  pymerge::cuda::bind(m);
#else
  m.attr("with_cuda") = false;
#endif
}
