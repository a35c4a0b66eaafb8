// The submodule `cuda` of pymerge._C. Device memory and streams come as integers, a rule as the
// TiesRule of pymerge/rules/ties.py. Nothing here waits for the device.

#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "../gil.h"
#include "cuda/gram/gram.h"
#include "cuda/mats/cg.h"
#include "cuda/ties/ties.h"

namespace py = pybind11;

namespace pymerge::cuda {
namespace {

template <class Enum>
Enum named(const std::map<std::string, Enum>& names, const py::handle& rule, const char* field) {
  const auto value = py::cast<std::string>(rule.attr(field));
  const auto found = names.find(value);
  if (found != names.end()) return found->second;
  throw std::invalid_argument(std::string(field) + "='" + value +
                              "' is not known to the CUDA backend");
}

DType dtype_of(const std::string& name) {
  static const auto& names = *new std::map<std::string, DType>{{"float32", DType::kFloat32},
                                                               {"float16", DType::kFloat16},
                                                               {"bfloat16", DType::kBFloat16},
                                                               {"float64", DType::kFloat64}};
  const auto found = names.find(name);
  if (found == names.end()) {
    throw std::invalid_argument("dtype '" + name +
                                "' is not one of float32, float16, bfloat16, float64");
  }
  return found->second;
}

Operand operand(const py::handle& buffer) {
  const auto pair = py::cast<std::pair<std::uintptr_t, std::string>>(buffer);
  return Operand{pair.first, dtype_of(pair.second)};
}

std::optional<Operand> maybe_operand(const py::handle& buffer) {
  if (buffer.is_none()) return std::nullopt;
  return operand(buffer);
}

std::vector<Operand> operands(const py::handle& buffers) {
  std::vector<Operand> all;
  for (const py::handle& buffer : buffers) all.push_back(operand(buffer));
  return all;
}

Rule rule_of(const py::handle& from) {
  Rule rule;
  rule.trim = named<Trim>({{"none", Trim::kNone},
                           {"magnitude", Trim::kMagnitude},
                           {"outliers", Trim::kOutliers},
                           {"random", Trim::kRandom}},
                          from, "trim");
  rule.elect = named<Elect>(
      {{"none", Elect::kNone}, {"sum", Elect::kSum}, {"count", Elect::kCount}}, from, "elect");
  rule.merge = named<Merge>({{"sum", Merge::kSum},
                             {"weighted_mean", Merge::kWeightedMean},
                             {"mean", Merge::kMean},
                             {"max", Merge::kMax}},
                            from, "merge");
  rule.norm = named<Norm>({{"none", Norm::kNone},
                           {"density", Norm::kNone},
                           {"l1", Norm::kL1},
                           {"l2", Norm::kL2},
                           {"linf", Norm::kLinf}},
                          from, "rescale");
  const bool divides = py::cast<std::string>(from.attr("rescale")) == "density";
  rule.factors = py::cast<std::optional<std::vector<double>>>(from.attr("factors"));
  rule.first = py::cast<std::int64_t>(from.attr("first"));
  rule.rescale = divides                    ? Rescale::kDivide
                 : rule.norm == Norm::kNone ? Rescale::kNone
                                            : Rescale::kMultiply;
  if (rule.factors) rule.norm = Norm::kNone;  // known, so that none is looked for
  const int majority = py::cast<int>(from.attr("majority"));
  rule.zero_sign = py::cast<std::string>(from.attr("zero_sign")) == "positive" ? 1 : majority;
  rule.weights = py::cast<std::vector<double>>(from.attr("weights"));
  rule.elect_weights = py::cast<std::vector<double>>(from.attr("elect_weights"));
  rule.densities = py::cast<std::vector<double>>(from.attr("densities"));
  rule.ranks = py::cast<std::vector<std::int64_t>>(from.attr("ranks"));
  rule.dropped = py::cast<std::vector<std::int64_t>>(from.attr("dropped"));
  rule.scaling = py::cast<double>(from.attr("scaling"));
  rule.key = py::cast<std::uint64_t>(from.attr("key"));
  rule.thresholds = py::cast<std::optional<std::vector<double>>>(from.attr("thresholds"));
  rule.bounds = py::cast<std::optional<std::vector<double>>>(from.attr("bounds"));
  return rule;
}

// The tensors of one call of `ties`, parsed once: first asked for its sizes, then run.
class TiesCall {
 public:
  // jobs: (models, base or None, out, n, rule) a tensor; a buffer is (address, dtype name).
  explicit TiesCall(const py::sequence& jobs) {
    for (const py::handle& item : jobs) {
      const auto fields = py::cast<py::tuple>(item);
      Job job;
      job.models = operands(fields[0]);
      job.base = maybe_operand(fields[1]);
      job.out = operand(fields[2]);
      job.n = py::cast<std::int64_t>(fields[3]);
      job.rule = rule_of(fields[4]);
      jobs_.push_back(std::move(job));
    }
  }
  std::size_t scratch() const { return scratch_bytes(jobs_); }
  int words() const { return jobs_.empty() ? 0 : stats_words(jobs_[0].models.size()); }
  void run(std::uintptr_t scratch, std::size_t scratch_size, std::uintptr_t stats, int device,
           int processors, std::uintptr_t stream) const {
    ties(jobs_, reinterpret_cast<void*>(scratch), scratch_size,
         reinterpret_cast<std::int64_t*>(stats), Place{device, processors, stream});
  }

