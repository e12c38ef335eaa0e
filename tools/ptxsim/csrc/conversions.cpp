#include "conversions.h"

#include "table.h"

namespace ptxsim {

namespace {

template <class D, class S>
void add_cast(Table& t, const std::string& to, const std::string& from) {
    t.add1<Cast<D>, D, S>("cvt." + to + "." + from, CVT);
}

template <class S>
void add_from_whole(Table& t, const std::string& from) {
    add_cast<s16, S>(t, "s16", from);
    add_cast<u16, S>(t, "u16", from);
    add_cast<s32, S>(t, "s32", from);
    add_cast<u32, S>(t, "u32", from);
    add_cast<s64, S>(t, "s64", from);
    add_cast<u64, S>(t, "u64", from);
    add_cast<float, S>(t, "rn.f32", from);
    add_cast<double, S>(t, "rn.f64", from);
}

template <class Rounding, class D>
void add_rounded_to_whole(Table& t, const std::string& rounding, const std::string& to) {
    t.add1<ToInt<Rounding, D>, D, float>("cvt." + rounding + "." + to + ".f32", CVT);
    t.add1<ToInt<Rounding, D>, D, double>("cvt." + rounding + "." + to + ".f64", CVT);
}

template <class D>
void add_to_whole(Table& t, const std::string& to) {
    add_rounded_to_whole<Truncate, D>(t, "rzi", to);
    add_rounded_to_whole<Nearest, D>(t, "rni", to);
    add_rounded_to_whole<Floor, D>(t, "rmi", to);
    add_rounded_to_whole<Ceil, D>(t, "rpi", to);
}

template <class T>
void add_roundings(Table& t, const std::string& type) {
    t.add1<Truncate, T, T>("cvt.rzi." + type + "." + type, CVT);
    t.add1<Nearest, T, T>("cvt.rni." + type + "." + type, CVT);
    t.add1<Floor, T, T>("cvt.rmi." + type + "." + type, CVT);
    t.add1<Ceil, T, T>("cvt.rpi." + type + "." + type, CVT);
}

}  // namespace

void add_conversions(Table& t) {
    add_from_whole<s16>(t, "s16");
    add_from_whole<u16>(t, "u16");
    add_from_whole<s32>(t, "s32");
    add_from_whole<u32>(t, "u32");
    add_from_whole<s64>(t, "s64");
    add_from_whole<u64>(t, "u64");
    add_to_whole<s32>(t, "s32");
    add_to_whole<u32>(t, "u32");
    add_to_whole<s64>(t, "s64");
    add_to_whole<u64>(t, "u64");
    add_roundings<float>(t, "f32");
    add_roundings<double>(t, "f64");
    t.add1<FloatToDouble, double, float>("cvt.f64.f32", CVT);
    t.add1<DoubleToFloat, float, double>("cvt.rn.f32.f64", CVT);
    t.add1<HalfToFloat, float, u16>("cvt.f32.f16", CVT);
    t.add1<BfloatToFloat, float, u16>("cvt.f32.bf16", CVT);
    t.add1<HalfToDouble, double, u16>("cvt.f64.f16", CVT);
    t.add1<BfloatToDouble, double, u16>("cvt.f64.bf16", CVT);
    t.add1<ToHalf, u16, float>("cvt.rn.f16.f32", CVT);
    t.add1<ToBfloat, u16, float>("cvt.rn.bf16.f32", CVT);
    t.add1<ToHalf, u16, double>("cvt.rn.f16.f64", CVT);
    t.add1<ToBfloat, u16, double>("cvt.rn.bf16.f64", CVT);
    t.add2<ToPair<ToHalf>, u32, float, float>("cvt.rn.f16x2.f32", CVT);
    t.add2<ToPair<ToBfloat>, u32, float, float>("cvt.rn.bf16x2.f32", CVT);
}

}  // namespace ptxsim
