// The thread pool that a host framework lends to a kernel for the time of one call.
#pragma once

#include <atomic>
#include <cstddef>
#include <new>

namespace nmexport {

struct ThreadPool {
    // Calls task(state, i) for every i < tasks, in any order and on any thread, and returns when
    // all have returned. May throw what the host throws; the tasks themselves never throw.
    void (*run)(void* context, std::size_t tasks, void (*task)(void* state, std::size_t index),
                void* state);
    void* context;
    std::size_t threads;      // how many are worth feeding; the results do not depend on it
    bool startsFast = false;  // a loop starts within a microsecond: short ones are worth it too
};

// body(i) for every i < tasks. A body may run out of memory: that is thrown here, on the caller's
// thread, because it must not unwind through the host's pool.
template <typename Body>
void parallelFor(const ThreadPool& pool, std::size_t tasks, const Body& body) {
    if (tasks <= 1) {
        for (std::size_t i = 0; i < tasks; ++i) body(i);
        return;
    }
    struct State {
        const Body* body;
        std::atomic<bool> outOfMemory{false};
    } state{&body};
    const auto task = [](void* raw, std::size_t index) {
        State* shared = static_cast<State*>(raw);
        try {
            (*shared->body)(index);
        } catch (const std::bad_alloc&) {
            shared->outOfMemory = true;
        }
    };
    pool.run(pool.context, tasks, task, &state);
    if (state.outOfMemory) throw std::bad_alloc();
}

}  // namespace nmexport
