// A constant W copied into huge pages for one node.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "nm_linear.h"
#include "node.h"

namespace nmexport {

class WeightCopy {
  public:
    // Copies nothing where W or what goes with it is not constant, or there are no huge pages.
    WeightCopy(const InputShapes& shapes, std::size_t elementBytes);

    // Lets a node read the copy in place of the W it was given.
    void place(LinearArguments& arguments) const;

  private:
    std::shared_ptr<char> mRows;
    std::vector<std::int32_t> mPositions;  // empty where rows are by channel
};

}  // namespace nmexport
