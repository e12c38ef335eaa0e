// Loops over the lanes of a warp: a plain one that the compiler makes vectors of, one for some lanes.
#pragma once
#include "warp.h"

namespace ptxsim {

template <class F, class D, class A>
void unary(Warp& w, const Instruction& I, u32 mask) {
    D* d = w.lanes<D>(I.d);
    const A* a = w.lanes<A>(I.a);
    if (mask == ALL_LANES) {
#pragma GCC ivdep
        for (u32 i = 0; i < LANES; i++) d[i] = F::f(a[i]);
    } else {
        each_lane(mask, [&](u32 i) { d[i] = F::f(a[i]); });
    }
}

template <class F, class D, class A, class B>
void binary(Warp& w, const Instruction& I, u32 mask) {
    D* d = w.lanes<D>(I.d);
    const A* a = w.lanes<A>(I.a);
    const B* b = w.lanes<B>(I.b);
    if (mask == ALL_LANES) {
#pragma GCC ivdep
        for (u32 i = 0; i < LANES; i++) d[i] = F::f(a[i], b[i]);
    } else {
        each_lane(mask, [&](u32 i) { d[i] = F::f(a[i], b[i]); });
    }
}

template <class F, class D, class A, class B, class C>
void ternary(Warp& w, const Instruction& I, u32 mask) {
    D* d = w.lanes<D>(I.d);
    const A* a = w.lanes<A>(I.a);
    const B* b = w.lanes<B>(I.b);
    const C* c = w.lanes<C>(I.c);
    if (mask == ALL_LANES) {
#pragma GCC ivdep
        for (u32 i = 0; i < LANES; i++) d[i] = F::f(a[i], b[i], c[i]);
    } else {
        each_lane(mask, [&](u32 i) { d[i] = F::f(a[i], b[i], c[i]); });
    }
}

}  // namespace ptxsim
