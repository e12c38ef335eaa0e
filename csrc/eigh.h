// Batches of symmetric eigenproblems: scaling, a lane of a vector or a whole vector for a matrix, order and signs.
#pragma once
#include "arena.h"
#include "eigen.h"

namespace reflora {
namespace REFLORA_ISA {

template <class T>
struct Bits;
template <>
struct Bits<float> {
    using U = uint32_t;
    static constexpr int mantissa = 23, bias = 127;
};
template <>
struct Bits<double> {
    using U = uint64_t;
    static constexpr int mantissa = 52, bias = 1023;
};

template <class T>
INLINE T two_to(int64_t e) {
    const auto bits = typename Bits<T>::U(e + Bits<T>::bias) << Bits<T>::mantissa;
    T x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

// x 2^e, in two steps: 2^e alone may be past the range of T
template <class T>
INLINE T raised(T x, int64_t e) { return x * two_to<T>(e / 2) * two_to<T>(e - e / 2); }

// of a matrix over an even power of two near its largest element
template <class T>
struct Scale {
    bool finite;
    int64_t e;

    Scale(const T* x, int64_t count) {
        constexpr int mantissa = Bits<T>::mantissa;
        constexpr int bias = Bits<T>::bias;
        typename Bits<T>::U top = 0;
        for (int64_t i = 0; i < count; ++i) {
            typename Bits<T>::U bits;
            __builtin_memcpy(&bits, x + i, sizeof bits);
            bits &= ~typename Bits<T>::U(0) >> 1;
            top = bits > top ? bits : top;
        }
        finite = top >> mantissa < 2 * bias + 1;
        e = int64_t(top >> mantissa) - bias;
        if (e == -bias && top) e += 1 - (__builtin_clzll(top) - (63 - mantissa));  // subnormal: from its leading bit
        e = top && finite ? e & ~int64_t(1) : 0;
    }
    T down(T x) const { return finite ? raised(x, -e) : T(0); }
    T up(T x) const { return finite ? raised(x, e) : T(__builtin_nan("")); }
};

// order[k]: index of the k-th smallest of x[i * step]; equal ones stay in order
template <class T>
static void ascending(const T* x, int64_t step, int64_t n, int64_t* order) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t k = i;
        for (; k > 0 && x[order[k - 1] * step] > x[i * step]; --k) order[k] = order[k - 1];
        order[k] = i;
    }
}

// one kind of element: its solver and what goes around it, in scratch memory
template <class T, bool LANES>
struct Solver {
    using S = Eigen<T, LANES>;
    using E = typename S::E;
    using B = typename S::B;
    static constexpr int W = VecOf<T>::W;
    static constexpr int L = S::lanes ? W : 1;
    S s;
    int64_t n, ld, panels, pitch;
    E* next;
    int64_t *order, *rows;  // rows [L, n]: which row of x is a row of A
    // panels [pitch]: rows of Q where lanes are matrices, else W components of each of its columns
    B* Z;

    Solver(Arena& arena, int64_t n, bool vectors) : n(n), ld(S::stride(n)), panels(S::blocks(n)), pitch(S::apart(n)) {
        const auto take = [&](int64_t count) { return arena.take<E>(size_t(count)); };
        s.n = n;
        s.A = take(n * ld);
        s.d = take(n);
        s.e = take(n);
        s.tau = take(n);
        s.v = take(ld);
        s.w = take(ld);
        s.p = take(ld);
        next = take(ld);
        s.rotations = take(2 * S::capacity(n));
        s.Q = vectors ? arena.take<B>(size_t(n * ld / S::STEP)) : nullptr;
        Z = S::lanes || !vectors ? s.Q : arena.take<B>(size_t(panels * pitch));
        order = arena.take<int64_t>(size_t(n));
        rows = arena.take<int64_t>(size_t(L * n));
    }

    T& component(int64_t i, int64_t j, int64_t lane) const {
        T* z = reinterpret_cast<T*>(Z);
        return S::lanes ? z[(i * pitch + j) * W + lane] : z[(i / W * pitch + j) * W + i % W];
    }

    void clear() const {
        for (int64_t i = 0; i < n * ld; ++i) s.A[i] = E{};
    }

