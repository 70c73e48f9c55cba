// The gather kernel on the host: the same text, with loops in place of a grid of blocks.
//
// Define PIE_ON_ACCESS(address, bytes, is_store) before to see every access.
#pragma once

#include <cstring>

#include "kernels/gather.cu"

// The block that runs.
inline unsigned pie_gather_host_cta = 0;

// As a launch of `grid` blocks of `block` threads (a multiple of 32) would.
inline void pie_gather_host(const pie_gather_detail::Entry* table, const unsigned long long* count,
                            unsigned long long* copied, const pie_gather_detail::Layer& layer,
                            unsigned grid, unsigned block) {
  for (unsigned cta = 0; cta < grid; ++cta) {
    pie_gather_host_cta = cta;
    pie_gather_detail::Scan scan;
    std::memset(&scan, 0x5c, sizeof scan);  // shared memory begins with anything
    pie_gather_detail::gather_block(table, *count, layer, scan, cta, grid, block);
  }
  if (copied != nullptr) ++*copied;
}
