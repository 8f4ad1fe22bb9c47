#include "layer_threshold.h"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/thread_pool.h"
#include "isa.h"
#include "sparse_spans.h"

namespace metagpt_fast::cpu {
namespace {

constexpr std::uint32_t kNoKey = 0xffffffffu;
constexpr std::uint32_t kMaxKey = 0x7fffffffu;
// Tensors up to this size are selected from whole, one thread each.
constexpr std::size_t kSmallNumel = std::size_t{1} << 16;
// A sample of a larger tensor brackets the key: runs of elements, evenly spread. One in 16,384 of a tensor of 2^29 and
// more, so that a bracket's candidates stay bounded; with 32,768 the rank is known to 0.3 % (one standard deviation).
constexpr std::size_t kSampleRun = 256;
constexpr std::size_t kMinSample = std::size_t{1} << 15;
// Half of the bracket, as a share of the tensor: four standard deviations of a sample's rank.
constexpr double kBracketDeviations = 4.0;
// More candidates than this are not collected; the key is narrowed down by counting first.
constexpr std::size_t kMaxCandidates = std::size_t{1} << 23;
// Histograms: the 16 bits from bit 15 on, then the 15 below.
constexpr int kLowBits = 15;
constexpr std::size_t kNumBins = std::size_t{1} << (31 - kLowBits);

struct Bracket {
  std::uint32_t low = 0;
  std::uint32_t high = kMaxKey;
};

// What a span has in a bracket.
struct Candidates {
  std::uint64_t above = 0;
  std::size_t inside = 0;
  std::vector<std::uint32_t> keys;
  std::vector<std::uint32_t> positions;  // in the span
};

struct Found {
  std::uint32_t key;
  std::int64_t index;
};

// The candidate of rank `rank` among those of all spans: larger keys first, equal ones by index.
Found select(const std::vector<Candidates>& candidates, const std::vector<Span>& spans, std::size_t rank) {
  std::vector<std::uint64_t> order;  // key, inverted, and position in the concatenation, which ascends with the index
  for (const Candidates& each : candidates) {
    for (const std::uint32_t key : each.keys) order.push_back(std::uint64_t{~key} << 32 | order.size());
  }
  std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(rank), order.end());
  std::size_t position = order[rank] & 0xffffffffu;
  std::size_t s = 0;
  while (position >= candidates[s].keys.size()) position -= candidates[s++].keys.size();
  return {candidates[s].keys[position], static_cast<std::int64_t>(spans[s].first + candidates[s].positions[position])};
}

// Selects from one large tensor, whose spans all threads share.
class Selector {
 public:
  Selector(const Layer& layer, const KeyTable& table, std::size_t tensor, std::vector<SparseScratch>& scratch)
      : layer_(layer),
        rule_(key_rule(table, tensor)),
        tensor_(tensor),
        numel_(static_cast<std::size_t>(layer.numels[tensor])),
        num_keys_(num_keys(layer, table)),
        scratch_(scratch) {
    for (std::size_t first = 0; first < numel_; first += kSpanNumel) {
      spans_.push_back({tensor, first, std::min(kSpanNumel, numel_ - first)});
    }
  }

  // ranks, keys, indices: [num_keys, num_ranks].
  void run(const std::int64_t* ranks, std::size_t num_ranks, std::uint32_t* keys, std::int64_t* indices) {
    draw_sample();
    std::vector<Wanted> wanted;
    for (std::size_t i = 0; i < num_keys_ * num_ranks; ++i) {
      if (ranks[i] >= 0) wanted.push_back({i / num_ranks, static_cast<std::size_t>(ranks[i]), i, {}, true});
    }
    parallel_for(wanted.size(), static_cast<int>(scratch_.size()),
                 [&](std::size_t w, int) { wanted[w].bracket = bracket_of(wanted[w]); });
    std::vector<std::vector<Candidates>> candidates = scan(wanted);
    for (std::size_t w = 0; w < wanted.size(); ++w) {
      const Wanted& each = wanted[w];
      std::optional<Found> found = from_candidates(each, candidates[w]);
      candidates[w].clear();
      if (!found) found = by_counting(each);
      keys[each.entry] = found->key;
      indices[each.entry] = found->index;
    }
  }

 private:
  struct Wanted {
    std::size_t key;    // which of an element's keys
    std::size_t rank;
    std::size_t entry;  // where the result goes
    Bracket bracket;
    bool collects;
  };

