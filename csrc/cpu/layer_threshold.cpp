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
// A sample of a larger tensor brackets the key: runs of elements, evenly spread. One element in 64, but no more than
// kMaxSample, or one in 2048 of what is larger than 2^28, so that what the bracket holds stays bounded. With 131,072
// the rank is known to 0.14 % (one standard deviation).
constexpr std::size_t kSampleRun = 256;
constexpr std::size_t kMinSample = std::size_t{1} << 13;
constexpr std::size_t kMaxSample = std::size_t{1} << 17;
// Half of the bracket, as a share of the tensor: four standard deviations of a sample's rank.
constexpr double kBracketDeviations = 4.0;
// More keys than this are not collected; the key is narrowed down by counting first.
constexpr std::size_t kMaxCollected = std::size_t{1} << 23;
// Histograms: the 16 bits from bit 15 on, then the 15 below.
constexpr int kLowBits = 15;
constexpr std::size_t kNumBins = std::size_t{1} << (31 - kLowBits);

struct Bracket {
  std::uint32_t low = 0;
  std::uint32_t high = kMaxKey;
};

// What a span has in a bracket.
struct SpanKeys {
  KeyCounts counts;
  std::vector<std::uint32_t> between;  // all of them, or fewer than counts.between
};

// The element number `ordinal` among those of the tensor that have this key, by span.
struct Place {
  std::uint32_t key;
  std::size_t span;
  std::size_t ordinal;
};

// The place of element number `ordinal` where count(span) says how many each span has.
template <class Count>
Place place_of(std::uint32_t key, std::size_t ordinal, const Count& count) {
  std::size_t s = 0;
  for (std::size_t here = count(s); ordinal >= here; here = count(s)) {
    ordinal -= here;
    ++s;
  }
  return {key, s, ordinal};
}

