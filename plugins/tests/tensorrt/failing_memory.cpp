#include "failing_memory.h"

#include <cstdlib>
#include <new>

namespace {

constexpr int kALL = -1;
int allowed = kALL;

void* take(std::size_t size) noexcept {
    if (allowed == 0) return nullptr;
    if (allowed > 0) --allowed;
    return std::malloc(size == 0 ? 1 : size);
}

}  // namespace

namespace nmexport::test {

FailingMemory::FailingMemory(int allowances) {
    allowed = allowances;
}

FailingMemory::~FailingMemory() {
    allowed = kALL;
}

}  // namespace nmexport::test

void* operator new(std::size_t size) {
    if (void* memory = take(size)) return memory;
    throw std::bad_alloc();
}

void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    return take(size);
}

void operator delete(void* memory) noexcept {
    std::free(memory);
}

void operator delete(void* memory, std::size_t) noexcept {
    std::free(memory);
}

void operator delete(void* memory, const std::nothrow_t&) noexcept {
    std::free(memory);
}
