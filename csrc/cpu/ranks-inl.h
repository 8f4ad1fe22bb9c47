// DELLA's masks: the probability to be kept depends on the rank within the row (Deep et al., arXiv 2406.11617). A row
// is counted into bins of keys. Where all keys of a bin are equal, as they are in 16-bit models, elements take their
// ranks as they come; elsewhere the bin's first and last rank settle nearly all, and what remains is counted or sorted.

// Bins: zero, what is too small, and equal steps of the key's bits over kBinnedBits, that is eight octaves, below the
// row's largest key. 256 or 512 steps an octave tell differences of bf16 numbers apart.
constexpr int kBinnedBits = 26;
constexpr int kFineShift = 14;
constexpr int kCoarseShift = 15;
constexpr std::size_t kMostBins = (std::size_t{1} << (kBinnedBits - kFineShift)) + 3;
constexpr std::size_t kRoomForBins = (kMostBins / kWide + 1) * kWide;
constexpr std::uint16_t kOddCode = 0x8000;
// Rows of fewer elements are one bin.
constexpr std::size_t kLeastBinned = 64;
// At least so many elements are worth the finer bins.
constexpr std::size_t kLeastFine = 8192;
// At most so many ranks in a row are counted one by one.
constexpr std::size_t kMostCounted = 16;

// P(r), the probability of rank r in units of 2^-32; 2^32 itself becomes 2^32 − 1.
MF_INLINE std::uint32_t probability_of_rank(const MaskRule& rule, std::size_t rank, std::size_t columns) {
  const auto low = static_cast<double>(rule.probabilities[0]);
  const auto high = static_cast<double>(rule.probabilities[1]);
  const auto last = static_cast<double>(columns > 1 ? columns - 1 : 1);
  const auto probability = static_cast<std::uint64_t>(low + (high - low) * (static_cast<double>(rank) / last));
  return probability < 0xffffffffu ? static_cast<std::uint32_t>(probability) : ~0u;
}

struct Bins {
  struct Bin {
    std::uint32_t rank;  // of the next element, where keys are equal; else the rank with the least probability
    std::int32_t reach;  // from there to the rank with the largest probability
  };
  std::size_t num;
  std::uint32_t starts[kRoomForBins + 1];  // ranks: bin b holds [starts[b], starts[b + 1])
  Bin bins[kRoomForBins];
};

MF_INLINE std::size_t bin_of(std::uint16_t code) { return code & (kOddCode - 1u); }

// codes[e] = the bin of keys[e], and kOddCode if the bin may hold other keys too. Returns the number of bins.
MF_NOINLINE std::size_t code_keys(const std::uint32_t* keys, std::size_t columns, std::uint16_t* codes) {
  std::uint32_t largest = 0;
  for (std::size_t e = 0; e < columns; ++e) largest = keys[e] > largest ? keys[e] : largest;
  const int shift = columns < kLeastFine ? kCoarseShift : kFineShift;
  const std::int32_t low_bits = (std::int32_t{1} << shift) - 1;
  constexpr std::uint32_t kRange = (std::uint32_t{1} << kBinnedBits) - 1;
  const auto floor = static_cast<std::int32_t>((largest > kRange ? largest - kRange : 0)) & ~low_bits;
  for (std::size_t e = 0; e < columns; ++e) {
    const auto key = static_cast<std::int32_t>(keys[e]);
    const std::int32_t step = ((key - floor) >> shift) + 2;
    const std::int32_t small = key == 0 ? 0 : 1 | kOddCode;
    const std::int32_t large = (key & low_bits) != 0 ? step | kOddCode : step;
    codes[e] = static_cast<std::uint16_t>(key == 0 || key < floor ? small : large);
  }
  return static_cast<std::size_t>((static_cast<std::int32_t>(largest) - floor) >> shift) + 3;
}

// Turns the counts of bins, elements in the low half of Word and those with kOddCode in the high half, into ranks.
template <class Word>
MF_INLINE void enter_bins(const Word* counts, bool is_rising, Bins& bins) {
  constexpr int kHalf = sizeof(Word) * 4;
  std::uint32_t total = 0;
  for (std::size_t b = 0; b < bins.num; ++b) {
    const auto held = static_cast<std::uint32_t>(counts[b] & ((Word{1} << kHalf) - 1));
    const std::int32_t reach = counts[b] >> kHalf != 0 ? static_cast<std::int32_t>(held) - 1 : 0;
    bins.starts[b] = total;
    bins.bins[b] = is_rising ? Bins::Bin{total, reach} : Bins::Bin{total + static_cast<std::uint32_t>(reach), -reach};
    total += held;
  }
  bins.starts[bins.num] = total;
}

