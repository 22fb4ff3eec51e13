// A constant W copied into huge pages for one node.
#pragma once

#include <cstddef>
#include <memory>

#include "node.h"

namespace nmexport {

class WeightCopy {
  public:
    // Copies nothing where W is not constant, or there are no huge pages. `columnsPerByte` is of
    // integers of 4 bits, else 1.
    WeightCopy(const InputShapes& shapes, std::size_t elementBytes, std::size_t columnsPerByte);

    // The rows to read in place of the `given` ones.
    const void* rows(const void* given) const { return mRows == nullptr ? given : mRows.get(); }

  private:
    std::shared_ptr<char> mRows;
};

}  // namespace nmexport