  // Calls body(span number, block's first element in the span, its keys, their number, worker) for every block.
  template <class Body>
  void for_each_block(const std::vector<std::size_t>& which, const Body& body) {
    const SparseKernels& kernel = kernels().sparse;
    parallel_for(spans_.size(), static_cast<int>(scratch_.size()), [&](std::size_t s, int worker) {
      SparseScratch& mine = scratch_[static_cast<std::size_t>(worker)];
      const Operand* operands = mine.load(layer_, spans_[s]);
      std::uint32_t* keys = mine.key_buffer();
      for (std::size_t done = 0; done < spans_[s].numel; done += kBlockNumel) {
        const std::size_t n = std::min(kBlockNumel, spans_[s].numel - done);
        for (const std::size_t j : which) {
          kernel.keys(operands, layer_.num_models(), j, done, spans_[s].first + done, n, rule_, mine.rows(), keys);
          body(s, j, done, keys, n, worker);
        }
      }
    });
  }

  void draw_sample() {
    const std::size_t wanted = std::max(kMinSample, numel_ >> 14);
    const std::size_t num_runs = std::min(wanted / kSampleRun, numel_ / kSampleRun);
    sample_.assign(num_keys_, std::vector<std::uint32_t>(num_runs * kSampleRun));
    const SparseKernels& kernel = kernels().sparse;
    parallel_for(num_runs, static_cast<int>(scratch_.size()), [&](std::size_t i, int worker) {
      SparseScratch& mine = scratch_[static_cast<std::size_t>(worker)];
      // Spread by fractions, not by a fixed step that could meet the same column of every row.
      const std::size_t first = static_cast<std::size_t>(static_cast<double>(numel_ - kSampleRun) *
                                                         (static_cast<double>(i) / static_cast<double>(num_runs)));
      const Operand* operands = mine.load(layer_, {tensor_, first, kSampleRun});
      for (std::size_t j = 0; j < num_keys_; ++j) {
        kernel.keys(operands, layer_.num_models(), j, 0, first, kSampleRun, rule_, mine.rows(),
                    &sample_[j][i * kSampleRun]);
      }
    });
  }

  Bracket bracket_of(const Wanted& wanted) const {
    std::vector<std::uint32_t> sample = sample_[wanted.key];
    const auto size = static_cast<double>(sample.size());
    const double at = static_cast<double>(wanted.rank) / static_cast<double>(numel_) * size;
    const double half = kBracketDeviations * 0.5 * __builtin_sqrt(size);
    const auto key_at = [&](double position, std::uint32_t before, std::uint32_t after) {
      if (position < 0) return before;
      if (position >= size) return after;
      const auto nth = sample.begin() + static_cast<std::ptrdiff_t>(position);
      std::nth_element(sample.begin(), nth, sample.end(), std::greater<>());
      return *nth;
    };
    return {key_at(at + half, kMaxKey, 0), key_at(at - half, kMaxKey, 0)};
  }

  // What each span has in each bracket: [wanted][span].
  std::vector<std::vector<Candidates>> scan(const std::vector<Wanted>& wanted) {
    std::vector<std::vector<Candidates>> candidates(wanted.size(), std::vector<Candidates>(spans_.size()));
    std::vector<std::size_t> which;
    for (const Wanted& each : wanted) {
      if (which.empty() || which.back() != each.key) which.push_back(each.key);
    }
    // Collecting ends where it would take too much memory; counting goes on.
    const std::size_t most_per_span = kMaxCandidates / spans_.size() * 4 + kBlockNumel;
    const SparseKernels& kernel = kernels().sparse;
    for_each_block(which, [&](std::size_t s, std::size_t j, std::size_t done, const std::uint32_t* keys, std::size_t n,
                              int) {
      std::uint32_t found_keys[kBlockNumel + 16];
      std::uint32_t found_positions[kBlockNumel + 16];
      for (std::size_t w = 0; w < wanted.size(); ++w) {
        if (wanted[w].key != j) continue;
        Candidates& mine = candidates[w][s];
        const bool collects = wanted[w].collects && mine.keys.size() < most_per_span;
        const std::size_t count =
            kernel.scan_keys(keys, n, wanted[w].bracket.low, wanted[w].bracket.high, static_cast<std::uint32_t>(done),
                             mine.above, collects ? found_keys : nullptr, found_positions);
        mine.inside += count;
        if (!collects) continue;
        mine.keys.insert(mine.keys.end(), found_keys, found_keys + count);
        mine.positions.insert(mine.positions.end(), found_positions, found_positions + count);
      }
    });
    return candidates;
  }

