// What Python sees of the core, reflora._C: addresses and sizes in, the interpreter lock released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"

namespace py = pybind11;
using namespace reflora;

template <class T>
static T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

static void run(uintptr_t table, int64_t rows, uintptr_t results, int kind, bool scalar, double kappa_max,
                double kappa_of_rank, int64_t start, int64_t warmup_steps, int64_t interval, double reg, int metric,
                bool momentum, bool late, double damping, uintptr_t hypers, double grad_scale, bool check,
                bool found_inf, std::optional<uint64_t> seed, uintptr_t kept, int threads) {
    const Job job{Kind(kind), scalar, kappa_max, kappa_of_rank, start, warmup_steps, interval, reg, Metric(metric),
                  momentum, late, damping, at<const double>(hypers), grad_scale, check, found_inf, seed.has_value(),
                  seed.value_or(0), at<double>(kept)};
    py::gil_scoped_release release;
    run_rows(at<const int64_t>(table), rows, at<double>(results), job, threads);
}

template <class T>
static void matrices_as(Function f, uintptr_t x, uintptr_t y, const std::array<uintptr_t, 3>& out, int64_t batch,
                        int64_t n, double root, double shift, double unit, int threads) {
    run_matrices<T>(f, at<const T>(x), at<const T>(y), {at<T>(out[0]), at<T>(out[1]), at<T>(out[2])}, batch, n, root,
                    shift, unit, threads);
}

static void matrices(int function, bool float32, uintptr_t x, uintptr_t y, std::array<uintptr_t, 3> out, int64_t batch,
                     int64_t n, double root, double shift, double unit, int threads) {
    py::gil_scoped_release release;
    const auto as = float32 ? matrices_as<float> : matrices_as<double>;
    as(Function(function), x, y, out, batch, n, root, shift, unit, threads);
}

static void eigh(bool float32, uintptr_t x, uintptr_t w, uintptr_t V, int64_t batch, int64_t n, int threads) {
    py::gil_scoped_release release;
    run_eigh(float32 ? F32 : F64, at<const void>(x), at<void>(w), at<void>(V), batch, n, threads);
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "The C++ core of reflora: raw addresses and sizes in, no checks. Use reflora's functions instead.";
    m.def("run", &run, py::kw_only(), py::arg("table"), py::arg("rows"), py::arg("results"), py::arg("kind"),
          py::arg("scalar"), py::arg("kappa_max"), py::arg("kappa_of_rank"), py::arg("start") = 0,
          py::arg("warmup_steps") = 0, py::arg("interval") = 1, py::arg("reg") = 0.0, py::arg("metric") = 0,
          py::arg("momentum") = false, py::arg("late") = false, py::arg("damping") = 0.0,
          py::arg("hypers") = 0, py::arg("grad_scale") = 1.0, py::arg("check") = true, py::arg("found_inf") = false,
          py::arg("seed") = py::none(), py::arg("kept") = 0, py::arg("threads"),
          "One table operation (Kind in csrc/table.h) over all rows.");
    m.def("kept_doubles", [](uintptr_t table, int64_t rows) { return kept_doubles(at<const int64_t>(table), rows); },
          py::kw_only(), py::arg("table"), py::arg("rows"), "Size in float64 of what run() takes as kept.");
    m.def("matrices", &matrices, py::kw_only(), py::arg("function"), py::arg("float32"), py::arg("x"), py::arg("y"),
          py::arg("out"), py::arg("batch"), py::arg("n"), py::arg("root") = 1.0, py::arg("shift") = 0.0,
          py::arg("unit") = 0.0, py::arg("threads"),
          "A batch of n x n matrices (Function in csrc/table.h); arithmetic in float64.");
    m.def("eigh", &eigh, py::kw_only(), py::arg("float32"), py::arg("x"), py::arg("w"), py::arg("v"), py::arg("batch"),
          py::arg("n"), py::arg("threads"),
          "Symmetric eigenproblems; v = 0: values only; arithmetic in the type of x.");
    m.def("instruction_set", &instruction_set, "The instruction set chosen on this processor.");
    py::dict numbers;
    for (const Number& one : NUMBERS) numbers[one.name] = one.number;
    m.attr("NUMBERS") = numbers;  // of reflora/columns.py, when this was built
}
