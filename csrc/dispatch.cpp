#include "dispatch.h"

#include <cstdlib>
#include <new>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

namespace reflora {

namespace base { extern const Kernels kernels; }
#ifdef REFLORA_X86
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

namespace {

struct Choice {
    const Kernels* kernels;
    const char* name;
};

Choice choose() {
#ifdef REFLORA_X86
    const char* wish = std::getenv("REFLORA_ISA");
    const std::string at_most = wish ? wish : "avx512";
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4 && at_most == "avx512") return {&avx512::kernels, "avx512"};
    if (v3 && at_most != "base") return {&avx2::kernels, "avx2"};
#endif
    return {&base::kernels, "base"};
}

const Choice& chosen() {
    static const Choice choice = choose();
    return choice;
}

// one 64-byte aligned buffer a thread, kept from call to call
struct Buffer {
    void* p = nullptr;
    size_t size = 0;
    void* get(size_t bytes) {
        if (bytes > size) {
            std::free(p);
            p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
            size = p ? bytes : 0;
        }
        return p;
    }
    ~Buffer() { std::free(p); }
};
thread_local Buffer buffer;

#ifdef _OPENMP
// a child forked after the first parallel region has lost the pool's threads and would wait for them for ever
bool forked = false;
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// body(i, work) for i < count, over `threads` threads
template <class Body>
void parallel(int64_t count, size_t bytes, int threads, const Body& body) {
    bool out_of_memory = false;
    if (threads > count) threads = int(count);
#ifdef _OPENMP
    if (threads > 1 && !forked) {
#pragma omp parallel num_threads(threads)
        {
            void* work = buffer.get(bytes);
            if (!work) out_of_memory = true;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < count; ++i)
                if (work) body(i, work);
        }
        if (out_of_memory) throw std::bad_alloc();
        return;
    }
#endif
    void* work = buffer.get(bytes);
    if (!work) throw std::bad_alloc();
    for (int64_t i = 0; i < count; ++i) body(i, work);
}

}  // namespace

std::string instruction_set() { return chosen().name; }

int64_t kept_doubles(const int64_t* table, int64_t rows) {
    int64_t total = 0;
    for (int64_t i = 0; i < rows; ++i) total += chosen().kernels->kept_doubles(table[i * COLUMNS + R]);
    return total;
}

void run_rows(const int64_t* table, int64_t rows, double* results, const Job& job, int threads) {
    const Kernels& k = *chosen().kernels;
    int64_t top = 1;
    for (int64_t i = 0; i < rows; ++i) top = table[i * COLUMNS + R] > top ? table[i * COLUMNS + R] : top;
    std::vector<double*> kept(size_t(rows), nullptr);
    double* next = job.kept;
    for (int64_t i = 0; next && i < rows; ++i) kept[size_t(i)] = next, next += k.kept_doubles(table[i * COLUMNS + R]);
    parallel(rows, k.work_bytes(top), threads, [&](int64_t i, void* work) {
        k.row(table + i * COLUMNS, results + i * RESULTS, kept[size_t(i)], job, work);
    });
}

template <class T>
void run_matrices(Function f, const T* x, const T* y, T* out, T* out2, int64_t batch, int64_t n, int threads) {
    const Kernels& k = *chosen().kernels;
    const int64_t size = n * n;
    const size_t own = (size_t(4 * size) * sizeof(double) + 63) / 64 * 64;
    parallel(batch, own + k.work_bytes(n), threads, [&](int64_t i, void* work) {
        double *xd = static_cast<double*>(work), *yd = xd + size, *o = yd + size, *o2 = o + size;
        for (int64_t j = 0; j < size; ++j) xd[j] = double(x[i * size + j]);
        for (int64_t j = 0; y && j < size; ++j) yd[j] = double(y[i * size + j]);
        k.matrix(f, xd, yd, o, o2, n, static_cast<char*>(work) + own);
        for (int64_t j = 0; j < size; ++j) out[i * size + j] = T(o[j]);
        for (int64_t j = 0; out2 && j < size; ++j) out2[i * size + j] = T(o2[j]);
    });
}

template void run_matrices<float>(Function, const float*, const float*, float*, float*, int64_t, int64_t, int);
template void run_matrices<double>(Function, const double*, const double*, double*, double*, int64_t, int64_t, int);

}  // namespace reflora
