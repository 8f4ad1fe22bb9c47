// 256-bit vectors: AVX2 with FMA and F16C (Intel Haswell, AMD Zen and later).

struct VecF {
  using Scalar = float;
  using Reg = __m256;
  static constexpr std::size_t kLanes = 8;
  static constexpr int kNumRegs = 16;

  MF_INLINE Reg zero() { return _mm256_setzero_ps(); }
  MF_INLINE Reg broadcast(float x) { return _mm256_set1_ps(x); }
  MF_INLINE Reg load(const float* p) { return _mm256_loadu_ps(p); }
  MF_INLINE void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  MF_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  MF_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  MF_INLINE Reg abs(Reg x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  MF_INLINE Reg max_abs(Reg a, Reg b) { return _mm256_max_ps(a, abs(b)); }
  MF_INLINE unsigned count_not_below(Reg x, Reg limit) {
    const int mask = _mm256_movemask_ps(_mm256_cmp_ps(abs(x), limit, _CMP_NLT_UQ));
    return mask == 0 ? 0 : static_cast<unsigned>(_mm_popcnt_u32(static_cast<unsigned>(mask)));
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
    return bits_of(_mm256_cmpgt_epi32(load_keys(keys), _mm256_set1_epi32(static_cast<int>(limit))));
  }
  MF_INLINE std::uint32_t equal(const std::uint32_t* keys, std::uint32_t key) {
    return bits_of(_mm256_cmpeq_epi32(load_keys(keys), _mm256_set1_epi32(static_cast<int>(key))));
  }
  // Writes the keys whose bits are set. Returns their number.
  MF_INLINE std::size_t pack(const std::uint32_t* keys, std::uint32_t bits, std::uint32_t* out) {
    return pack_one_by_one(keys, bits, out);
  }
  // A word of ones for each bit that is set.
  MF_INLINE void expand(std::uint32_t bits, std::uint32_t* out) {
    const __m256i places = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), places);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_cmpeq_epi32(set, places));
  }

  template <DType kDType>
  MF_INLINE Reg load_as(const std::byte* p) {
    if constexpr (kDType == DType::kF32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (kDType == DType::kF16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  template <DType kDType>
  MF_INLINE void store_as(std::byte* p, Reg x) {
    if constexpr (kDType == DType::kF32) {
      _mm256_storeu_ps(reinterpret_cast<float*>(p), x);
    } else if constexpr (kDType == DType::kF16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __m256i bits = _mm256_castps_si256(x);
      const __m256i last_bit = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(last_bit, _mm256_set1_epi32(0x7fff)));
      const __m256i quiet_nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
      const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
      const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet_nan, is_nan), 16);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
  }

 private:
  MF_INLINE __m256i load_keys(const std::uint32_t* keys) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys));
  }
  MF_INLINE std::uint32_t bits_of(__m256i mask) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
  }
};

struct VecD {
  using Scalar = double;
  using Reg = __m256d;
  static constexpr std::size_t kLanes = 4;
  static constexpr int kNumRegs = 16;

  MF_INLINE Reg zero() { return _mm256_setzero_pd(); }
  MF_INLINE Reg broadcast(double x) { return _mm256_set1_pd(x); }
  MF_INLINE Reg load(const double* p) { return _mm256_loadu_pd(p); }
  MF_INLINE void store(double* p, Reg x) { _mm256_storeu_pd(p, x); }
  MF_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  MF_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  MF_INLINE unsigned count_not_below(Reg x, Reg limit) {
    const Reg magnitude = _mm256_andnot_pd(_mm256_set1_pd(-0.0), x);
    const int mask = _mm256_movemask_pd(_mm256_cmp_pd(magnitude, limit, _CMP_NLT_UQ));
    return mask == 0 ? 0 : static_cast<unsigned>(_mm_popcnt_u32(static_cast<unsigned>(mask)));
  }

  template <DType kDType>
  MF_INLINE Reg load_as(const std::byte* p) {
    if constexpr (kDType == DType::kF64) return _mm256_loadu_pd(reinterpret_cast<const double*>(p));
    if constexpr (kDType == DType::kF32) return _mm256_cvtps_pd(_mm_loadu_ps(reinterpret_cast<const float*>(p)));
    const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    if constexpr (kDType == DType::kF16) return _mm256_cvtps_pd(_mm_cvtph_ps(half));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16)));
  }

  template <DType kDType>
  MF_INLINE void store_as(std::byte* p, Reg x) {
    if constexpr (kDType == DType::kF64) {
      _mm256_storeu_pd(reinterpret_cast<double*>(p), x);
    } else if constexpr (kDType == DType::kF32) {
      _mm_storeu_ps(reinterpret_cast<float*>(p), _mm256_cvtpd_ps(x));
    } else {
      store_narrow<kDType>(p, x);
    }
  }

 private:
  template <DType kDType>
  MF_INLINE void store_narrow(std::byte* p, Reg x) {
    alignas(32) double values[kLanes];
    _mm256_store_pd(values, x);
    narrow_from_double<kDType>(values, kLanes, p);
  }
};
