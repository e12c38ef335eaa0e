// Rows and matrices over threads, with the kernels of the best instruction set this processor has.
#pragma once
#include <string>

#include "table.h"

namespace reflora {

// how many doubles job.kept takes
int64_t kept_doubles(const int64_t* table, int64_t rows);

void run_rows(const int64_t* table, int64_t rows, double* results, const Job& job, int threads);

// batch of contiguous n x n matrices; y and out2 may be null where `f` does not use them
template <class T>
void run_matrices(Function f, const T* x, const T* y, T* out, T* out2, int64_t batch, int64_t n, int threads);

std::string instruction_set();

}  // namespace reflora
