#include "huge_pages.h"

#include <cstdint>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "scratch.h"

namespace nmexport {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

constexpr std::size_t kPAGE = std::size_t{2} << 20;
// Mapped at a time; what nobody uses of it is never touched, so it takes no memory.
constexpr std::size_t kCHUNK = std::size_t{64} << 20;

std::size_t roundUp(std::size_t value, std::size_t unit) {
    return (value + unit - 1) / unit * unit;
}

class Chunk {
  public:
    // Null where the system refuses.
    static std::shared_ptr<Chunk> map(std::size_t bytes) {
        const std::size_t size = roundUp(bytes, kPAGE);
        // One page more: a mapping starts at a multiple of 4 KiB.
        void* base = mmap(nullptr, size + kPAGE, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) return nullptr;
        std::shared_ptr<Chunk> chunk(new Chunk(static_cast<char*>(base), size));
        return madvise(chunk->mStart, size, MADV_HUGEPAGE) == 0 ? chunk : nullptr;
    }

    Chunk(const Chunk&) = delete;
    Chunk& operator=(const Chunk&) = delete;
    ~Chunk() { munmap(mBase, mSize + kPAGE); }

    // Null where too little is left.
    char* take(std::size_t bytes) {
        const std::size_t size = roundUp(bytes, kALIGNMENT);
        if (size > mSize - mUsed) return nullptr;
        char* start = mStart + mUsed;
        mUsed += size;
        return start;
    }

  private:
    Chunk(char* base, std::size_t size)
        : mBase(base),
          mStart(base + roundUp(reinterpret_cast<std::uintptr_t>(base), kPAGE) -
                 reinterpret_cast<std::uintptr_t>(base)),
          mSize(size) {}

    char* mBase;
    char* mStart;
    std::size_t mSize;  // from mStart on
    std::size_t mUsed = 0;
};

}  // namespace

std::shared_ptr<char> hugePages(std::size_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Chunk> current;  // its users keep it
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Chunk> chunk = current.lock();
    char* start = chunk == nullptr ? nullptr : chunk->take(bytes);
    if (start == nullptr) {
        chunk = Chunk::map(bytes > kCHUNK ? bytes : kCHUNK);
        if (chunk == nullptr) return nullptr;
        start = chunk->take(bytes);
        current = chunk;
    }
    return std::shared_ptr<char>(chunk, start);
}

void pageOut(const void* data, std::size_t bytes) {
#if defined(MADV_PAGEOUT)
    const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const std::uintptr_t begin = roundUp(reinterpret_cast<std::uintptr_t>(data), page);
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_PAGEOUT);
#else
    static_cast<void>(data);
    static_cast<void>(bytes);
#endif
}

#else

std::shared_ptr<char> hugePages(std::size_t) {
    return nullptr;
}

void pageOut(const void*, std::size_t) {}

#endif

}  // namespace nmexport
