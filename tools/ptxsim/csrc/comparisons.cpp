// setp: predicates from comparisons.
#include "floats.h"
#include "table.h"

namespace ptxsim {

namespace {

struct Equal {
    template <class T>
    static u8 f(T a, T b) { return a == b; }
};
struct NotEqual {
    template <class T>
    static u8 f(T a, T b) { return a != b; }
};
struct Less {
    template <class T>
    static u8 f(T a, T b) { return a < b; }
};
struct LessEqual {
    template <class T>
    static u8 f(T a, T b) { return a <= b; }
};
struct Greater {
    template <class T>
    static u8 f(T a, T b) { return a > b; }
};
struct GreaterEqual {
    template <class T>
    static u8 f(T a, T b) { return a >= b; }
};
struct Numbers {
    template <class T>
    static u8 f(T a, T b) { return a == a && b == b; }
};
// true where F is or where either is NaN: the negation of the opposite
template <class F>
struct Negated {
    template <class T>
    static u8 f(T a, T b) { return !F::f(a, b); }
};
struct LessOrGreater {
    template <class T>
    static u8 f(T a, T b) { return a < b || a > b; }
};

template <class F, float (*decode)(u16)>
struct Decoded {
    static u8 f(u16 a, u16 b) { return F::f(decode(a), decode(b)); }
};

template <class T>
struct Plain {
    using Element = T;
    template <class F>
    using Compare = F;
};
template <float (*decode)(u16)>
struct Half {
    using Element = u16;
    template <class F>
    using Compare = Decoded<F, decode>;
};

template <class K, class F>
void add_one(Table& t, const std::string& name, Class cls) {
    using T = typename K::Element;
    t.add2<typename K::template Compare<F>, u8, T, T>("setp." + name, cls);
}

template <class K>
void add_ordered(Table& t, const std::string& type, Class cls) {
    add_one<K, Equal>(t, "eq." + type, cls);
    add_one<K, Less>(t, "lt." + type, cls);
    add_one<K, LessEqual>(t, "le." + type, cls);
    add_one<K, Greater>(t, "gt." + type, cls);
    add_one<K, GreaterEqual>(t, "ge." + type, cls);
}

template <class T>
void add_whole(Table& t, const std::string& type) {
    add_ordered<Plain<T>>(t, type, PREDICATE);
    add_one<Plain<T>, NotEqual>(t, "ne." + type, PREDICATE);
}

template <class K>
void add_float(Table& t, const std::string& type, Class cls) {
    add_ordered<K>(t, type, cls);
    add_one<K, LessOrGreater>(t, "ne." + type, cls);
    add_one<K, Negated<LessOrGreater>>(t, "equ." + type, cls);
    add_one<K, NotEqual>(t, "neu." + type, cls);
    add_one<K, Negated<GreaterEqual>>(t, "ltu." + type, cls);
    add_one<K, Negated<Greater>>(t, "leu." + type, cls);
    add_one<K, Negated<LessEqual>>(t, "gtu." + type, cls);
    add_one<K, Negated<Less>>(t, "geu." + type, cls);
    add_one<K, Numbers>(t, "num." + type, cls);
    add_one<K, Negated<Numbers>>(t, "nan." + type, cls);
}

template <class T>
void add_bits(Table& t, const std::string& type) {
    add_one<Plain<T>, Equal>(t, "eq." + type, PREDICATE);
    add_one<Plain<T>, NotEqual>(t, "ne." + type, PREDICATE);
}

// setp.num.bf16x2 p|q
void both_numbers(Warp& w, const Instruction& I, u32 mask) {
    const u32 *a = w.lanes<u32>(I.a), *b = w.lanes<u32>(I.b);
    u8 *low = w.lanes<u8>(I.d), *high = w.lanes<u8>(I.outs[0]);
    each_lane(mask, [&](u32 i) {
        low[i] = Numbers::f(from_bfloat(u16(a[i])), from_bfloat(u16(b[i])));
        high[i] = Numbers::f(from_bfloat(u16(a[i] >> 16)), from_bfloat(u16(b[i] >> 16)));
    });
}

}  // namespace

void add_comparisons(Table& t) {
    add_whole<s16>(t, "s16");
    add_whole<u16>(t, "u16");
    add_whole<s32>(t, "s32");
    add_whole<u32>(t, "u32");
    add_whole<s64>(t, "s64");
    add_whole<u64>(t, "u64");
    add_bits<u16>(t, "b16");
    add_bits<u32>(t, "b32");
    add_bits<u64>(t, "b64");
    add_float<Plain<float>>(t, "f32", FP32);
    add_float<Plain<double>>(t, "f64", FP64);
    add_float<Half<from_half>>(t, "f16", FP16);
    add_float<Half<from_bfloat>>(t, "bf16", FP16);
    t.add("setp.num.bf16x2", {both_numbers, FP16, 1, 4, 4, 0, true});
}

}  // namespace ptxsim
