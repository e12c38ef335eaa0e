// Which instruction set is used, and how rows and matrices are shared among threads.
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
            if (!work) {
#pragma omp atomic write
                out_of_memory = true;
            }
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
    for (int64_t i = 0; i < rows; ++i)
        top = table[i * COLUMNS + R] > top ? table[i * COLUMNS + R] : top;
    std::vector<double*> kept(size_t(rows), nullptr);
    double* next = job.kept;
    for (int64_t i = 0; next && i < rows; ++i) {
        kept[size_t(i)] = next;
        next += k.kept_doubles(table[i * COLUMNS + R]);
    }
    parallel(rows, k.work_bytes(top), threads, [&](int64_t i, void* work) {
        k.row(table + i * COLUMNS, results + i * RESULTS, kept[size_t(i)], job, work);
    });
}

template <class T>
void run_matrices(Function f, const T* x, const T* y, const std::array<T*, 3>& out, int64_t batch, int64_t n,
                  double root, double shift, double unit, int threads) {
    const Kernels& k = *chosen().kernels;
    const int64_t lanes = k.eigh_count(F64);
    const int64_t step = batch < lanes ? batch : lanes;
    const int64_t size = n * n;
    const size_t block = (size_t(step * size) * sizeof(double) + 63) / 64 * 64;
    parallel((batch + step - 1) / step, 5 * block + k.matrices_bytes(step, n), threads, [&](int64_t i, void* work) {
        char* next = static_cast<char*>(work);
        const auto take = [&] {
            next += block;
            return reinterpret_cast<double*>(next - block);
        };
        const int64_t first = i * step;
        const int64_t count = batch - first < step ? batch - first : step;
        const auto widened = [&](const T* from) {
            double* wide = from ? take() : nullptr;
            for (int64_t j = 0; from && j < count * size; ++j)
                wide[j] = double(from[first * size + j]);
            return wide;
        };
        MatrixGroup job{f, widened(x), widened(y), {}, count, n, root, shift, unit};
        for (int o = 0; o < 3; ++o) job.out[o] = out[size_t(o)] ? take() : nullptr;
        k.matrices(job, next);
        for (int o = 0; o < 3; ++o) {
            const int64_t each = f == SVD && o == 1 ? n : size;
            for (int64_t j = 0; job.out[o] && j < count * each; ++j)
                out[size_t(o)][first * each + j] = T(job.out[o][j]);
        }
    });
}

template void run_matrices<float>(Function, const float*, const float*, const std::array<float*, 3>&, int64_t, int64_t,
                                  double, double, double, int);
template void run_matrices<double>(Function, const double*, const double*, const std::array<double*, 3>&, int64_t,
                                   int64_t, double, double, double, int);

void run_eigh(DType type, const void* x, void* w, void* V, int64_t batch, int64_t n, int threads) {
    const Kernels& k = *chosen().kernels;
    const int64_t step = k.eigh_count(type);
    const int64_t bytes = type == F32 ? 4 : 8;
    const char* from = static_cast<const char*>(x);
    char* values = static_cast<char*>(w);
    char* vectors = static_cast<char*>(V);
    parallel((batch + step - 1) / step, k.eigh_bytes(type, n), threads, [&](int64_t i, void* work) {
        const int64_t first = i * step;
        const int64_t count = batch - first < step ? batch - first : step;
        k.eigh(type, from + first * n * n * bytes, values + first * n * bytes,
               vectors ? vectors + first * n * n * bytes : nullptr, count, n, work);
    });
}

}  // namespace reflora
