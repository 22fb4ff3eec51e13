#include "team.h"

#include <thread>

namespace nmexport {

namespace {

// Looks at what another thread changes before the processor is left to others: some tens of
// microseconds.
constexpr int kLOOKS = 1000;

// Lets the other thread of the core, or the bus, have the time between two looks.
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <typename Condition>
void waitUntil(const Condition& isTrue) {
    for (int looks = 0; !isTrue(); ++looks) {
        if (looks < kLOOKS) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

constexpr int kCOUNT_SHIFT = 32;

constexpr std::uint32_t nextOf(std::uint64_t ticket) {
    return static_cast<std::uint32_t>(ticket);
}

constexpr bool hasWork(std::uint64_t ticket) {
    return nextOf(ticket) < ticket >> kCOUNT_SHIFT;
}

}  // namespace

void Team::run(const ThreadPool& host) {
    host.run(
        host.context, host.threads,
        [](void* self, std::size_t) { static_cast<Team*>(self)->join(); }, this);
    if (mFailure) std::rethrow_exception(mFailure);
}

void Team::join() {
    if (mIsLed.exchange(true, std::memory_order_relaxed)) return help();
    const auto loopOf = [](void* self, std::size_t tasks, Task task, void* state) {
        static_cast<Team*>(self)->loop(tasks, task, state);
    };
    try {
        mLead(mBody, ThreadPool{loopOf, this, mThreads, true});
    } catch (...) {
        mFailure = std::current_exception();
    }
    mEnded.store(true, std::memory_order_release);
}

void Team::loop(std::size_t tasks, Task task, void* state) {
    mTask = task;
    mState = state;
    mDone.store(0, std::memory_order_relaxed);
    mTicket.store(static_cast<std::uint64_t>(tasks) << kCOUNT_SHIFT, std::memory_order_release);
    while (doOne()) {
    }
    waitUntil([&] { return mDone.load(std::memory_order_acquire) == tasks; });
}

bool Team::doOne() {
    std::uint64_t ticket = mTicket.load(std::memory_order_relaxed);
    // That a loop has ended meanwhile and another has begun does no harm: what is taken is a task
    // of the loop whose ticket this is, and it cannot end before that task.
    do {
        if (!hasWork(ticket)) return false;
    } while (!mTicket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                            std::memory_order_relaxed));
    mTask(mState, nextOf(ticket));
    mDone.fetch_add(1, std::memory_order_release);
    return true;
}

void Team::help() {
    while (!mEnded.load(std::memory_order_acquire)) {
        while (doOne()) {
        }
        waitUntil([&] {
            return hasWork(mTicket.load(std::memory_order_relaxed)) ||
                   mEnded.load(std::memory_order_relaxed);
        });
    }
}

}  // namespace nmexport
