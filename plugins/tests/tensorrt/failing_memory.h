// Memory that runs out when a test wishes.
#pragma once

namespace nmexport::test {

// While it lives, `new` succeeds so many times, then throws std::bad_alloc.
class FailingMemory {
  public:
    explicit FailingMemory(int allowed);
    ~FailingMemory();
    FailingMemory(const FailingMemory&) = delete;
    FailingMemory& operator=(const FailingMemory&) = delete;
};

}  // namespace nmexport::test
