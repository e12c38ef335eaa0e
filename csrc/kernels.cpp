// One table row (or one small matrix), for one instruction set: compiled once each with REFLORA_ISA naming it.
#include "invariant.h"
#include "matrices.h"
#include "row.h"

namespace reflora {
namespace REFLORA_ISA {

template <class S, class T>
static void run_row(const int64_t* row, double* result, double* kept, const Job& job, void* work) {
    Arena arena{static_cast<char*>(work)};
    for (int i = 0; i < RESULTS; ++i) result[i] = __builtin_nan("");
    result[STATUS] = PLAIN;
    if (kept && !row[KEPT]) *kept = 0;
    if (!row[ACTIVE] || job.found_inf) return;
    if (job.kind != INVARIANT) return RowOp<S, T>{row, result, kept, job, arena}.run();
    if (!InvariantOp<S, T>{row, result, kept, job, arena}.run()) result[STATUS] = SKIPPED;
}

static void row(const int64_t* row, double* result, double* kept, const Job& job, void* work) {
    switch (row[DTYPE]) {
        case F32: return run_row<float, float>(row, result, kept, job, work);
        case F64: return run_row<double, double>(row, result, kept, job, work);
        case BF16: return run_row<bf16, float>(row, result, kept, job, work);
        case F16: return run_row<f16, float>(row, result, kept, job, work);
    }
}

static size_t work_bytes(int64_t r) { return bytes_for(r); }

static int64_t kept_doubles(int64_t r) { return KEPT_HEADER + 2 * padded<double>(r) * padded<double>(r); }

static void eigh(DType type, const void* x, void* w, void* V, int64_t count, int64_t n, void* work) {
    const auto as = [&]<class T>(T* values) {
        eigh_group(static_cast<const T*>(x), values, static_cast<T*>(V), count, n, work);
    };
    if (type == F32) {
        as(static_cast<float*>(w));
    } else {
        as(static_cast<double*>(w));
    }
}

static int64_t eigh_count(DType type) { return type == F32 ? VecOf<float>::W : VecOf<double>::W; }

static size_t eigh_bytes(DType type, int64_t n) {
    return type == F32 ? eigh_group_bytes<float>(n) : eigh_group_bytes<double>(n);
}

extern const Kernels kernels;
const Kernels kernels = {row, work_bytes, kept_doubles, matrices, matrices_bytes, eigh, eigh_count, eigh_bytes};

}  // namespace REFLORA_ISA
}  // namespace reflora
