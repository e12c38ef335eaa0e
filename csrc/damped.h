// RiemannianAdamW's damped inverse Grams (reference.damped_inverses).
#pragma once
#include "solve.h"

namespace reflora {
namespace REFLORA_ISA {

// out := (G + reg I)^-1 of the Gram G that is g.norm squared times g.unit; size: the larger of reg and its trace.
// False: past kappa_max
INLINE bool damped_inverse(const Dense& d, double reg, double size, double kappa_max, Gram& g, double* out) {
    const double share = g.norm * g.norm / size;
    for (int64_t i = 0; i < d.r * d.rp; ++i) g.U[i] = share > 0 ? share * g.unit[i] : 0;
    for (int64_t i = 0; i < d.r; ++i) g.U[i * d.rp + i] += reg / size;
    if (!d.cholesky(g.U, g.E)) return false;
    g.kappa = d.norm(g.U) * d.norm(g.E);
    if (!(g.kappa <= kappa_max)) return false;
    d.symmetric_tn(g.E, g.E, out);
    for (int64_t i = 0; i < d.r * d.rp; ++i) out[i] /= size;
    return true;
}

// in place of S and S^-1. A row is degenerate where either is past kappa_max or the range of the type that it is
// applied in; both are multiples of I then
INLINE void damped_inverses(const Dense& d, double reg, double kappa_max, double tiny, double huge, Gram& a, Gram& b,
                            Solution& out) {
    out.c = b.norm / a.norm;
    if (!useful(out.c, tiny, huge)) out.c = 1;
    const double size_a = a.norm * a.norm > reg ? a.norm * a.norm : reg;
    const double size_b = b.norm * b.norm > reg ? b.norm * b.norm : reg;
    const bool fits_a = useful(size_a, tiny, huge);
    const bool fits_b = useful(size_b, tiny, huge);
    const bool of_a = fits_a && damped_inverse(d, reg, size_a, kappa_max, a, out.S);
    const bool of_b = fits_b && damped_inverse(d, reg, size_b, kappa_max, b, out.S_inv);
    out.status = of_a && of_b ? REFACTORED : DEGENERATE;
    if (out.status == REFACTORED) return;
    form_scaled_identity(d, out.S, fits_a ? 1 / size_a : 1);
    form_scaled_identity(d, out.S_inv, fits_b ? 1 / size_b : 1);
}

}  // namespace REFLORA_ISA
}  // namespace reflora
