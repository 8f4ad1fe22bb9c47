// DELLA's masks: the probability to be kept depends on the rank within the row (Deep et al., arXiv 2406.11617). Few
// ranks are needed: a random number outside the probabilities of all ranks settles an element, most others settle by
// the ranks that elements with nearly the same key have. What remains is counted, or where it is much, sorted.

// Bins of keys: equal steps of the key's bits over kBinnedBits below the row's largest key, that is eight octaves;
// smaller keys share the first bin.
constexpr std::size_t kMostBins = 4096;
constexpr int kBinnedBits = 26;
// Rows of fewer elements do without bins.
constexpr std::size_t kLeastBinned = 64;
// At most so many ranks in a row are counted one by one.
constexpr std::size_t kMostCounted = 16;
// Limits are off by at most this, in units of 2^-32.
constexpr std::uint64_t kLimitError = 4;

// P(r), the probability of rank r in units of 2^-32.
MF_INLINE std::uint64_t probability_of_rank(const MaskRule& rule, std::size_t rank, std::size_t columns) {
  const auto low = static_cast<double>(rule.probabilities[0]);
  const auto high = static_cast<double>(rule.probabilities[1]);
  const auto last = static_cast<double>(columns > 1 ? columns - 1 : 1);
  return static_cast<std::uint64_t>(low + (high - low) * (static_cast<double>(rank) / last));
}

MF_INLINE std::uint32_t saturated(std::uint64_t x) { return x < 0xffffffffu ? static_cast<std::uint32_t>(x) : ~0u; }

struct Bins {
  std::uint32_t floor = 0;
  int shift = 0;
  std::size_t num = 1;
  std::uint32_t starts[kMostBins + 1];  // ranks: bin b holds [starts[b], starts[b + 1])
  // Numbers below keep_below[b] keep what is in bin b, those above drop_above[b] drop it.
  struct {
    std::uint32_t keep_below, drop_above;
  } limits[kMostBins];

  MF_INLINE std::size_t of(std::uint32_t key, std::uint32_t floor, int shift) {
    return ((key > floor ? key : floor) - floor) >> shift;
  }
  std::size_t bin_of(std::uint32_t key) const { return of(key, floor, shift); }
};

MF_NOINLINE void count_bins(const std::uint32_t* keys, std::size_t columns, Bins& bins) {
  std::uint32_t largest = 0;
  for (std::size_t e = 0; e < columns; ++e) largest = keys[e] > largest ? keys[e] : largest;
  constexpr std::uint32_t kRange = (std::uint32_t{1} << kBinnedBits) - 1;
  const std::uint32_t floor = largest > kRange ? largest - kRange : 0;
  int shift = kBinnedBits - 6;
  while (((kRange >> shift) + 1) * 2 < columns && (kRange >> shift) + 1 < kMostBins) --shift;
  bins.floor = floor;
  bins.shift = shift;
  bins.num = (kRange >> shift) + 1;
  // Two counts per bin: an equal neighbour's would be waited for.
  std::uint32_t counts[2][kMostBins];
  for (std::size_t b = 0; b < bins.num; ++b) counts[0][b] = counts[1][b] = 0;
  std::size_t e = 0;
  for (; e + 2 <= columns; e += 2) {
    ++counts[0][Bins::of(keys[e], floor, shift)];
    ++counts[1][Bins::of(keys[e + 1], floor, shift)];
  }
  if (e < columns) ++counts[0][Bins::of(keys[e], floor, shift)];
  std::uint32_t total = 0;
  for (std::size_t b = 0; b < bins.num; ++b) {
    bins.starts[b] = total;
    total += counts[0][b] + counts[1][b];
  }
  bins.starts[bins.num] = total;
}

// The limits of all bins, in integers: the slope has 32 significant bits. They hold for rising probabilities; where
// these fall, nothing settles by its bin.
MF_NOINLINE void find_limits(const MaskRule& rule, std::size_t columns, Bins& bins) {
  const std::uint64_t low = rule.probabilities[0];
  if (rule.probabilities[1] < low) {
    for (std::size_t b = 0; b < bins.num; ++b) bins.limits[b] = {0, ~0u};
    return;
  }
  const std::uint64_t rise = rule.probabilities[1] - low;
  const std::uint64_t last = columns > 1 ? columns - 1 : 1;
  int shift = 0;
  while (shift < 31 && (rise << (shift + 1)) / last < std::uint64_t{1} << 32) ++shift;
  const std::uint64_t slope = (rise << shift) / last;
  for (std::size_t b = 0; b < bins.num; ++b) {
    const std::uint64_t least = low + (bins.starts[b] * slope >> shift);
    const std::uint64_t most = low + ((bins.starts[b + 1] - std::uint64_t{1}) * slope >> shift);
    bins.limits[b].keep_below = saturated(least > kLimitError ? least - kLimitError : 0);
    // Nobody asks for an empty bin's.
    bins.limits[b].drop_above = saturated(most + kLimitError);
  }
}