    // the symmetric part of x [n, n], zero where x is not finite; the largest rows last, where a graded matrix loses
    // least
    void read(const T* x, int64_t lane) const {
        T* a = reinterpret_cast<T*>(s.A);
        T* sizes = reinterpret_cast<T*>(next);
        const Scale<T> scale(x, n * n);
        int64_t* from = rows + lane * n;
        for (int64_t i = 0; i < n; ++i) {
            T size = 0;
            for (int64_t j = 0; j < n; ++j)
                size += magnitude(scale.down(x[i * n + j])) + magnitude(scale.down(x[j * n + i]));
            sizes[i] = size;
        }
        ascending(sizes, 1, n, from);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j <= i; ++j) {
                const int64_t k = from[i] * n + from[j];
                const int64_t mirrored = from[j] * n + from[i];
                const T mean = (scale.down(x[k]) + scale.down(x[mirrored])) / 2;
                a[(i * ld + j) * L + lane] = a[(j * ld + i) * L + lane] = mean;
            }
    }

    void solve() const {
        s.tridiagonalize(next);
        if (!s.Q) return s.ql(nullptr, 0);
        s.form_q(s.v, s.w);
        const T* q = reinterpret_cast<const T*>(s.Q);
        for (int64_t i = 0; !S::lanes && i < panels * W; ++i)
            for (int64_t j = 0; j < n; ++j)
                component(i, j, 0) = i < n ? q[i * ld + j] : 0;
        s.ql(Z, panels);
    }

    // w [n] ascending; V [n, n], the first largest component of each column positive
    void write(const T* x, T* w, T* V, int64_t lane) const {
        const T* d = reinterpret_cast<const T*>(s.d) + lane;
        const Scale<T> scale(x, n * n);
        ascending(d, L, n, order);
        for (int64_t j = 0; j < n; ++j) w[j] = scale.up(d[order[j] * L]);
        for (int64_t j = 0; V && j < n; ++j) {
            const int64_t* to = rows + lane * n;
            for (int64_t i = 0; i < n; ++i) V[to[i] * n + j] = component(i, order[j], lane);
            T top = 0;
            T sign = 1;
            for (int64_t i = 0; i < n; ++i) {
                const T z = V[i * n + j];
                if (magnitude(z) > top) {
                    top = magnitude(z);
                    sign = z < 0 ? T(-1) : T(1);
                }
            }
            if (!scale.finite) sign = T(__builtin_nan(""));
            for (int64_t i = 0; i < n; ++i) V[i * n + j] = sign * V[i * n + j] + T(0);  // no -0
        }
    }
};

// `count` matrices x [count, n, n], at most as many as a vector has lanes; w [count, n]; V [count, n, n] or null. They
// share a vector, unless there are so few that each is better off alone: the bits are the same
template <class T>
static void eigh_group(const T* x, T* w, T* V, int64_t count, int64_t n, void* work) {
    Arena arena{static_cast<char*>(work)};
    const auto at = [&](T* out, int64_t k, int64_t size) { return out ? out + k * size : out; };
    if ((count - 1) * (160 / VecOf<T>::W) >= n) {
        const Solver<T, true> together(arena, n, V != nullptr);
        together.clear();
        for (int64_t k = 0; k < count; ++k) together.read(x + k * n * n, k);
        together.solve();
        for (int64_t k = 0; k < count; ++k) together.write(x + k * n * n, w + k * n, at(V, k, n * n), k);
        return;
    }
    const Solver<T, false> alone(arena, n, V != nullptr);
    for (int64_t k = 0; k < count; ++k) {
        alone.clear();
        alone.read(x + k * n * n, 0);
        alone.solve();
        alone.write(x + k * n * n, w + k * n, at(V, k, n * n), 0);
    }
}

template <class T>
static size_t eigh_group_bytes(int64_t n) {
    Arena alone{reinterpret_cast<char*>(64)};
    Arena together = alone;
    Solver<T, false>(alone, n, true);
    if ((VecOf<T>::W - 1) * (160 / VecOf<T>::W) >= n) Solver<T, true>(together, n, true);
    const auto end = [](const Arena& arena) { return size_t(reinterpret_cast<uintptr_t>(arena.next)); };
    return end(alone) > end(together) ? end(alone) : end(together);
}

}  // namespace REFLORA_ISA
}  // namespace reflora
