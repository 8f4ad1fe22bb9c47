// What layer_gram-inl.h and layer_merge-inl.h share. These texts are the algorithm, written once: every instruction
// set includes them inside its own target region and unnamed namespace, after defining VecF and VecD (vec_<isa>.h). No
// STL in here: an inline function of the library compiled in a target region could be the copy that the linker keeps
// for everybody.

template <DType kDType>
inline constexpr std::size_t kItemsize = itemsize(kDType);

// How far ahead of the arithmetic each stream is fetched. The processor's own prefetching leaves layer_gram at 90 % of
// one core's read bandwidth; with this it reaches 97 % (Zen 4, bf16, T = 3; twice the distance falls back to 83 %).
constexpr std::size_t kPrefetchNbytes = 512;
// Operands that are read in turns, a chunk each, begin the processor's prefetching anew every time. So they are fetched
// from farther ahead, and into L2, which waits for more lines at a time than L1 does: layer_gram of eight models in F32
// reads 16 to 18 GB/s instead of 12 on one core (Zen 4).
constexpr std::size_t kPrefetchInTurnsNbytes = 2048;

template <bool kInTurns>
MF_INLINE void prefetch_ahead(const std::byte* p) {
  if constexpr (kInTurns) {
    __builtin_prefetch(p + kPrefetchInTurnsNbytes, 0, 2);
  } else {
    __builtin_prefetch(p + kPrefetchNbytes);
  }
}

// Calls body(i, x) with the vector x = src[i .. i+kLanes) for ascending i; the last one is padded with zeros.
// With kInTurns it fetches what is read when the operand's turn comes again.
template <class Vec, DType kDType, bool kInTurns, class Body>
MF_INLINE void for_each_vector(const std::byte* src, std::size_t n, Body body) {
  std::size_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) {
    if constexpr (kInTurns) prefetch_ahead<true>(src + i * kItemsize<kDType>);
    body(i, Vec::template load_as<kDType>(src + i * kItemsize<kDType>));
  }
  if (i < n) {
    alignas(64) std::byte tail[Vec::kLanes * sizeof(double)] = {};
    __builtin_memcpy(tail, src + i * kItemsize<kDType>, (n - i) * kItemsize<kDType>);
    body(i, Vec::template load_as<kDType>(tail));
  }
}

template <class Vec, bool kInTurns = false, class Body>
MF_INLINE void for_each_vector(Operand operand, std::size_t first, std::size_t n, Body body) {
  const std::byte* src = operand.data + first * itemsize(operand.dtype);
  switch (operand.dtype) {
    case DType::kF32:
      return for_each_vector<Vec, DType::kF32, kInTurns>(src, n, body);
    case DType::kF16:
      return for_each_vector<Vec, DType::kF16, kInTurns>(src, n, body);
    case DType::kBF16:
      return for_each_vector<Vec, DType::kBF16, kInTurns>(src, n, body);
    case DType::kF64:
      // Only fp64 arithmetic meets F64 operands; the fp32 instance of this case would be dead code.
      if constexpr (sizeof(typename Vec::Scalar) == 8) return for_each_vector<Vec, DType::kF64, kInTurns>(src, n, body);
      return;
  }
}

constexpr std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr std::size_t min_size(std::size_t a, std::size_t b) { return a < b ? a : b; }

MF_INLINE bool any_f64(const Operand* operands, std::size_t num_operands) {
  for (std::size_t i = 0; i < num_operands; ++i) {
    if (operands[i].dtype == DType::kF64) return true;
  }
  return false;
}

MF_INLINE bool same_dtypes(const Operand* operands, std::size_t num_operands) {
  for (std::size_t i = 1; i < num_operands; ++i) {
    if (operands[i].dtype != operands[0].dtype) return false;
  }
  return true;
}
