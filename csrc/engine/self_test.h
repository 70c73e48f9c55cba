// The start-up check: alias coherence, then the whole hand-over, in the real arena and pool.
//
// The compute of the test is copies on a stream of its own: host to device stands for a KV write,
// device to host for attention's reads. Steps follow one another without waiting.
#pragma once

#include <functional>

namespace pie {

class Engine;

// Throws PIE_ERR_TRANSFER. Needs an idle device. Also when it throws, ring, rows and pages that it
// used are zeroed, after `forget` has ended the test's steps.
void self_test(Engine& engine, const std::function<void()>& forget);

}  // namespace pie
