#include "table.h"

namespace ptxsim {

const Operation* Table::find(const std::string& name) const {
    const auto found = operations.find(name);
    return found == operations.end() ? nullptr : &found->second;
}

const Table& table() {
    static const Table filled = [] {
        Table t;
        add_integers(t);
        add_floats(t);
        add_comparisons(t);
        add_conversions(t);
        return t;
    }();
    return filled;
}

}  // namespace ptxsim
