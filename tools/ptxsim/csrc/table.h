// The table of instructions that work on each lane by itself, by their full name.
#pragma once
#include <initializer_list>
#include <string>
#include <unordered_map>

#include "vector.h"

namespace ptxsim {

struct Operation {
    Function run;
    Class cls;
    u8 d, a, b, c;  // bytes of the operands: 1 a predicate, 0 none
    bool two_destinations = false;
};

class Table {
public:
    // the operation of a name, or null
    const Operation* find(const std::string& name) const;

    template <class F, class D, class A>
    void add1(const std::string& name, Class cls) {
        operations[name] = {unary<F, D, A>, cls, sizeof(D), sizeof(A), 0, 0};
    }
    template <class F, class D, class A, class B>
    void add2(const std::string& name, Class cls) {
        operations[name] = {binary<F, D, A, B>, cls, sizeof(D), sizeof(A), sizeof(B), 0};
    }
    template <class F, class D, class A, class B, class C>
    void add3(const std::string& name, Class cls) {
        operations[name] = {ternary<F, D, A, B, C>, cls, sizeof(D), sizeof(A), sizeof(B), sizeof(C)};
    }
    void add(const std::string& name, const Operation& operation) { operations[name] = operation; }

private:
    std::unordered_map<std::string, Operation> operations;
};

void add_integers(Table& table);
void add_floats(Table& table);
void add_comparisons(Table& table);
void add_conversions(Table& table);

const Table& table();

}  // namespace ptxsim
