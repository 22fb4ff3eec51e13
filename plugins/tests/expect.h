// The least a test needs: check, report, exit code.
#pragma once

#include <cstdio>

namespace nmexport::test {

inline int& failures() {
    static int count = 0;
    return count;
}

inline void expect(bool condition, const char* what, const char* file, int line) {
    if (condition) return;
    if (++failures() <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
}

#define EXPECT(condition) ::nmexport::test::expect((condition), #condition, __FILE__, __LINE__)

inline int report(const char* name) {
    std::printf("%s: %d failures\n", name, failures());
    return failures() == 0 ? 0 : 1;
}

}  // namespace nmexport::test