// Eight bins at a time: sums over their predecessors in three steps.
MF_INLINE void enter_bins_by_eight(const std::uint32_t* counts, bool is_rising, Bins& bins) {
  const I32x8 zero = {};
  const I32x8 sign = zero + (is_rising ? 1 : -1);
  const I32x8 falls = zero - (is_rising ? 0 : 1);
  I32x8 before = zero;
  for (std::size_t b = 0; b < bins.num; b += kWide) {
    I32x8 both;
    load_wide(counts + b, both);
    const I32x8 held = both & 0xffff;
    const I32x8 reach = (held - 1) & ((both & ~0xffff) != zero);
    I32x8 sum = held + MF_SHUFFLE(held, zero, 8, 0, 1, 2, 3, 4, 5, 6);
    sum += MF_SHUFFLE(sum, zero, 8, 9, 0, 1, 2, 3, 4, 5);
    sum += MF_SHUFFLE(sum, zero, 8, 9, 10, 11, 0, 1, 2, 3);
    const I32x8 start = before + sum - held;
    before += MF_SHUFFLE(sum, zero, 7, 7, 7, 7, 7, 7, 7, 7);
    const I32x8 rank = start + (reach & falls);
    const I32x8 signed_reach = reach * sign;
    store_wide(bins.starts + b, start);
    store_wide(bins.bins + b, MF_SHUFFLE(rank, signed_reach, 0, 8, 1, 9, 2, 10, 3, 11));
    store_wide(bins.bins + b + kWide / 2, MF_SHUFFLE(rank, signed_reach, 4, 12, 5, 13, 6, 14, 7, 15));
  }
  bins.starts[round_up(bins.num, kWide)] = static_cast<std::uint32_t>(before[0]);
}

template <class Word>
MF_NOINLINE void count_bins(const std::uint16_t* codes, std::size_t columns, bool is_rising, Bins& bins) {
  constexpr int kHalf = sizeof(Word) * 4;
  // Two counts per bin: an equal neighbour's would be waited for.
  Word counts[2][kRoomForBins];
  const std::size_t num_words = round_up(bins.num, kWide);
  for (std::size_t b = 0; b < num_words; ++b) counts[0][b] = counts[1][b] = 0;
  const auto count = [](std::uint16_t code) { return Word{1} + (static_cast<Word>(code >> 15) << kHalf); };
  std::size_t e = 0;
  for (; e + 2 <= columns; e += 2) {
    counts[0][bin_of(codes[e])] += count(codes[e]);
    counts[1][bin_of(codes[e + 1])] += count(codes[e + 1]);
  }
  if (e < columns) counts[0][bin_of(codes[e])] += count(codes[e]);
  for (std::size_t b = 0; b < num_words; ++b) counts[0][b] += counts[1][b];
  if constexpr (sizeof(Word) == 4 && VecF::kLanes >= kWide) {
    enter_bins_by_eight(counts[0], is_rising, bins);
  } else {
    enter_bins(counts[0], is_rising, bins);
  }
}