// The number of elements of the row before element `index` in ascending order of key and index.
MF_NOINLINE std::size_t count_rank(const std::uint32_t* keys, std::size_t columns, std::size_t index) {
  const std::uint32_t key = keys[index];
  std::size_t rank = 0;
  for (std::size_t begin = 0; begin < columns; begin += std::size_t{1} << 30) {
    std::uint32_t count = 0;
    const std::size_t end = min_size(columns, begin + (std::size_t{1} << 30));
    const std::size_t split = index < begin ? begin : min_size(index, end);
    for (std::size_t e = begin; e < split; ++e) count += keys[e] <= key;
    for (std::size_t e = split; e < end; ++e) count += keys[e] < key;
    rank += count;
  }
  return rank;
}

// Sorts items = key and index, which are in the order of their indices.
MF_NOINLINE void sort_items(std::uint64_t* items, std::size_t n, std::uint64_t* buffer) {
  bool is_sorted = true;
  for (std::size_t i = 1; i < n; ++i) is_sorted = is_sorted & (items[i - 1] < items[i]);
  if (is_sorted) return;
  if (n <= 32) {
    for (std::size_t i = 1; i < n; ++i) {
      const std::uint64_t item = items[i];
      std::size_t to = i;
      for (; to > 0 && items[to - 1] > item; --to) items[to] = items[to - 1];
      items[to] = item;
    }
    return;
  }
  std::uint64_t* from = items;
  std::uint64_t* to = buffer;
  for (int shift = 32; shift < 64; shift += 8) {
    std::size_t starts[256] = {};
    for (std::size_t i = 0; i < n; ++i) ++starts[from[i] >> shift & 255];
    if (starts[from[0] >> shift & 255] == n) continue;
    std::size_t total = 0;
    for (std::size_t& start : starts) {
      const std::size_t count = start;
      start = total;
      total += count;
    }
    for (std::size_t i = 0; i < n; ++i) to[starts[from[i] >> shift & 255]++] = from[i];
    std::uint64_t* swapped = from;
    from = to;
    to = swapped;
  }
  if (from != items) __builtin_memcpy(items, from, n * sizeof(std::uint64_t));
}

// Elements whose ranks are not known: the index in the row and the random number.
struct Pending {
  std::uint64_t* items;
  std::size_t num = 0;

  MF_INLINE std::size_t index(std::uint64_t item) { return item & 0xffffffffu; }
  MF_INLINE std::uint32_t number(std::uint64_t item) { return static_cast<std::uint32_t>(item >> 32); }
};

// Calls keep(index) for pending elements that are kept, after sorting the bins they are in.
template <class Keep>
MF_INLINE void settle_by_sorting(const std::uint32_t* keys, std::size_t columns, const Bins& bins, const MaskRule& rule,
                                 const Pending& pending, const RankScratch& scratch, Keep keep) {
  std::uint32_t ends[kMostBins];
  bool is_sorted[kMostBins];
  for (std::size_t b = 0; b < bins.num; ++b) {
    ends[b] = bins.starts[b];
    is_sorted[b] = false;
  }
  // All bins, wanted or not: no branch to mispredict.
  std::uint64_t* items = scratch.order[0];
  const std::uint32_t floor = bins.floor;
  const int shift = bins.shift;
  for (std::size_t e = 0; e < columns; ++e) {
    items[ends[Bins::of(keys[e], floor, shift)]++] = std::uint64_t{keys[e]} << 32 | e;
  }
  for (std::size_t i = 0; i < pending.num; ++i) {
    const std::size_t index = Pending::index(pending.items[i]);
    const std::uint64_t item = std::uint64_t{keys[index]} << 32 | index;
    const std::size_t b = bins.bin_of(keys[index]);
    std::size_t rank = bins.starts[b];
    if (!is_sorted[b]) sort_items(items + rank, bins.starts[b + 1] - rank, scratch.order[1]);
    is_sorted[b] = true;
    for (std::size_t length = bins.starts[b + 1] - rank; length > 1;) {
      const std::size_t half = length / 2;
      rank += items[rank + half] <= item ? half : 0;
      length -= half;
    }
    if (Pending::number(pending.items[i]) < probability_of_rank(rule, rank, columns)) keep(index);
  }
}

// Bit i of the result: flags[i], 0 or 1, of 64.
MF_INLINE std::uint64_t pack_flags(const std::uint8_t* flags) {
  std::uint64_t packed = 0;
  for (int i = 0; i < 8; ++i) {
    std::uint64_t eight = 0;
    for (int j = 0; j < 8; ++j) eight |= std::uint64_t{flags[8 * i + j]} << (8 * j);
    packed |= (eight * 0x0102040810204080u >> 56) << (8 * i);
  }
  return packed;
}

// Sets bits [position, position + 64) where the word has them; past the last bit it has none.
MF_INLINE void set_bits(std::uint64_t* bits, std::size_t position, std::uint64_t word) {
  bits[position / 64] |= word << (position % 64);
  const std::uint64_t rest = word >> 1 >> (63 - position % 64);
  if (rest != 0) bits[position / 64 + 1] |= rest;
}

