// Memory in pages of 2 MiB. A kept row of W lies anywhere in a matrix of megabytes: in pages of
// 4 KiB nearly every row waits for its page to be looked up, and no prefetch reaches beyond one.
#pragma once

#include <cstddef>
#include <memory>

namespace nmexport {

// Memory for `bytes`, aligned to a cache line, freed with the last reference to it; null where the
// system gives no such pages. What several callers ask for shares pages.
std::shared_ptr<char> hugePages(std::size_t bytes);

// Tells the system that the file pages in a range will not be read soon, so that they need not
// stay in memory. Changes nothing that the range holds, whatever it is.
void pageOut(const void* data, std::size_t bytes);

}  // namespace nmexport