  // The element, if the bracket holds it and all of its candidates were collected.
  std::optional<Found> from_candidates(const Wanted& wanted, const std::vector<Candidates>& candidates) const {
    std::uint64_t above = 0;
    std::size_t inside = 0;
    std::size_t collected = 0;
    for (const Candidates& each : candidates) {
      above += each.above;
      inside += each.inside;
      collected += each.keys.size();
    }
    if (wanted.rank < above || wanted.rank >= above + inside || collected != inside) return std::nullopt;
    return select(candidates, spans_, wanted.rank - above);
  }

  // Exact without a bracket: the bin of the upper bits, then either its few candidates, or the key by the lower bits and
  // the span that holds the element.
  Found by_counting(Wanted wanted) {
    std::uint64_t above = 0;
    const std::size_t bin = find_bin(wanted, kLowBits, 0, above);
    wanted.bracket = {static_cast<std::uint32_t>(bin << kLowBits),
                      static_cast<std::uint32_t>((bin << kLowBits) + (std::size_t{1} << kLowBits) - 1)};
    if (std::optional<Found> found = from_candidates(wanted, scan({wanted}).front())) return *found;
    const auto key =
        static_cast<std::uint32_t>(bin << kLowBits | find_bin(wanted, 0, static_cast<std::uint32_t>(bin), above));
    wanted.bracket = {key, key};
    wanted.collects = false;
    const std::vector<Candidates> counted = scan({wanted}).front();
    std::size_t left = wanted.rank - above;
    std::size_t s = 0;
    while (left >= counted[s].inside) left -= counted[s++].inside;
    return {key, static_cast<std::int64_t>(spans_[s].first) + position_of(s, wanted.key, key, left)};
  }

  // The bin of the key of this rank: of its upper bits (shift kLowBits), or of its lower ones (shift 0) among the keys
  // whose upper bits are `upper`. `above` grows by the number of keys in larger bins.
  std::size_t find_bin(const Wanted& wanted, int shift, std::uint32_t upper, std::uint64_t& above) {
    std::vector<std::vector<std::uint64_t>> bins(scratch_.size(), std::vector<std::uint64_t>(kNumBins));
    for_each_block({wanted.key},
                   [&](std::size_t, std::size_t, std::size_t, const std::uint32_t* keys, std::size_t n, int worker) {
                     std::vector<std::uint64_t>& mine = bins[static_cast<std::size_t>(worker)];
                     for (std::size_t e = 0; e < n; ++e) {
                       if (shift != 0) {
                         ++mine[keys[e] >> shift];
                       } else if (keys[e] >> kLowBits == upper) {
                         ++mine[keys[e] & ((1u << kLowBits) - 1)];
                       }
                     }
                   });
    for (std::size_t bin = kNumBins; bin-- > 0;) {
      std::uint64_t count = 0;
      for (const std::vector<std::uint64_t>& each : bins) count += each[bin];
      if (wanted.rank < above + count) return bin;
      above += count;
    }
    throw std::logic_error("layer_threshold: a rank above the number of elements");
  }

  // Where in span s the element number `left` with this key is.
  std::int64_t position_of(std::size_t s, std::size_t j, std::uint32_t key, std::size_t left) {
    SparseScratch& mine = scratch_.front();
    const Operand* operands = mine.load(layer_, spans_[s]);
    std::uint32_t* keys = mine.key_buffer();
    kernels().sparse.keys(operands, layer_.num_models(), j, 0, spans_[s].first, spans_[s].numel, rule_, mine.rows(),
                          keys);
    std::int64_t position = 0;
    while (keys[position] != key || left-- > 0) ++position;
    return position;
  }