 private:
  std::vector<Job> jobs_;
};

class SelectCall {
 public:
  // segments: (models, base or None, n).
  SelectCall(const py::sequence& segments, std::vector<std::int64_t> ranks)
      : ranks_(std::move(ranks)) {
    for (const py::handle& item : segments) {
      const auto fields = py::cast<py::tuple>(item);
      segments_.push_back(Segment{operands(fields[0]), maybe_operand(fields[1]),
                                  py::cast<std::int64_t>(fields[2])});
    }
  }
  std::size_t scratch() const { return scratch_bytes(segments_, ranks_.size()); }
  void run(std::uintptr_t scratch, std::size_t scratch_size, std::uintptr_t thresholds, int device,
           int processors, std::uintptr_t stream) const {
    select(segments_, ranks_, reinterpret_cast<void*>(scratch), scratch_size,
           reinterpret_cast<double*>(thresholds), Place{device, processors, stream});
  }

 private:
  std::vector<Segment> segments_;
  std::vector<std::int64_t> ranks_;
};

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Inputs as a table in the device's memory (csrc/cuda/gram/gram.h).
class GramOf {
 public:
  GramOf(std::uintptr_t table, int models, bool has_base, std::int64_t rows, std::int64_t columns,
         bool by_column, bool wide, bool aligned)
      : call_{at<GramInput>(table), models, has_base, rows, columns, by_column, wide, aligned} {}
  // float64 numbers that `gram` needs room for.
  std::int64_t sums() const { return call_.parts() * call_.groups() * call_.pairs(); }
  void run(std::uintptr_t sums, std::uintptr_t out, int device, int processors,
           std::uintptr_t stream) const {
    gram(call_, at<double>(sums), at<double>(out), Place{device, processors, stream});
  }
  void combine(std::uintptr_t coefficients, std::uintptr_t out, const std::string& dtype,
               bool aligned, int device, int processors, std::uintptr_t stream) const {
    cuda::combine(call_, at<double>(coefficients), at<void>(out), dtype_of(dtype), aligned,
                  Place{device, processors, stream});
  }

 private:
  GramCall call_;
};

// Vectors and tables as addresses, 0 for those that are not there.
class CgCall {
 public:
  CgCall(std::int64_t layers, std::int64_t n, std::int64_t chunk, const std::string& dtype)
      : shape_{layers, n, chunk, dtype_of(dtype)} {}
  void dot(std::uintptr_t x, std::uintptr_t y, std::uintptr_t parts, int device, int processors,
           std::uintptr_t stream) const {
    cg_dot(shape_, at<void>(x), at<void>(y), at<double>(parts), Place{device, processors, stream});
  }
  void advance(std::uintptr_t step, std::uintptr_t r, std::uintptr_t p, std::uintptr_t q,
               std::uintptr_t curvatures, std::uintptr_t directions, std::uintptr_t sums,
               std::uintptr_t state, std::uintptr_t state_out, int device, int processors,
               std::uintptr_t stream) const {
    cg_advance(shape_,
               CgAdvance{at<void>(step), at<void>(r), at<void>(p), at<void>(q),
                         at<double>(curvatures), at<double>(directions), at<double>(sums),
                         at<CgState>(state), at<CgState>(state_out)},
               Place{device, processors, stream});
  }
  void turn(std::uintptr_t p, std::uintptr_t z, std::uintptr_t step, std::uintptr_t followings,
            std::uintptr_t sums, std::uintptr_t directions, std::uintptr_t state,
            std::uintptr_t state_out, int device, int processors, std::uintptr_t stream) const {
    cg_turn(
        shape_,
        CgTurn{at<void>(p), at<void>(z), at<void>(step), at<double>(followings), at<double>(sums),
               at<double>(directions), at<CgState>(state), at<CgState>(state_out)},
        Place{device, processors, stream});
  }

