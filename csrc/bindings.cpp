#include <pybind11/pybind11.h>

#include "dispatch.h"

namespace py = pybind11;
using namespace reflora;

template <class T>
static T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

static void run(uintptr_t table, int64_t rows, uintptr_t results, int kind, bool scalar, double kappa_max,
                int source, bool keep, bool scalar_before, bool scalar_after, uintptr_t hypers, double grad_scale,
                int threads) {
    const Job job{Kind(kind), scalar, kappa_max, Source(source), keep, scalar_before, scalar_after,
                  at<const double>(hypers), grad_scale};
    py::gil_scoped_release release;
    run_rows(at<const int64_t>(table), rows, at<double>(results), job, threads);
}

static void matrices(int function, bool float32, uintptr_t x, uintptr_t y, uintptr_t out, uintptr_t out2, int64_t batch,
                     int64_t n, int threads) {
    py::gil_scoped_release release;
    const auto f = Function(function);
    if (float32) run_matrices(f, at<const float>(x), at<const float>(y), at<float>(out), at<float>(out2), batch, n, threads);
    else run_matrices(f, at<const double>(x), at<const double>(y), at<double>(out), at<double>(out2), batch, n, threads);
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "The C++ core of reflora: raw addresses and sizes in, no checks. Use reflora's functions instead.";
    m.def("run", &run, py::kw_only(), py::arg("table"), py::arg("rows"), py::arg("results"), py::arg("kind"),
          py::arg("scalar"), py::arg("kappa_max"), py::arg("source") = 0, py::arg("keep") = false,
          py::arg("scalar_before") = false, py::arg("scalar_after") = false, py::arg("hypers") = 0,
          py::arg("grad_scale") = 1.0, py::arg("threads"), "One table operation (Kind in csrc/table.h) over all rows.");
    m.def("matrices", &matrices, py::kw_only(), py::arg("function"), py::arg("float32"), py::arg("x"), py::arg("y"),
          py::arg("out"), py::arg("out2"), py::arg("batch"), py::arg("n"), py::arg("threads"),
          "A batch of n x n matrices (Function in csrc/table.h); arithmetic in float64.");
    m.def("instruction_set", &instruction_set, "The instruction set chosen on this processor.");
    m.attr("COLUMNS") = int(COLUMNS);
    m.attr("RESULTS") = int(RESULTS);
    m.attr("HYPERS") = int(HYPERS);
}
