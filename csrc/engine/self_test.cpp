#include "engine/self_test.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "engine/engine.h"

namespace pie {
namespace {

constexpr int64_t kBlocks = 4;
constexpr int64_t kStagingBytes = 64 << 20;

class SelfTest {
 public:
  explicit SelfTest(Engine& engine)
      : engine_(engine),
        driver_(engine.driver()),
        g_(engine.geometry()),
        n_(count(engine.geometry())),
        area_(static_cast<size_t>(g_.row_pages * n_ * g_.page)),
        staging_(driver_, 5 * area_),
        compute_(driver_) {}

  void aliases() {
    for (int64_t l = 0; l + g_.slots < g_.layers; ++l) {
      fill(kOld, layer_bytes());
      move(Direction::kHostToDevice, l, g_.resident, at(kOld, 0));
      move(Direction::kDeviceToHost, l + g_.slots, g_.resident, at(kSeen, 0));
      driver_.stream_synchronize(compute_);
      if (std::memcmp(at(kOld, 0), at(kSeen, 0), layer_bytes()) != 0) {
        fail("layer " + std::to_string(l + g_.slots) + " does not see what was written to layer " +
             std::to_string(l) + "'s view of their ring slot");
      }
    }
  }

  // Blocks [0, n) hold `old`; step 1 stores them and writes `fresh` over them; step 2 reads the
  // rows again from the ring and stores `fresh` to the other rows; step 3 promotes `old` back.
  void hand_over(int64_t first_step, int64_t row, int64_t other_row) {
    fill(kOld, area_);
    fill(kFresh, area_);
    for (int64_t l = 0; l < g_.row_pages; ++l) move(Direction::kHostToDevice, l, 0, at(kOld, l));
    const Runs out = pages(0, row), in = pages(g_.resident, row);
    const bool two = other_row >= 0;
    const Runs out2 = two ? pages(0, other_row) : Runs();
    step({first_step, out.data(), n_, nullptr, 0, in.data(), n_, 0}, g_.resident, kSeen, true);
    step({first_step + 1, out2.data(), two ? n_ : 0, nullptr, 0, nullptr, -1, 0}, g_.resident,
         kAgain, false);
    step({first_step + 2, nullptr, 0, out.data(), n_, nullptr, 0, 0}, 0, kBack, false);
    driver_.stream_synchronize(compute_);
    for (const int area : {kSeen, kAgain, kBack}) {
      if (std::memcmp(at(kOld, 0), at(area, 0), area_) != 0) {
        const char* what[] = {"", "", "stored and loaded in one step", "loaded in the next step",
                              "promoted"};
        fail(std::string("a block ") + what[area] + " came back with other bytes");
      }
    }
    check_row(row, kOld);
    if (two) check_row(other_row, kFresh);
  }

  void run() {
    aliases();
    if (!engine_.pool().holds(0)) fail("the first chunk of the pool is not there; commit it first");
    const int64_t last = (g_.num_chunks - 1) * g_.chunk_rows;
    const bool apart = g_.num_chunks > 1;
    borrowed_ = !engine_.pool().holds(last);
    engine_.commit_chunk(g_.num_chunks - 1);
    const int64_t in_last = std::min(n_, g_.rows - last);
    // Numbers apart: each first step begins with a barrier, after the writes before it.
    hand_over(10, 0, 2 * n_ <= g_.rows_of_chunk(0) ? n_ : -1);
    hand_over(20, 0, apart && in_last == n_ ? last : -1);
  }

  void clean() {
    std::memset(staging_.data(), 0, area_);
    for (int64_t l = 0; l < g_.row_pages; ++l) move(Direction::kHostToDevice, l, 0, at(kOld, l));
    driver_.stream_synchronize(compute_);
    for (const int64_t row : touched_) {
      for (int64_t l = 0; l < g_.row_pages; ++l) {
        std::memset(reinterpret_cast<void*>(engine_.pool().page(row, l)), 0,
                    static_cast<size_t>(g_.page));
      }
    }
    if (borrowed_) engine_.release_chunk(g_.num_chunks - 1);
  }

