// JSON, as much as the results need.
#pragma once
#include <string>

#include "types.h"

namespace ptxsim {

class Json {
public:
    std::string text;

    // f writes the elements
    template <class F>
    void array(F f) { nested('[', ']', f); }
    template <class F>
    void object(F f) { nested('{', '}', f); }

    void value(u64 x) { item(std::to_string(x)); }
    void value(u32 x) { value(u64(x)); }
    void value(double x) { item(format("%.0f", x)); }
    void value(const std::string& s) { item(quoted(s)); }
    void value(const char* s) { value(std::string(s)); }
    template <class... T>
    void values(const T&... x) { (value(x), ...); }
    template <class T>
    void member(const char* name, const T& x) {
        item(quoted(name) + ":");
        first = true;
        value(x);
    }

private:
    bool first = true;

    void item(const std::string& s) {
        if (!first) text += ',';
        first = false;
        text += s;
    }
    template <class F>
    void nested(char open, char close, F f) {
        item(std::string(1, open));
        first = true;
        f();
        text += close;
        first = false;
    }
    static std::string quoted(const std::string& s) {
        std::string q = "\"";
        for (const char c : s) {
            if (c == '"' || c == '\\') q += '\\';
            q += u8(c) < 32 ? ' ' : c;
        }
        return q + '"';
    }
};

}  // namespace ptxsim