  const Layer& layer_;
  KeyRule rule_;
  std::size_t tensor_;
  std::size_t numel_;
  std::size_t num_keys_;
  std::vector<SparseScratch>& scratch_;
  std::vector<Span> spans_;
  std::vector<std::vector<std::uint32_t>> sample_;
};

// Selects from a tensor that fits a thread's buffer.
void select_small(const Layer& layer, const KeyTable& table, std::size_t tensor, SparseScratch& scratch,
                  const std::int64_t* ranks, std::size_t num_ranks, std::uint32_t* keys, std::int64_t* indices) {
  const auto numel = static_cast<std::size_t>(layer.numels[tensor]);
  if (numel == 0) return;
  const Operand* operands = scratch.load(layer, {tensor, 0, numel});
  std::uint32_t* buffer = scratch.key_buffer();
  std::vector<std::uint64_t> order(numel);
  for (std::size_t j = 0; j < num_keys(layer, table); ++j) {
    kernels().sparse.keys(operands, layer.num_models(), j, 0, 0, numel, key_rule(table, tensor), scratch.rows(),
                          buffer);
    for (std::size_t e = 0; e < numel; ++e) order[e] = std::uint64_t{~buffer[e]} << 32 | e;
    for (std::size_t i = j * num_ranks; i < (j + 1) * num_ranks; ++i) {
      if (ranks[i] < 0) continue;
      std::nth_element(order.begin(), order.begin() + ranks[i], order.end());
      const std::uint64_t found = order[static_cast<std::size_t>(ranks[i])];
      keys[i] = ~static_cast<std::uint32_t>(found >> 32);
      indices[i] = static_cast<std::int64_t>(found & 0xffffffffu);
    }
  }
}

void check_ranks(const Layer& layer, const std::int64_t* ranks, std::size_t ranks_per_tensor) {
  for (std::size_t i = 0; i < layer.num_tensors * ranks_per_tensor; ++i) {
    if (ranks[i] >= -1 && ranks[i] < std::max<std::int64_t>(layer.numels[i / ranks_per_tensor], 0)) continue;
    throw std::invalid_argument("ranks: got " + std::to_string(ranks[i]) + " for a tensor of " +
                                std::to_string(layer.numels[i / ranks_per_tensor]) + " elements");
  }
}

}  // namespace

void layer_threshold(const Layer& layer, const KeyTable& table, const std::int64_t* ranks, std::size_t num_ranks,
                     std::uint32_t* keys, std::int64_t* indices) {
  cut_into_spans(layer);  // checks the layer
  check_keys(layer, table);
  const std::size_t stride = num_keys(layer, table) * num_ranks;
  check_ranks(layer, ranks, stride);
  std::fill_n(keys, layer.num_tensors * stride, kNoKey);
  std::fill_n(indices, layer.num_tensors * stride, -1);
  const int num_workers = num_threads();
  std::vector<SparseScratch> scratch = make_sparse_scratch(layer.num_operands, num_workers);
  std::vector<std::size_t> small;
  for (std::size_t k = 0; k < layer.num_tensors; ++k) {
    if (static_cast<std::size_t>(layer.numels[k]) <= kSmallNumel) {
      small.push_back(k);
    } else {
      Selector(layer, table, k, scratch).run(ranks + k * stride, num_ranks, keys + k * stride, indices + k * stride);
    }
  }
  parallel_for(small.size(), num_workers, [&](std::size_t i, int worker) {
    const std::size_t k = small[i];
    select_small(layer, table, k, scratch[static_cast<std::size_t>(worker)], ranks + k * stride, num_ranks,
                 keys + k * stride, indices + k * stride);
  });
}

void layer_count_nonzero(const Layer& layer, const KeyTable& table, std::int64_t* counts) {
  const std::vector<Span> spans = cut_into_spans(layer);
  check_keys(layer, table);
  const SparseKernels& kernel = kernels().sparse;
  const std::size_t per_element = num_keys(layer, table);
  std::vector<std::uint64_t> span_counts(spans.size() * per_element);
  const int num_workers = num_threads();
  std::vector<SparseScratch> scratch = make_sparse_scratch(layer.num_operands, num_workers);
  parallel_for(spans.size(), num_workers, [&](std::size_t item, int worker) {
    SparseScratch& mine = scratch[static_cast<std::size_t>(worker)];
    const Span& span = spans[item];
    const Operand* operands = mine.load(layer, span);
    std::uint32_t* keys = mine.key_buffer();
    for (std::size_t done = 0; done < span.numel; done += kBlockNumel) {
      const std::size_t n = std::min(kBlockNumel, span.numel - done);
      for (std::size_t j = 0; j < per_element; ++j) {
        kernel.keys(operands, layer.num_models(), j, done, span.first + done, n, key_rule(table, span.tensor),
                    mine.rows(), keys);
        kernel.scan_keys(keys, n, 0, 0, 0, span_counts[item * per_element + j], nullptr, nullptr);
      }
    }
  });
  std::fill_n(counts, layer.num_tensors * per_element, 0);
  for (std::size_t i = 0; i < span_counts.size(); ++i) {
    counts[spans[i / per_element].tensor * per_element + i % per_element] += static_cast<std::int64_t>(span_counts[i]);
  }
}

}  // namespace metagpt_fast::cpu
