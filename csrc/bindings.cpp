// The only pybind11 file: addresses, sizes and options come as integers and floats, the GIL is released, results go
// back as plain tuples. pymerge/_native.py is the only caller; pymerge/_C.pyi says what is here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/cg.h"
#include "cpu/finite.h"
#include "cpu/levels.h"
#include "cpu/threads.h"
#include "cpu/ties.h"

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

py::tuple run_ties(const std::vector<Address>& models, const std::optional<Address>& base,
                   const Address& out, uint64_t n, int trim, int elect, int merge,
                   bool zero_majority, int rescale, const std::vector<double>& weights,
                   const std::vector<double>& elect_weights, const std::vector<double>& densities,
                   const std::vector<uint64_t>& ranks, const std::vector<uint64_t>& dropped,
                   double scaling, uint64_t key,
                   const std::optional<std::vector<double>>& thresholds,
                   const std::optional<std::vector<double>>& bounds, int majority, int threads,
                   const std::string& level) {
  const size_t count = models.size();
  if (count == 0 || weights.size() != count || elect_weights.size() != count ||
      densities.size() != count || ranks.size() != count || dropped.size() != count ||
      (thresholds && thresholds->size() != count) || (bounds && bounds->size() != count)) {
    throw std::invalid_argument("the rule is for another number of models than " +
                                std::to_string(count));
  }
  const TiesRule rule{pymerge::Trim(trim),
                      pymerge::Elect(elect),
                      pymerge::Merge(merge),
                      zero_majority,
                      TiesRule::Norm(rescale),
                      weights,
                      elect_weights,
                      densities,
                      ranks,
                      dropped,
                      scaling,
                      key,
                      thresholds,
                      bounds,
                      majority};
  const Buffer target = buffer(out);
  pymerge::cpu::TiesStats stats;
  {
    py::gil_scoped_release release;
    pymerge::cpu::Scratch scratch;
    const Context context{pymerge::cpu::kernels(level), thread_count(threads), scratch};
    stats = pymerge::cpu::ties(context, buffers(models), base_buffer(base),
                               const_cast<void*>(target.data), target.type, n, rule);
  }
  return py::make_tuple(
      py::tuple(py::cast(stats.kept)), stats.conflicts, py::tuple(py::cast(stats.non_finite)),
      py::tuple(py::cast(stats.thresholds)), stats.positive, stats.negative, stats.path);
}

std::vector<double> run_select(const std::vector<SegmentTuple>& tensors,
                               const std::vector<uint64_t>& ranks, int threads,
                               const std::string& level) {
  py::gil_scoped_release release;
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

// The vector work of conjugate gradient, for layers of n elements of float32 or float64, one behind the other.
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
  py::gil_scoped_release release;
  return with_type(dtype, [&](auto* t) {
    return pymerge::cpu::cg_dot(cg_shape(layers, n, threads, level), at(x, t), at(y, t));
  });
}

std::vector<std::pair<double, double>> run_cg_advance(uint64_t step, uint64_t r, uint64_t p,
                                                      uint64_t q, const std::vector<double>& alpha,
                                                      uint64_t n, int dtype, int threads,
                                                      const std::string& level) {
  py::gil_scoped_release release;
  return with_type(dtype, [&](auto* t) {
    return pymerge::cpu::cg_advance(cg_shape(alpha.size(), n, threads, level), at(step, t),
                                    at(r, t), at(p, t), at(q, t), alpha);
  });
}

std::vector<std::pair<double, double>> run_cg_turn(uint64_t p, uint64_t z, uint64_t step,
                                                   const std::vector<double>& beta, uint64_t n,
                                                   int dtype, int threads,
                                                   const std::string& level) {
  py::gil_scoped_release release;
  return with_type(dtype, [&](auto* t) {
    return pymerge::cpu::cg_turn(cg_shape(beta.size(), n, threads, level), at(p, t), at(z, t),
                                 at(step, t), beta);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pymerge; use them through pymerge._native.";
  m.def("ties", &run_ties, py::arg("models"), py::arg("base"), py::arg("out"), py::arg("n"),
        py::kw_only(), py::arg("trim"), py::arg("elect"), py::arg("merge"),
        py::arg("zero_majority"), py::arg("rescale"), py::arg("weights"), py::arg("elect_weights"),
        py::arg("densities"), py::arg("ranks"), py::arg("dropped"), py::arg("scaling"),
        py::arg("key"), py::arg("thresholds"), py::arg("bounds"), py::arg("majority"),
        py::arg("threads"), py::arg("level"));
  m.def("select", &run_select, py::arg("tensors"), py::arg("ranks"), py::arg("threads"),
        py::arg("level"));
  m.def(
      "copy",
      [](const std::vector<uint64_t>& sources, uint64_t out, uint64_t bytes, int threads,
         const std::string& level) {
        py::gil_scoped_release release;
        pymerge::cpu::copy(pymerge::cpu::kernels(level), sources, out, bytes,
                           thread_count(threads));
      },
      py::arg("sources"), py::arg("out"), py::arg("bytes"), py::arg("threads"), py::arg("level"));
  m.def(
      "count_non_finite",
      [](const Address& tensor, uint64_t n, int threads, const std::string& level) {
        const Buffer x = buffer(tensor);
        py::gil_scoped_release release;
        return pymerge::cpu::count_non_finite(x.data, x.type, n, thread_count(threads), level);
      },
      py::arg("tensor"), py::arg("n"), py::arg("threads"), py::arg("level"));
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
#if defined(PYMERGE_WITH_CUDA)
  m.attr("with_cuda") = true;
  pymerge::cuda::bind(m);
#else
  m.attr("with_cuda") = false;
#endif
}
