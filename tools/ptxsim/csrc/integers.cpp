#include "integers.h"

#include "table.h"

namespace ptxsim {

namespace {

template <class T>
void add_arithmetic(Table& t, const std::string& type) {
    t.add2<AddInt, T, T, T>("add." + type, INT);
    t.add2<SubInt, T, T, T>("sub." + type, INT);
    t.add2<MulLow, T, T, T>("mul.lo." + type, INT);
    t.add3<MadLow, T, T, T, T>("mad.lo." + type, INT);
    t.add2<DivInt, T, T, T>("div." + type, INT);
    t.add2<RemInt, T, T, T>("rem." + type, INT);
    t.add2<MinInt, T, T, T>("min." + type, INT);
    t.add2<MaxInt, T, T, T>("max." + type, INT);
    t.add2<ShiftRight, T, T, u32>("shr." + type, INT);
}

template <class T>
void add_signs(Table& t, const std::string& type) {
    t.add1<NegInt, T, T>("neg." + type, INT);
    t.add1<AbsInt, T, T>("abs." + type, INT);
}

template <class T>
void add_bits(Table& t, const std::string& type) {
    t.add2<And, T, T, T>("and." + type, INT);
    t.add2<Or, T, T, T>("or." + type, INT);
    t.add2<Xor, T, T, T>("xor." + type, INT);
    t.add1<Not, T, T>("not." + type, INT);
    t.add2<ShiftLeft, T, T, u32>("shl." + type, INT);
    t.add2<ShiftRight, T, T, u32>("shr." + type, INT);
}

void add_predicates(Table& t) {
    t.add2<And, u8, u8, u8>("and.pred", PREDICATE);
    t.add2<Or, u8, u8, u8>("or.pred", PREDICATE);
    t.add2<Xor, u8, u8, u8>("xor.pred", PREDICATE);
    t.add1<NotPredicate, u8, u8>("not.pred", PREDICATE);
    t.add1<Identity, u8, u8>("mov.pred", PREDICATE);
}

void add_products(Table& t) {
    t.add2<MulHigh<s64>, s32, s32, s32>("mul.hi.s32", INT);
    t.add2<MulHigh<u64>, u32, u32, u32>("mul.hi.u32", INT);
    t.add2<MulHigh<__int128>, s64, s64, s64>("mul.hi.s64", INT);
    t.add2<MulHigh<unsigned __int128>, u64, u64, u64>("mul.hi.u64", INT);
    t.add2<MulWide<s64>, s64, s32, s32>("mul.wide.s32", INT);
    t.add2<MulWide<u64>, u64, u32, u32>("mul.wide.u32", INT);
    t.add2<MulWide<s32>, s32, s16, s16>("mul.wide.s16", INT);
    t.add2<MulWide<u32>, u32, u16, u16>("mul.wide.u16", INT);
    t.add3<MadWide<s64>, s64, s32, s32, s64>("mad.wide.s32", INT);
    t.add3<MadWide<u64>, u64, u32, u32, u64>("mad.wide.u32", INT);
}

void add_fields(Table& t) {
    t.add3<Extract, u32, u32, u32, u32>("bfe.u32", INT);
    t.add3<Extract, s32, s32, u32, u32>("bfe.s32", INT);
    t.add3<Extract, u64, u64, u32, u32>("bfe.u64", INT);
    t.add3<Extract, s64, s64, u32, u32>("bfe.s64", INT);
    t.add1<CountOnes, u32, u32>("popc.b32", INT);
    t.add1<CountOnes, u32, u64>("popc.b64", INT);
    t.add1<LeadingZeros, u32, u32>("clz.b32", INT);
    t.add1<LeadingZeros, u32, u64>("clz.b64", INT);
    t.add1<Reverse, u32, u32>("brev.b32", INT);
    t.add3<Permute, u32, u32, u32, u32>("prmt.b32", INT);
    t.add3<FunnelLeft, u32, u32, u32, u32>("shf.l.wrap.b32", INT);
    t.add3<FunnelRight, u32, u32, u32, u32>("shf.r.wrap.b32", INT);
}

}  // namespace

void add_integers(Table& t) {
    add_arithmetic<s16>(t, "s16");
    add_arithmetic<u16>(t, "u16");
    add_arithmetic<s32>(t, "s32");
    add_arithmetic<u32>(t, "u32");
    add_arithmetic<s64>(t, "s64");
    add_arithmetic<u64>(t, "u64");
    add_signs<s16>(t, "s16");
    add_signs<s32>(t, "s32");
    add_signs<s64>(t, "s64");
    add_bits<u16>(t, "b16");
    add_bits<u32>(t, "b32");
    add_bits<u64>(t, "b64");
    add_predicates(t);
    add_products(t);
    add_fields(t);
    t.add2<MaxRelu, s32, s32, s32>("max.relu.s32", INT);
    t.add2<MinRelu, s32, s32, s32>("min.relu.s32", INT);
}

}  // namespace ptxsim
