// RiemannianAdamW's damped inverse Grams (reference.damped_inverses).
#pragma once
#include "solve.h"

namespace reflora {
namespace REFLORA_ISA {

// out := (G + reg I)^-1 of a Gram G, over whose trace its own is; false: past kappa_max or the type that it is applied
// in, and out is I over the larger of reg and the trace
INLINE bool damped_inverse(const Dense& d, double reg, double kappa_max, double tiny, double huge, Gram& g, double* out) {
    const double square = g.norm * g.norm;
    const double size = square > reg ? square : reg;
    const bool fits = useful(size, tiny, huge);
    if (fits) {
        for (int64_t i = 0; i < d.r * d.rp; ++i) g.U[i] = square > 0 ? square / size * g.unit[i] : 0;
        for (int64_t i = 0; i < d.r; ++i) g.U[i * d.rp + i] += reg / size;
        if (d.cholesky(g.U, g.E)) {
            g.kappa = d.norm(g.U) * d.norm(g.E);
            if (g.kappa <= kappa_max) {
                d.symmetric_tn(g.E, g.E, out);
                for (int64_t i = 0; i < d.r * d.rp; ++i) out[i] /= size;
                return true;
            }
        }
    }
    form_scaled_identity(d, out, fits ? 1 / size : 1);
    return false;
}

// both in place of S and S^-1. A row is degenerate where either is, and then both are multiples of I
INLINE void damped_inverses(const Dense& d, double reg, double kappa_max, double tiny, double huge, Gram& a, Gram& b,
                            Solution& out) {
    out.c = b.norm / a.norm;
    if (!useful(out.c, tiny, huge)) out.c = 1;
    const bool of_a = damped_inverse(d, reg, kappa_max, tiny, huge, a, out.S);
    const bool of_b = damped_inverse(d, reg, kappa_max, tiny, huge, b, out.S_inv);
    out.status = of_a && of_b ? REFACTORED : DEGENERATE;
    if (of_a && !of_b) damped_inverse(d, reg, 0, tiny, huge, a, out.S);
    if (of_b && !of_a) damped_inverse(d, reg, 0, tiny, huge, b, out.S_inv);
}

}  // namespace REFLORA_ISA
}  // namespace reflora
