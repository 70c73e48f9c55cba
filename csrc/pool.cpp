#include "pool.h"

namespace pie {

Pool::Pool(Driver& driver, const Geometry& geometry) : geometry_(geometry) {
  chunks_.reserve(static_cast<size_t>(geometry.num_chunks));
  for (int64_t c = 0; c < geometry.num_chunks; ++c) {
    const int64_t bytes = geometry.rows_of_chunk(c) * geometry.layers * geometry.page;
    chunks_.emplace_back(driver, static_cast<size_t>(bytes));
  }
}

}  // namespace pie