 private:
  enum Area { kOld, kFresh, kSeen, kAgain, kBack };

  static int64_t count(const Geometry& g) {
    const int64_t fits = kStagingBytes / (5 * g.row_pages * g.page);
    return std::max<int64_t>(1,
                             std::min({kBlocks, g.resident, g.pooled, g.rows_of_chunk(0), fits}));
  }

  // n runs of one page each, last one first: batches of several copies.
  Runs pages(int64_t block, int64_t row) const {
    Runs runs;
    for (int64_t i = n_; i-- > 0;) runs.push_back({block + i, row + i, 1});
    return runs;
  }

  [[noreturn]] static void fail(const std::string& text) {
    throw Error(PIE_ERR_TRANSFER, "self-test: " + text);
  }

  size_t layer_bytes() const { return static_cast<size_t>(n_ * g_.page); }
  uint8_t* at(int area, int64_t layer) const {
    return staging_.data() + static_cast<size_t>(area) * area_ +
           static_cast<size_t>(layer) * layer_bytes();
  }

  void fill(int area, size_t size) {
    uint8_t* bytes = at(area, 0);
    for (size_t i = 0; i < size; i += sizeof(uint64_t)) {
      const uint64_t value = random_();
      std::memcpy(bytes + i, &value, std::min(sizeof(value), size - i));
    }
  }

  // n pages of a layer, on the compute stream.
  void move(Direction direction, int64_t layer, int64_t block, uint8_t* host) {
    const Address device = engine_.arena().page(layer, block);
    const auto there = reinterpret_cast<Address>(host);
    const bool in = direction == Direction::kHostToDevice;
    const CopyOp op{in ? device : there, in ? there : device, layer_bytes()};
    driver_.copy_batch(compute_, direction, &op, 1);
  }

  void step(const pie_plan& plan, int64_t read, int area, bool write) {
    for (int64_t i = 0; i < plan.num_stores; ++i) touched_.push_back(plan.stores[i].row);
    engine_.begin_step(plan, compute_);
    for (int64_t l = 0; l < g_.layers; ++l) {
      engine_.before_write(l);
      if (write) move(Direction::kHostToDevice, l, 0, at(kFresh, l));
      engine_.before_attention(l);
      move(Direction::kDeviceToHost, l, read, at(area, l));
      engine_.after_attention(l);
    }
    engine_.end_step();
    for (int64_t l = g_.layers; l < g_.row_pages; ++l) {  // drafts
      if (write) move(Direction::kHostToDevice, l, 0, at(kFresh, l));
      move(Direction::kDeviceToHost, l, read, at(area, l));
    }
  }

  void check_row(int64_t row, int area) {
    for (int64_t l = 0; l < g_.row_pages; ++l) {
      const void* page = reinterpret_cast<const void*>(engine_.pool().page(row, l));
      if (std::memcmp(page, at(area, l), layer_bytes()) != 0) {
        fail("row " + std::to_string(row) + " of the pool holds other bytes than were stored");
      }
    }
  }

  Engine& engine_;
  Driver& driver_;
  const Geometry& g_;
  const int64_t n_;
  const size_t area_;
  const HostBlock staging_;
  const OwnedStream compute_;
  std::mt19937_64 random_{20261122};
  std::vector<int64_t> touched_;
  bool borrowed_ = false;  // the last chunk is there for the test only
};

}  // namespace

void self_test(Engine& engine, const std::function<void()>& forget) {
  SelfTest test(engine);
  const auto clean = [&] {
    forget();
    test.clean();
    engine.zero_ring();
  };
  try {
    test.run();
  } catch (const Error&) {
    clean();
    throw;
  }
  clean();
}

}  // namespace pie
