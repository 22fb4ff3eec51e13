// What is wrong with a node, in words; never leaves the library (see guarded in logging.h).
#pragma once

#include <stdexcept>

namespace nmexport::trt {

class Fault : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

}  // namespace nmexport::trt
