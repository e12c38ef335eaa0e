// Rows and matrices over threads, with the kernels of the best instruction set this processor has.
#pragma once
#include <array>
#include <string>

#include "table.h"

namespace reflora {

// how many doubles job.kept takes
int64_t kept_doubles(const int64_t* table, int64_t rows);

void run_rows(const int64_t* table, int64_t rows, double* results, const Job& job, int threads);

// batch of contiguous n x n matrices, see MatrixGroup; what `f` does not use may be null
template <class T>
void run_matrices(Function f, const T* x, const T* y, const std::array<T*, 3>& out, int64_t batch, int64_t n,
                  double root, double shift, double unit, int threads);

// batch of contiguous symmetric n x n matrices of `type`, F32 or F64; V may be null
void run_eigh(DType type, const void* x, void* w, void* V, int64_t batch, int64_t n, int threads);

std::string instruction_set();

}  // namespace reflora
