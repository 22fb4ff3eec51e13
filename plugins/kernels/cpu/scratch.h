// Memory that a thread keeps between calls, so that a warm kernel allocates nothing.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace nmexport {

// A cache line, and the widest vector.
constexpr std::size_t kALIGNMENT = 64;

// Uninitialised, aligned, grows and never shrinks; what it held before is lost when it grows.
template <typename T>
class Scratch {
  public:
    T* reserve(std::size_t count) {
        if (count > mCount) {
            const std::size_t bytes =
                (count * sizeof(T) + kALIGNMENT - 1) / kALIGNMENT * kALIGNMENT;
            mMemory.reset();
            mCount = 0;
            mMemory.reset(static_cast<T*>(std::aligned_alloc(kALIGNMENT, bytes)));
            if (mMemory == nullptr) throw std::bad_alloc();
            mCount = count;
        }
        return mMemory.get();
    }

    T* data() const { return mMemory.get(); }

  private:
    struct Free {
        void operator()(T* memory) const { std::free(memory); }
    };
    std::unique_ptr<T, Free> mMemory;
    std::size_t mCount = 0;
};

}  // namespace nmexport
