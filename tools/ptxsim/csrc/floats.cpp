#include "floats.h"

#include "integers.h"
#include "table.h"

namespace ptxsim {

namespace {

template <class T>
void add_common(Table& t, const std::string& type, Class cls) {
    for (const std::string rounding : {"", ".rn"}) {
        t.add2<Add, T, T, T>("add" + rounding + type, cls);
        t.add2<Sub, T, T, T>("sub" + rounding + type, cls);
        t.add2<Mul, T, T, T>("mul" + rounding + type, cls);
    }
    t.add3<Fma, T, T, T, T>("fma.rn" + type, cls);
    t.add2<Div, T, T, T>("div.rn" + type, cls);
    t.add1<Sqrt, T, T>("sqrt.rn" + type, cls);
    t.add1<Rcp, T, T>("rcp.rn" + type, cls);
    t.add1<Neg, T, T>("neg" + type, cls);
    t.add1<Abs, T, T>("abs" + type, cls);
    t.add2<Min, T, T, T>("min" + type, cls);
    t.add2<Max, T, T, T>("max" + type, cls);
    t.add2<CopySign, T, T, T>("copysign" + type, cls);
}

template <class F>
void add_approximation(Table& t, const std::string& name) {
    t.add1<F, float, float>(name + ".approx.f32", FP32);
    t.add1<Flush<F>, float, float>(name + ".approx.ftz.f32", FP32);
}

template <class T>
void add_moves(Table& t, std::initializer_list<const char*> types) {
    for (const std::string type : types) {
        t.add3<Select, T, T, T, u8>("selp." + type, INT);
        t.add1<Identity, T, T>("mov." + type, MOV);
    }
}

}  // namespace

void add_floats(Table& t) {
    add_common<float>(t, ".f32", FP32);
    add_common<double>(t, ".f64", FP64);
    t.add2<Div, float, float, float>("div.full.f32", FP32);
    t.add2<Div, float, float, float>("div.approx.f32", FP32);
    t.add1<AbsFlush, float, float>("abs.ftz.f32", FP32);
    t.add2<OrNan<Min>, float, float, float>("min.NaN.f32", FP32);
    t.add2<OrNan<Max>, float, float, float>("max.NaN.f32", FP32);
    add_approximation<Sqrt>(t, "sqrt");
    add_approximation<Rsqrt>(t, "rsqrt");
    add_approximation<Rcp>(t, "rcp");
    add_approximation<Exp2>(t, "ex2");
    add_approximation<Log2>(t, "lg2");
    t.add1<RcpUpper, double, double>("rcp.approx.ftz.f64", FP64);
    for (const std::string type : {"bf16", "f16"}) {
        t.add1<AbsBits<0x8000>, u16, u16>("abs." + type, FP16);
        t.add1<NegBits<0x8000>, u16, u16>("neg." + type, FP16);
        t.add1<AbsBits<0x80008000>, u32, u32>("abs." + type + "x2", FP16);
        t.add1<NegBits<0x80008000>, u32, u32>("neg." + type + "x2", FP16);
    }
    add_moves<u16>(t, {"b16", "u16", "s16"});
    add_moves<u32>(t, {"b32", "u32", "s32", "f32"});
    add_moves<u64>(t, {"b64", "u64", "s64", "f64"});
}

}  // namespace ptxsim
