// 512-bit vectors: AVX-512 F, BW, DQ and VL (Intel Skylake-X, AMD Zen 4 and later). AVX512-BF16 is not used: its
// conversion flushes subnormals.

struct VecF {
  using Scalar = float;
  using Reg = __m512;
  static constexpr std::size_t kLanes = 16;
  static constexpr int kNumRegs = 32;

  MF_INLINE Reg zero() { return _mm512_setzero_ps(); }
  MF_INLINE Reg broadcast(float x) { return _mm512_set1_ps(x); }
  MF_INLINE Reg load(const float* p) { return _mm512_loadu_ps(p); }
  MF_INLINE void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  MF_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  MF_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  MF_INLINE Reg max_abs(Reg a, Reg b) { return _mm512_max_ps(a, _mm512_abs_ps(b)); }
  MF_INLINE unsigned count_not_below(Reg x, Reg limit) {
    const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_abs_ps(x), limit, _CMP_NLT_UQ);
    return mask == 0 ? 0 : static_cast<unsigned>(_mm_popcnt_u32(mask));
  }

  // Of 64-bit lanes.
  template <class Lanes64>
  MF_INLINE Lanes64 multiply_low_halves(Lanes64 a, Lanes64 b) {
    return (Lanes64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
  }
  // out[2 i] = a[i], out[2 i + 1] = b[i].
  template <class Lanes64>
  MF_INLINE void store_interleaved(Lanes64 a, Lanes64 b, std::uint32_t* out) {
    const __m256i even = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
    const __m256i odd = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
  }

  // Four floats as doubles, for which GCC 12 makes four instructions of __builtin_convertvector.
  template <class Narrow, class Wide>
  MF_INLINE void widen(const Narrow& x, Wide& out) {
    out = (Wide)_mm256_cvtps_pd((__m128)x);
  }

  // Keys are below 2^31: a bit for each that is greater, or equal.
  MF_INLINE std::uint32_t greater(const std::uint32_t* keys, std::uint32_t limit) {
    return _mm512_cmpgt_epu32_mask(_mm512_loadu_si512(keys), broadcast_key(limit));
  }
  MF_INLINE std::uint32_t equal(const std::uint32_t* keys, std::uint32_t key) {
    return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(keys), broadcast_key(key));
  }
  // Writes the keys whose bits are set, and up to kLanes of anything. Returns their number.
  MF_INLINE std::size_t pack(const std::uint32_t* keys, std::uint32_t bits, std::uint32_t* out) {
    const auto mask = static_cast<__mmask16>(bits);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(keys)));
    return static_cast<std::size_t>(_mm_popcnt_u32(bits));
  }
  // A word of ones for each bit that is set.
  MF_INLINE void expand(std::uint32_t bits, std::uint32_t* out) {
    _mm512_storeu_si512(out, _mm512_movm_epi32(static_cast<__mmask16>(bits)));
  }

  template <DType kDType>
  MF_INLINE Reg load_as(const std::byte* p) {
    if constexpr (kDType == DType::kF32) return _mm512_loadu_ps(p);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (kDType == DType::kF16) return _mm512_cvtph_ps(half);
    // Element i goes to the high half of lane i, zero to the low half: one shuffle instead of a widening and a shift.
    const __m512i index = _mm512_set_epi32(0xf0000, 0xe0000, 0xd0000, 0xc0000, 0xb0000, 0xa0000, 0x90000, 0x80000,
                                           0x70000, 0x60000, 0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, index, _mm512_castsi256_si512(half)));
  }

  template <DType kDType>
  MF_INLINE void store_as(std::byte* p, Reg x) {
    if constexpr (kDType == DType::kF32) {
      _mm512_storeu_ps(p, x);
    } else if constexpr (kDType == DType::kF16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __m512i bits = _mm512_castps_si512(x);
      const __m512i last_bit = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last_bit, _mm512_set1_epi32(0x7fff)));
      const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
    }
  }

 private:
  MF_INLINE __m512i broadcast_key(std::uint32_t key) { return _mm512_set1_epi32(static_cast<int>(key)); }
};

struct VecD {
  using Scalar = double;
  using Reg = __m512d;
  static constexpr std::size_t kLanes = 8;
  static constexpr int kNumRegs = 32;

  MF_INLINE Reg zero() { return _mm512_setzero_pd(); }
  MF_INLINE Reg broadcast(double x) { return _mm512_set1_pd(x); }
  MF_INLINE Reg load(const double* p) { return _mm512_loadu_pd(p); }
  MF_INLINE void store(double* p, Reg x) { _mm512_storeu_pd(p, x); }
  MF_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  MF_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  MF_INLINE unsigned count_not_below(Reg x, Reg limit) {
    const __mmask8 mask = _mm512_cmp_pd_mask(_mm512_abs_pd(x), limit, _CMP_NLT_UQ);
    return mask == 0 ? 0 : static_cast<unsigned>(_mm_popcnt_u32(mask));
  }

  template <DType kDType>
  MF_INLINE Reg load_as(const std::byte* p) {
    if constexpr (kDType == DType::kF64) return _mm512_loadu_pd(p);
    if constexpr (kDType == DType::kF32) return _mm512_cvtps_pd(_mm256_loadu_ps(reinterpret_cast<const float*>(p)));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (kDType == DType::kF16) return _mm512_cvtps_pd(_mm256_cvtph_ps(half));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
  }

  template <DType kDType>
  MF_INLINE void store_as(std::byte* p, Reg x) {
    if constexpr (kDType == DType::kF64) {
      _mm512_storeu_pd(p, x);
    } else if constexpr (kDType == DType::kF32) {
      _mm256_storeu_ps(reinterpret_cast<float*>(p), _mm512_cvtpd_ps(x));
    } else {
      store_narrow<kDType>(p, x);
    }
  }

 private:
  template <DType kDType>
  MF_INLINE void store_narrow(std::byte* p, Reg x) {
    alignas(64) double values[kLanes];
    _mm512_store_pd(values, x);
    narrow_from_double<kDType>(values, kLanes, p);
  }
};
