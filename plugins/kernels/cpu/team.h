// Threads that stay together for many loops, one behind the other.
//
// A decode step has hundreds of loops of some ten microseconds, and a host's pool takes several to
// start each. Here one thread leads, and the others wait at its side for the next loop:
//
//   leader    loop 1 |  a norm  | loop 2 |  ...
//   helper    loop 1 |  waits   | loop 2 |  ...
//
// Whoever comes first leads; a helper that comes late, or never, is not waited for. So a team ends
// even where a host runs its tasks one after the other.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>

#include "scratch.h"
#include "thread_pool.h"

namespace nmexport {

class Team {
  public:
    // Calls body(pool) once, on one of the host's threads; the loops that it starts on that pool
    // run on all of them. Throws what the body throws.
    template <typename Body>
    static void gather(const ThreadPool& host, const Body& body) {
        if (host.threads <= 1) return body(host);
        const auto lead = [](const void* raw, const ThreadPool& pool) {
            (*static_cast<const Body*>(raw))(pool);
        };
        Team(host.threads, lead, &body).run(host);
    }

  private:
    using Task = void (*)(void* state, std::size_t index);

    using Lead = void (*)(const void* body, const ThreadPool& pool);

    Team(std::size_t threads, Lead lead, const void* body)
        : mThreads(threads), mLead(lead), mBody(body) {}

    void run(const ThreadPool& host);
    // One of the host's tasks: the first one leads.
    void join();
    void loop(std::size_t tasks, Task task, void* state);
    void help();
    // Does one task of the current loop; false where none is left.
    bool doOne();

    // The current loop: its tasks, and which one is next, in one word.
    alignas(kALIGNMENT) std::atomic<std::uint64_t> mTicket{0};
    Task mTask = nullptr;
    void* mState = nullptr;
    alignas(kALIGNMENT) std::atomic<std::size_t> mDone{0};
    alignas(kALIGNMENT) std::atomic<bool> mIsLed{false};
    std::atomic<bool> mEnded{false};
    const std::size_t mThreads;
    const Lead mLead;
    const void* const mBody;
    std::exception_ptr mFailure;
};

}  // namespace nmexport
