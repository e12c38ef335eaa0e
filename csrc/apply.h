// r x r matrices applied to [r, n] factors in blocks of CHUNK columns, in the type T the application runs in.
#pragma once
#include "solve.h"

namespace reflora {
namespace REFLORA_ISA {

// out[i, :count] = sum_j M[i, j] g[j, :count]; rows of g are ld apart, rows of out CHUNK; whole vectors are computed
template <class T, int MR, int NV>
INLINE void apply_left_block(const T* RESTRICT m, int64_t ldm, const T* RESTRICT g, int64_t ld, int64_t r,
                             T* RESTRICT out) {
    using V = typename VecOf<T>::type;
    constexpr int W = VecOf<T>::W;
    V acc[MR][NV] = {};
    for (int64_t j = 0; j < r; ++j) {
        V b[NV];
        for (int v = 0; v < NV; ++v) b[v] = load<V>(g + j * ld + v * W);
        for (int i = 0; i < MR; ++i)
            for (int v = 0; v < NV; ++v) acc[i][v] += m[i * ldm + j] * b[v];
    }
    for (int i = 0; i < MR; ++i)
        for (int v = 0; v < NV; ++v) store<V>(out + i * CHUNK + v * W, acc[i][v]);
}

template <class T, int MR>
INLINE void apply_left_rows(const T* m, int64_t ldm, const T* g, int64_t ld, int64_t r, T* out) {
    constexpr int W = VecOf<T>::W;
    constexpr int STEP = REGISTERS == 32 && 4 * W <= CHUNK ? 4 : 2;
    for (int64_t k = 0; k < CHUNK; k += STEP * W) apply_left_block<T, MR, STEP>(m, ldm, g + k, ld, r, out + k);
}

template <class T>
static void apply_left(const T* m, int64_t ldm, const T* g, int64_t ld, int64_t r, T* out) {
    int64_t i = 0;
    for (; i + 4 <= r; i += 4) apply_left_rows<T, 4>(m + i * ldm, ldm, g, ld, r, out + i * CHUNK);
    for (; i < r; ++i) apply_left_rows<T, 1>(m + i * ldm, ldm, g, ld, r, out + i * CHUNK);
}

// a row of so many numbers, 32 bytes, does for small ranks
template <class T>
constexpr int HALF = 32 / int(sizeof(T));

// out[k, :] = sum_j g[k, j] M[j, :], k < count; rows of g are ld apart, rows of out and M ldo
template <class T, int NV, int BYTES = REGISTER>
INLINE void apply_right_block(const T* RESTRICT m, int64_t ldm, const T* RESTRICT g, int64_t ld, int64_t r,
                              int64_t count, T* RESTRICT out, int64_t ldo) {
    using V = typename VecOf<T, BYTES>::type;
    constexpr int W = VecOf<T, BYTES>::W;
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        V acc[4][NV] = {};
        for (int64_t j = 0; j < r; ++j) {
            V b[NV];
            for (int v = 0; v < NV; ++v) b[v] = load<V>(m + j * ldm + v * W);
            for (int i = 0; i < 4; ++i)
                for (int v = 0; v < NV; ++v) acc[i][v] += g[(k + i) * ld + j] * b[v];
        }
        for (int i = 0; i < 4; ++i)
            for (int v = 0; v < NV; ++v) store<V>(out + (k + i) * ldo + v * W, acc[i][v]);
    }
    for (; k < count; ++k) {
        V acc[NV] = {};
        for (int64_t j = 0; j < r; ++j)
            for (int v = 0; v < NV; ++v) acc[v] += g[k * ld + j] * load<V>(m + j * ldm + v * W);
        for (int v = 0; v < NV; ++v) store<V>(out + k * ldo + v * W, acc[v]);
    }
}

template <class T>
static void apply_right(const T* m, int64_t ldm, const T* g, int64_t ld, int64_t r, int64_t count, T* out,
                        int64_t ldo) {
    constexpr int W = VecOf<T>::W;
    constexpr int NARROW = REGISTER < 32 ? REGISTER : 32;
    constexpr int NV = REGISTERS == 32 ? 4 : 2;
    if (ldo == HALF<T>) return apply_right_block<T, 32 / NARROW, NARROW>(m, ldm, g, ld, r, count, out, ldo);
    int64_t j = 0;
    for (; j + NV * W <= ldo; j += NV * W) apply_right_block<T, NV>(m + j, ldm, g, ld, r, count, out + j, ldo);
    for (; j + 2 * W <= ldo; j += 2 * W) apply_right_block<T, 2>(m + j, ldm, g, ld, r, count, out + j, ldo);
    for (; j < ldo; j += W) apply_right_block<T, 1>(m + j, ldm, g, ld, r, count, out + j, ldo);
}

// columns [k0, k0 + count) of a factor, read for application; where storage can be read as it is, nothing is copied.
// Rows of the panel are rows of the factor on the left (A's side), and columns of it on the right (B's)
template <class T, class S>
struct Reader {
    const Factor<S>& f;
    T* buffer;
    bool right;
    int64_t ld;