// Which elements are certain to be kept, and which depend on their ranks: words of 64, for n <= kChunkNumel numbers.
MF_NOINLINE void classify(const std::uint32_t* numbers, std::size_t n, const MaskRule& rule, std::uint64_t* kept,
                          std::uint64_t* unknown) {
  const std::uint64_t first = rule.probabilities[0];
  const std::uint64_t last = rule.probabilities[1];
  // Numbers that equal the largest probability are left to the ranks, because 2^32 is no 32-bit number.
  const std::uint32_t low = saturated(first < last ? first : last);
  const std::uint32_t high = saturated(first < last ? last : first);
  alignas(64) std::uint8_t flags[2][kChunkNumel];
  for (std::size_t e = 0; e < n; ++e) flags[0][e] = numbers[e] < low;
  for (std::size_t e = 0; e < n; ++e) flags[1][e] = numbers[e] >= low && numbers[e] <= high;
  for (std::size_t e = n; e < round_up(n, 64); ++e) flags[0][e] = flags[1][e] = 0;
  for (std::size_t word = 0; word < (n + 63) / 64; ++word) {
    kept[word] = pack_flags(flags[0] + 64 * word);
    unknown[word] = pack_flags(flags[1] + 64 * word);
  }
}

// Bits of elements [begin, end) of the tensor, bit 0 being element `origin`. The row begins at element `row`.
MF_INLINE void ranked_row(const std::uint32_t* keys, std::size_t columns, std::size_t row, std::size_t begin,
                          std::size_t end, const MaskRule& rule, const Bins* bins, const RankScratch& scratch,
                          std::size_t origin, std::uint64_t* bits) {
  Pending pending{scratch.pending};
  const auto keep = [=](std::size_t index) {
    const std::size_t position = row + index - origin;
    bits[position / 64] |= std::uint64_t{1} << (position % 64);
  };
  for (std::size_t element = begin; element < end;) {
    alignas(64) std::uint32_t numbers[kChunkNumel];
    std::uint64_t kept[kChunkNumel / 64];
    std::uint64_t unknown[kChunkNumel / 64];
    const std::size_t skipped = element % 4;
    const std::size_t n = min_size(kChunkNumel - skipped, end - element);
    random_numbers(rule.stream, element / 4, (skipped + n + 3) / 4, numbers);
    classify(numbers + skipped, n, rule, kept, unknown);
    for (std::size_t word = 0; word < (n + 63) / 64; ++word) {
      for (std::uint64_t left = unknown[word]; left != 0; left &= left - 1) {
        const auto bit = static_cast<std::size_t>(__builtin_ctzll(left));
        const std::uint32_t number = numbers[skipped + 64 * word + bit];
        const std::size_t index = element + 64 * word + bit - row;
        std::uint32_t keep_below = 0;
        std::uint32_t drop_above = ~0u;
        if (bins != nullptr) {
          const auto& limits = bins->limits[bins->bin_of(keys[index])];
          keep_below = limits.keep_below;
          drop_above = limits.drop_above;
        }
        kept[word] |= std::uint64_t{number < keep_below} << bit;
        scratch.pending[pending.num] = std::uint64_t{number} << 32 | index;
        pending.num += (number >= keep_below) & (number <= drop_above);
      }
      set_bits(bits, element + 64 * word - origin, kept[word]);
    }
    element += n;
  }
  if (bins != nullptr && pending.num > kMostCounted) {
    return settle_by_sorting(keys, columns, *bins, rule, pending, scratch, keep);
  }
  for (std::size_t i = 0; i < pending.num; ++i) {
    const std::size_t index = Pending::index(pending.items[i]);
    const std::size_t rank = count_rank(keys, columns, index);
    if (Pending::number(pending.items[i]) < probability_of_rank(rule, rank, columns)) keep(index);
  }
}

void ranked_span(const Operand* operands, std::size_t num_models, std::size_t model, std::size_t loaded_first,
                 std::size_t first, std::size_t numel, const KeyRule& key, const MaskRule& mask, const SparseRows& rows,
                 const RankScratch& scratch, std::uint64_t* bits) {
  const std::size_t columns = key.columns;
  const std::size_t end = first + numel;
  for (std::size_t word = 0; word < (numel + 63) / 64; ++word) bits[word] = 0;
  const bool is_binned = columns >= kLeastBinned;
  // Short rows share a chunk of keys.
  const std::size_t step = is_binned ? columns : kChunkNumel / columns * columns;
  Bins bins;
  for (std::size_t begin = loaded_first; begin < end; begin += step) {
    const std::size_t step_end = min_size(begin + step, (end + columns - 1) / columns * columns);
    keys_span(operands, num_models, model, begin - loaded_first, begin, step_end - begin, key, rows, scratch.keys);
    if (is_binned) {
      count_bins(scratch.keys, columns, bins);
      find_limits(mask, columns, bins);
    }
    for (std::size_t row = begin; row < step_end; row += columns) {
      ranked_row(scratch.keys + (row - begin), columns, row, row > first ? row : first, min_size(row + columns, end),
                 mask, is_binned ? &bins : nullptr, scratch, first, bits);
    }
  }
}