 private:
  CgShape shape_;
};

void solve_small(std::int64_t layers, int d_out, int d_in, int count, std::uintptr_t step,
                 std::uintptr_t r, std::uintptr_t a, std::uintptr_t b, std::uintptr_t right,
                 std::uintptr_t left, std::int64_t a_stride, std::int64_t right_stride,
                 std::uintptr_t scratch, std::uintptr_t state, bool limits, int iterations,
                 int device, int processors, std::uintptr_t stream) {
  cg_small(CgSmall{layers, d_out, d_in, count, at<float>(step), at<float>(r), at<float>(a),
                   at<float>(b), at<float>(right), at<float>(left), a_stride, right_stride,
                   at<float>(scratch), at<CgState>(state), limits, iterations},
           Place{device, processors, stream});
}

}  // namespace

void bind(py::module_& module) {
  py::module_ cuda =
      module.def_submodule("cuda", "Kernels for NVIDIA GPUs; addresses and streams as integers.");
  module.def(
      "cuda_why_not",
      [] {
        const std::string reason = why_not();
        return reason.empty() ? std::nullopt : std::optional<std::string>(reason);
      },
      "None where the CUDA kernels can run on this machine, else the reason.");
  const auto free_gil = py::call_guard<pymerge::ReleasedGil>();
  py::class_<TiesCall>(cuda, "Ties")
      .def(py::init<const py::sequence&>(), py::arg("jobs"))
      .def_property_readonly("scratch_bytes", &TiesCall::scratch)
      .def_property_readonly("stats_words", &TiesCall::words)
      .def("run", &TiesCall::run, py::arg("scratch"), py::arg("scratch_size"), py::arg("stats"),
           py::arg("device"), py::arg("processors"), py::arg("stream"), free_gil);
  py::class_<SelectCall>(cuda, "Select")
      .def(py::init<const py::sequence&, std::vector<std::int64_t>>(), py::arg("segments"),
           py::arg("ranks"))
      .def_property_readonly("scratch_bytes", &SelectCall::scratch)
      .def("run", &SelectCall::run, py::arg("scratch"), py::arg("scratch_size"),
           py::arg("thresholds"), py::arg("device"), py::arg("processors"), py::arg("stream"),
           free_gil);
  py::class_<GramOf>(cuda, "Gram")
      .def(py::init<std::uintptr_t, int, bool, std::int64_t, std::int64_t, bool, bool, bool>(),
           py::arg("table"), py::arg("models"), py::arg("has_base"), py::arg("rows"),
           py::arg("columns"), py::arg("by_column"), py::arg("wide"), py::arg("aligned"))
      .def_property_readonly("sums", &GramOf::sums)
      .def("run", &GramOf::run, py::arg("sums"), py::arg("out"), py::arg("device"),
           py::arg("processors"), py::arg("stream"), free_gil)
      .def("combine", &GramOf::combine, py::arg("coefficients"), py::arg("out"), py::arg("dtype"),
           py::arg("aligned"), py::arg("device"), py::arg("processors"), py::arg("stream"),
           free_gil);
  py::class_<CgCall>(cuda, "Cg")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t, const std::string&>(),
           py::arg("layers"), py::arg("n"), py::arg("chunk"), py::arg("dtype"))
      .def("dot", &CgCall::dot, py::arg("x"), py::arg("y"), py::arg("parts"), py::arg("device"),
           py::arg("processors"), py::arg("stream"), free_gil)
      .def("advance", &CgCall::advance, py::arg("step"), py::arg("r"), py::arg("p"), py::arg("q"),
           py::arg("curvatures"), py::arg("directions"), py::arg("sums"), py::arg("state"),
           py::arg("state_out"), py::arg("device"), py::arg("processors"), py::arg("stream"),
           free_gil)
      .def("turn", &CgCall::turn, py::arg("p"), py::arg("z"), py::arg("step"),
           py::arg("followings"), py::arg("sums"), py::arg("directions"), py::arg("state"),
           py::arg("state_out"), py::arg("device"), py::arg("processors"), py::arg("stream"),
           free_gil);
  cuda.def("cg_small", &solve_small, py::arg("layers"), py::arg("d_out"), py::arg("d_in"),
           py::arg("count"), py::arg("step"), py::arg("r"), py::arg("a"), py::arg("b"),
           py::arg("right"), py::arg("left"), py::arg("a_stride"), py::arg("right_stride"),
           py::arg("scratch"), py::arg("state"), py::arg("limits"), py::arg("iterations"),
           py::arg("device"), py::arg("processors"), py::arg("stream"), free_gil);
}

}  // namespace pymerge::cuda