    MEMBER const T* in_place(const S* p, int64_t apart) {
        ld = apart;
        return reinterpret_cast<const T*>(p);
    }

    const T* read(int64_t k0, int64_t count) {
        if constexpr (sizeof(S) == sizeof(T)) {
            if (right && f.sr == 1) return in_place(f.p + k0 * f.sn, f.sn);
            if (!right && f.sn == 1 && count == CHUNK) return in_place(f.p + k0, f.sr);
        }
        ld = right ? f.r : CHUNK;
        for (int64_t i = 0; i < f.r; ++i)
            for (int64_t k = 0; k < count; ++k)
                buffer[right ? k * ld + i : i * ld + k] = T(widen(f.p[i * f.sr + (k0 + k) * f.sn]));
        if (!right)
            for (int64_t i = 0; i < f.r; ++i)
                for (int64_t k = count; k < CHUNK; ++k) buffer[i * ld + k] = 0;
        return buffer;
    }
};

// calls use(values, ld_i, ld_k, k0, count) with values[i * ld_i + k * ld_k] = (M X)[i, k0 + k] for every block of a
// side. m: M row-major [r, ldm], mt its transpose; both null for M = I
template <class T, class S, class Use>
INLINE void for_blocks(const Factor<S>& f, const T* m, const T* mt, int64_t ldm, T* in, T* out, Use use) {
    Reader<T, S> reader{f, in, f.transposed(), 0};
    const int64_t ldo = f.r <= HALF<T> ? HALF<T> : ldm;
    for (int64_t k0 = 0; k0 < f.n; k0 += CHUNK) {
        const int64_t count = least(CHUNK, f.n - k0);
        const T* x = reader.read(k0, count);
        if (!m) {
            use(x, reader.right ? 1 : reader.ld, reader.right ? reader.ld : 1, k0, count);
        } else if (reader.right) {
            apply_right(mt, ldm, x, reader.ld, f.r, count, out, ldo);
            use(out, 1, ldo, k0, count);
        } else {
            apply_left(m, ldm, x, reader.ld, f.r, out);
            use(out, CHUNK, 1, k0, count);
        }
    }
}

template <class T, class S>
static void apply_in_place(const Factor<S>& f, const T* m, const T* mt, int64_t ldm, T* in, T* out) {
    for_blocks<T, S>(f, m, mt, ldm, in, out, [&](const T* values, int64_t li, int64_t lk, int64_t k0, int64_t count) {
        for (int64_t o = 0; o < (f.transposed() ? count : f.r); ++o) {
            const int64_t inner = f.transposed() ? f.r : count;
            const int64_t lo = f.transposed() ? lk : li;
            const int64_t lin = f.transposed() ? li : lk;
            const int64_t so = f.transposed() ? f.sn : f.sr;
            const int64_t si = f.transposed() ? f.sr : f.sn;
            S* p = f.p + k0 * f.sn + o * so;
            for (int64_t i = 0; i < inner; ++i)
                narrow_saturated(values[o * lo + i * lin], p + i * si);
        }
    });
}

// each(offset) for every element; runs of stride 1 are loops of their own, so that they come out in vectors
template <class S, class Each>
INLINE void for_elements(const Factor<S>& f, Each each) {
    if (f.dense()) {
        for (int64_t i = 0; i < f.r * f.n; ++i) each(i);
        return;
    }
    const bool along_r = f.transposed();
    const int64_t outer = along_r ? f.n : f.r;
    const int64_t inner = along_r ? f.r : f.n;
    const int64_t so = along_r ? f.sn : f.sr;
    const int64_t si = along_r ? f.sr : f.sn;
    for (int64_t o = 0; o < outer; ++o) {
        if (si == 1) {
            for (int64_t i = 0; i < inner; ++i) each(o * so + i);
        } else {
            for (int64_t i = 0; i < inner; ++i) each(o * so + i * si);
        }
    }
}

template <class S>
static void scale_in_place(const Factor<S>& f, double factor) {
    const auto by = decltype(widen(S{}))(factor);
    for_elements(f, [&](int64_t o) { narrow_saturated(widen(f.p[o]) * by, f.p + o); });
}

// the same for the master weights w of f, to which f is rounded
template <class S>
static void scale_master(const Factor<S>& f, float* w, double factor) {
    const float by = float(factor);
    for_elements(f, [&](int64_t o) {
        w[o] = bounded(w[o] * by, float(Storage<S>::max));
        narrow(w[o], f.p + o);
    });
}

}  // namespace REFLORA_ISA
}  // namespace reflora
