// A team's loops: every task once, whoever comes, late or never, and faults where they belong.
#include "team.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "expect.h"

using namespace nmexport;

namespace {

// One after the other on the caller's thread, as a host does that has no pool.
void inTurn(void*, std::size_t tasks, void (*task)(void*, std::size_t), void* state) {
    for (std::size_t i = 0; i < tasks; ++i) task(state, i);
}

// A thread for each task; those behind the first come later, by as many microseconds as
// `context` says.
void onThreads(void* context, std::size_t tasks, void (*task)(void*, std::size_t), void* state) {
    const auto delay = std::chrono::microseconds(*static_cast<int*>(context));
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < tasks; ++i) {
        threads.emplace_back([=] {
            std::this_thread::sleep_for(delay * static_cast<int>(i));
            task(state, i);
        });
    }
    for (std::thread& thread : threads) thread.join();
}

// Many short loops, each of which reads what the one before it wrote.
void everyTaskRunsOnce(const ThreadPool& host) {
    constexpr std::size_t kLOOPS = 300;
    std::size_t started = 0;
    Team::gather(host, [&](const ThreadPool& pool) {
        ++started;
        std::vector<std::size_t> counts(17, 0);
        for (std::size_t loop = 0; loop < kLOOPS; ++loop) {
            const std::size_t tasks = 1 + loop % counts.size();
            parallelFor(pool, tasks, [&](std::size_t i) {
                // Not atomic: the loops before must have ended, and nobody else has this task.
                counts[i] += loop + i;
            });
        }
        std::vector<std::size_t> wanted(counts.size(), 0);
        for (std::size_t loop = 0; loop < kLOOPS; ++loop) {
            for (std::size_t i = 0; i < 1 + loop % counts.size(); ++i) wanted[i] += loop + i;
        }
        EXPECT(counts == wanted);
    });
    EXPECT(started == 1);
}

void faultsAreThrownToTheCaller(const ThreadPool& host) {
    std::string message;
    try {
        Team::gather(host, [](const ThreadPool&) { throw std::runtime_error("of the body"); });
    } catch (const std::runtime_error& error) {
        message = error.what();
    }
    EXPECT(message == "of the body");
    bool isOut = false;
    std::size_t done = 0;
    try {
        Team::gather(host, [&](const ThreadPool& pool) {
            parallelFor(pool, 9, [](std::size_t i) {
                if (i == 5) throw std::bad_alloc();
            });
            ++done;
        });
    } catch (const std::bad_alloc&) {
        isOut = true;
    }
    EXPECT(isOut);
    EXPECT(done == 0);
}

// Several teams at once, as sessions that run at the same time have them.
void teamsDoNotMeet() {
    int delay = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] { everyTaskRunsOnce({onThreads, &delay, 3}); });
    }
    for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
    for (const std::size_t threads : {1, 2, 5}) {
        everyTaskRunsOnce({inTurn, nullptr, threads});
        faultsAreThrownToTheCaller({inTurn, nullptr, threads});
        for (int delay : {0, 50, 5000}) {
            everyTaskRunsOnce({onThreads, &delay, threads});
            faultsAreThrownToTheCaller({onThreads, &delay, threads});
        }
    }
    teamsDoNotMeet();
    return nmexport::test::report("team");
}