// Gets a row ready: its codes and bins.
MF_INLINE void sort_into_bins(const std::uint32_t* keys, std::size_t columns, bool is_rising, std::uint16_t* codes,
                              Bins& bins) {
  if (columns < kLeastBinned) {
    for (std::size_t e = 0; e < columns; ++e) codes[e] = 0;
    const auto reach = static_cast<std::int32_t>(columns) - 1;
    bins.num = 1;
    bins.starts[0] = 0;
    bins.starts[1] = static_cast<std::uint32_t>(columns);
    bins.bins[0] = is_rising ? Bins::Bin{0, reach} : Bins::Bin{static_cast<std::uint32_t>(reach), -reach};
    return;
  }
  bins.num = code_keys(keys, columns, codes);
  const auto count = columns < std::size_t{1} << 16 ? count_bins<std::uint32_t> : count_bins<std::uint64_t>;
  count(codes, columns, is_rising, bins);
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
MF_INLINE void settle_by_sorting(const std::uint32_t* keys, std::size_t columns, const Bins& bins,
                                 const Pending& pending, const RankScratch& scratch, Keep keep) {
  std::uint32_t ends[kMostBins];
  bool is_sorted[kMostBins];
  for (std::size_t b = 0; b < bins.num; ++b) {
    ends[b] = bins.starts[b];
    is_sorted[b] = false;
  }
  // All bins, wanted or not: no branch to mispredict.
  std::uint64_t* items = scratch.order[0];
  for (std::size_t e = 0; e < columns; ++e) items[ends[bin_of(scratch.codes[e])]++] = std::uint64_t{keys[e]} << 32 | e;
  for (std::size_t i = 0; i < pending.num; ++i) {
    const std::size_t index = Pending::index(pending.items[i]);
    const std::uint64_t item = std::uint64_t{keys[index]} << 32 | index;
    const std::size_t b = bin_of(scratch.codes[index]);
    std::size_t rank = bins.starts[b];
    if (!is_sorted[b]) sort_items(items + rank, bins.starts[b + 1] - rank, scratch.order[1]);
    is_sorted[b] = true;
    for (std::size_t length = bins.starts[b + 1] - rank; length > 1;) {
      const std::size_t half = length / 2;
      rank += items[rank + half] <= item ? half : 0;
      length -= half;
    }
    if (Pending::number(pending.items[i]) < scratch.limits[rank]) keep(index);
  }
}

// Sets bits [position, position + 64) where the word has them; past the last bit it has none.
MF_INLINE void set_bits(std::uint64_t* bits, std::size_t position, std::uint64_t word) {
  bits[position / 64] |= word << (position % 64);
  const std::uint64_t rest = word >> 1 >> (63 - position % 64);
  if (rest != 0) bits[position / 64 + 1] |= rest;
}

// Takes the ranks of elements [begin, end) of the row, and leaves out what is kept of them.
MF_NOINLINE void skip_elements(const std::uint16_t* codes, std::size_t begin, std::size_t end, Bins& bins) {
  for (std::size_t e = begin; e < end; ++e) {
    Bins::Bin& bin = bins.bins[bin_of(codes[e])];
    bin.rank += bin.reach == 0;
  }
}

// Bit i of the result: whether element begin + i is kept, for n <= 64 elements of the row; unknown ones become pending.
MF_INLINE std::uint64_t rank_elements(const std::uint16_t* codes, const std::uint32_t* numbers, std::size_t begin,
                                      std::size_t n, const std::uint32_t* limits, Bins& bins, Pending& pending) {
  std::uint64_t kept = 0;
  for (std::size_t i = 0; i < n; ++i) {
    Bins::Bin& bin = bins.bins[bin_of(codes[begin + i])];
    const std::uint32_t rank = bin.rank;
    const std::int32_t reach = bin.reach;
    bin.rank = rank + (reach == 0);
    const std::uint32_t number = numbers[i];
    const bool is_kept = number < limits[rank];
    const bool is_below = number < limits[static_cast<std::int64_t>(rank) + reach];
    kept |= std::uint64_t{is_kept} << i;
    pending.items[pending.num] = std::uint64_t{number} << 32 | (begin + i);
    pending.num += is_below && !is_kept;
  }
  return kept;
}

void ranked_span(const Operand* operands, std::size_t num_models, std::size_t model, std::size_t loaded_first,
                 std::size_t first, std::size_t numel, const KeyRule& key, const MaskRule& mask, const SparseRows& rows,
                 const RankScratch& scratch, std::uint64_t* bits) {
  const std::size_t columns = key.columns;
  const std::size_t end = first + numel;
  const bool is_rising = mask.probabilities[0] <= mask.probabilities[1];
  for (std::size_t word = 0; word < (numel + 63) / 64; ++word) bits[word] = 0;
  for (std::size_t r = 0; r < columns; ++r) scratch.limits[r] = probability_of_rank(mask, r, columns);
  // Short rows share a chunk of keys and numbers.
  const std::size_t step = columns < kChunkNumel ? kChunkNumel / columns * columns : columns;
  Bins bins;
  for (std::size_t begin = loaded_first; begin < end; begin += step) {
    const std::size_t step_end = min_size(begin + step, (end + columns - 1) / columns * columns);
    keys_span(operands, num_models, model, begin - loaded_first, begin, step_end - begin, key, rows, scratch.keys);
    // Numbers of elements [numbers_first, numbers_end), which begins at a multiple of 4.
    alignas(64) std::uint32_t numbers[kChunkNumel + 64];
    std::size_t numbers_first = 0;
    std::size_t numbers_end = 0;
    for (std::size_t row = begin; row < step_end; row += columns) {
      const std::size_t row_begin = row > first ? row : first;
      const std::size_t row_end = min_size(row + columns, end);
      if (row_begin >= row_end) continue;
      const std::uint32_t* row_keys = scratch.keys + (row - begin);
      Pending pending{scratch.pending};
      sort_into_bins(row_keys, columns, is_rising, scratch.codes, bins);
      skip_elements(scratch.codes, 0, row_begin - row, bins);
      for (std::size_t element = row_begin; element < row_end;) {
        if (element >= numbers_end) {
          numbers_first = element / 4 * 4;
          numbers_end = min_size(numbers_first + kChunkNumel, min_size(step_end, end));
          random_numbers(mask.stream, numbers_first / 4, (numbers_end - numbers_first + 3) / 4, numbers);
        }
        const std::size_t n = min_size(64, min_size(row_end, numbers_end) - element);
        const std::uint64_t kept = rank_elements(scratch.codes, numbers + (element - numbers_first), element - row, n,
                                                 scratch.limits, bins, pending);
        set_bits(bits, element - first, kept);
        element += n;
      }
      const auto keep = [=](std::size_t index) {
        const std::size_t position = row + index - first;
        bits[position / 64] |= std::uint64_t{1} << (position % 64);
      };
      if (pending.num > kMostCounted) {
        settle_by_sorting(row_keys, columns, bins, pending, scratch, keep);
        continue;
      }
      for (std::size_t i = 0; i < pending.num; ++i) {
        const std::size_t index = Pending::index(pending.items[i]);
        const std::size_t rank = count_rank(row_keys, columns, index);
        if (Pending::number(pending.items[i]) < scratch.limits[rank]) keep(index);
      }
    }
  }
}