// The key of this rank among those between the ends: larger keys first, equal ones in their order.
Place select_between(const std::vector<SpanKeys>& spans, std::size_t num_between, std::size_t rank) {
  std::vector<std::uint32_t> keys;
  keys.reserve(num_between);
  for (const SpanKeys& span : spans) keys.insert(keys.end(), span.between.begin(), span.between.end());
  const auto nth = keys.begin() + static_cast<std::ptrdiff_t>(rank);
  std::nth_element(keys.begin(), nth, keys.end(), std::greater<>());
  const std::uint32_t key = *nth;
  // Larger keys are before it, equal ones on both sides.
  const auto num_larger =
      static_cast<std::size_t>(std::count_if(keys.begin(), nth, [key](std::uint32_t each) { return each > key; }));
  return place_of(key, rank - num_larger, [&](std::size_t s) {
    return static_cast<std::size_t>(std::count(spans[s].between.begin(), spans[s].between.end(), key));
  });
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
      if (ranks[i] >= 0) wanted.push_back({i / num_ranks, static_cast<std::size_t>(ranks[i]), i, {}});
    }
    const int num_workers = static_cast<int>(scratch_.size());
    parallel_for(wanted.size(), num_workers, [&](std::size_t w, int) { wanted[w].bracket = bracket_of(wanted[w]); });
    std::vector<std::vector<SpanKeys>> scanned = scan(wanted);
    std::vector<std::optional<Place>> places(wanted.size());
    parallel_for(wanted.size(), num_workers, [&](std::size_t w, int) {
      places[w] = find_place(wanted[w], scanned[w]);
      std::vector<SpanKeys>().swap(scanned[w]);
    });
    for (std::size_t w = 0; w < wanted.size(); ++w) {
      if (!places[w]) places[w] = by_counting(wanted[w]);
    }
    parallel_for(wanted.size(), num_workers, [&](std::size_t w, int worker) {
      keys[wanted[w].entry] = places[w]->key;
      indices[wanted[w].entry] = index_of(*places[w], wanted[w].key, scratch_[static_cast<std::size_t>(worker)]);
    });
  }

 private:
  struct Wanted {
    std::size_t key;  // which of an element's keys
    std::size_t rank;
    std::size_t entry;  // where the result goes
    Bracket bracket;
  };

  // Calls body(span number, which key, the block's keys, their number, worker) for every block.
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
          body(s, j, keys, n, worker);
        }
      }
    });
  }

  void draw_sample() {
    const std::size_t wanted = std::max(std::clamp(numel_ >> 6, kMinSample, kMaxSample), numel_ >> 11);
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
  std::vector<std::vector<SpanKeys>> scan(const std::vector<Wanted>& wanted) {
    std::vector<std::vector<SpanKeys>> scanned(wanted.size(), std::vector<SpanKeys>(spans_.size()));
    std::vector<std::size_t> which;
    for (const Wanted& each : wanted) {
      if (which.empty() || which.back() != each.key) which.push_back(each.key);
    }
    // Collecting ends where it would take too much memory; counting goes on.
    const std::size_t most_per_span = kMaxCollected / spans_.size() * 4 + kBlockNumel;
    const SparseKernels& kernel = kernels().sparse;
    for_each_block(which, [&](std::size_t s, std::size_t j, const std::uint32_t* keys, std::size_t n, int) {
      std::uint32_t found[kBlockNumel + kScanSlack];
      for (std::size_t w = 0; w < wanted.size(); ++w) {
        if (wanted[w].key != j) continue;
        SpanKeys& mine = scanned[w][s];
        const Bracket& bracket = wanted[w].bracket;
        const bool collects = mine.between.size() < most_per_span;
        const std::size_t num_found =
            kernel.scan_keys(keys, n, bracket.low, bracket.high, mine.counts, collects ? found : nullptr);
        mine.between.insert(mine.between.end(), found, found + num_found);
      }
    });
    return scanned;
  }

  // Where the element is, if its key is in the bracket, and known.
  static std::optional<Place> find_place(const Wanted& wanted, const std::vector<SpanKeys>& spans) {
    KeyCounts total;
    std::size_t collected = 0;
    for (const SpanKeys& span : spans) {
      total.above += span.counts.above;
      total.at_high += span.counts.at_high;
      total.between += span.counts.between;
      total.at_low += span.counts.at_low;
      collected += span.between.size();
    }
    if (wanted.rank < total.above) return std::nullopt;
    std::size_t left = wanted.rank - total.above;
    if (left < total.at_high) {
      return place_of(wanted.bracket.high, left, [&](std::size_t s) { return spans[s].counts.at_high; });
    }
    left -= total.at_high;
    if (left < total.between) {
      if (collected < total.between) return std::nullopt;
      return select_between(spans, collected, left);
    }
    left -= total.between;
    if (left >= total.at_low) return std::nullopt;
    return place_of(wanted.bracket.low, left, [&](std::size_t s) { return spans[s].counts.at_low; });
  }

  // Exact without a sample: the bin of the upper bits, then what it holds, or where that is too much, the key by the
  // lower bits.
  Place by_counting(Wanted wanted) {
    std::uint64_t above = 0;
    const std::size_t bin = find_bin(wanted, kLowBits, 0, above);
    wanted.bracket = {static_cast<std::uint32_t>(bin << kLowBits),
                      static_cast<std::uint32_t>((bin << kLowBits) + (std::size_t{1} << kLowBits) - 1)};
    if (const std::optional<Place> place = find_place(wanted, scan({wanted}).front())) return *place;
    const auto key =
        static_cast<std::uint32_t>(bin << kLowBits | find_bin(wanted, 0, static_cast<std::uint32_t>(bin), above));
    wanted.bracket = {key, key};
    const std::optional<Place> place = find_place(wanted, scan({wanted}).front());
    if (!place) throw InputChangedError();
    return *place;
  }

  // The bin of the key of this rank: of its upper bits (shift kLowBits), or of its lower ones (shift 0) among the keys
  // whose upper bits are `upper`. `above` grows by the number of keys in larger bins.
  std::size_t find_bin(const Wanted& wanted, int shift, std::uint32_t upper, std::uint64_t& above) {
    std::vector<std::vector<std::uint64_t>> bins(scratch_.size(), std::vector<std::uint64_t>(kNumBins));
    for_each_block({wanted.key}, [&](std::size_t, std::size_t, const std::uint32_t* keys, std::size_t n, int worker) {
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
    throw InputChangedError();  // ranks are below the number of elements, so the first count was of other keys
  }

  std::int64_t index_of(const Place& place, std::size_t j, SparseScratch& scratch) const {
    const Span& span = spans_[place.span];
    const Operand* operands = scratch.load(layer_, span);
    std::uint32_t* keys = scratch.key_buffer();
    kernels().sparse.keys(operands, layer_.num_models(), j, 0, span.first, span.numel, rule_, scratch.rows(), keys);
    std::size_t left = place.ordinal;
    for (std::size_t position = 0; position < span.numel; ++position) {
      if (keys[position] == place.key && left-- == 0) return static_cast<std::int64_t>(span.first + position);
    }
    throw InputChangedError();
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
        KeyCounts found;
        kernel.scan_keys(keys, n, 0, 0, found, nullptr);
        span_counts[item * per_element + j] += found.above;
      }
    }
  });
  std::fill_n(counts, layer.num_tensors * per_element, 0);
  for (std::size_t i = 0; i < span_counts.size(); ++i) {
    counts[spans[i / per_element].tensor * per_element + i % per_element] += static_cast<std::int64_t>(span_counts[i]);
  }
}

}  // namespace metagpt_fast::cpu
