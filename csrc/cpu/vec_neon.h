// 128-bit vectors: Advanced SIMD of every 64-bit Arm processor.

struct VecF {
  using Scalar = float;
  using Reg = float32x4_t;
  static constexpr std::size_t kLanes = 4;
  static constexpr int kNumRegs = 32;

  MF_INLINE Reg zero() { return vdupq_n_f32(0); }
  MF_INLINE Reg broadcast(float x) { return vdupq_n_f32(x); }
  MF_INLINE Reg load(const float* p) { return vld1q_f32(p); }
  MF_INLINE void store(float* p, Reg x) { vst1q_f32(p, x); }
  MF_INLINE Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  MF_INLINE Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  MF_INLINE Reg max_abs(Reg a, Reg b) { return vmaxq_f32(a, vabsq_f32(b)); }
  MF_INLINE unsigned count_not_below(Reg x, Reg limit) {
    return kLanes - vaddvq_u32(vshrq_n_u32(vcltq_f32(vabsq_f32(x), limit), 31));
  }

  // Four floats as doubles.
  template <class Narrow, class Wide>
  MF_INLINE void widen(const Narrow& x, Wide& out) {
    out = __builtin_convertvector(x, Wide);
  }

  // Keys are below 2^31: a bit for each that is greater, or equal.
  MF_INLINE std::uint32_t greater(const std::uint32_t* keys, std::uint32_t limit) {
    return bits_of(vcgtq_u32(vld1q_u32(keys), vdupq_n_u32(limit)));
  }
  MF_INLINE std::uint32_t equal(const std::uint32_t* keys, std::uint32_t key) {
    return bits_of(vceqq_u32(vld1q_u32(keys), vdupq_n_u32(key)));
  }
  // Writes the keys whose bits are set. Returns their number.
  MF_INLINE std::size_t pack(const std::uint32_t* keys, std::uint32_t bits, std::uint32_t* out) {
    return pack_one_by_one(keys, bits, out);
  }
  // A word of ones for each bit that is set.
  MF_INLINE void expand(std::uint32_t bits, std::uint32_t* out) {
    const uint32x4_t places = {1, 2, 4, 8};
    vst1q_u32(out, vtstq_u32(vdupq_n_u32(bits), places));
  }

  template <DType kDType>
  MF_INLINE Reg load_as(const std::byte* p) {
    Reg x;
    if constexpr (kDType == DType::kF32) {
      __builtin_memcpy(&x, p, sizeof(x));
      return x;
    }
    uint16x4_t half;
    __builtin_memcpy(&half, p, sizeof(half));
    if constexpr (kDType == DType::kF16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  }

  template <DType kDType>
  MF_INLINE void store_as(std::byte* p, Reg x) {
    if constexpr (kDType == DType::kF32) {
      __builtin_memcpy(p, &x, sizeof(x));
    } else if constexpr (kDType == DType::kF16) {
      const float16x4_t half = vcvt_f16_f32(x);
      __builtin_memcpy(p, &half, sizeof(half));
    } else {
      const uint32x4_t bits = vreinterpretq_u32_f32(x);
      const uint32x4_t last_bit = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(last_bit, vdupq_n_u32(0x7fff)));
      const uint32x4_t quiet_nan = vorrq_u32(bits, vdupq_n_u32(0x400000));
      const uint16x4_t half = vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet_nan), 16);
      __builtin_memcpy(p, &half, sizeof(half));
    }
  }

 private:
  MF_INLINE std::uint32_t bits_of(uint32x4_t mask) {
    const uint32x4_t places = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(mask, places));
  }
};

struct VecD {
  using Scalar = double;
  using Reg = float64x2_t;
  static constexpr std::size_t kLanes = 2;
  static constexpr int kNumRegs = 32;

  MF_INLINE Reg zero() { return vdupq_n_f64(0); }
  MF_INLINE Reg broadcast(double x) { return vdupq_n_f64(x); }
  MF_INLINE Reg load(const double* p) { return vld1q_f64(p); }
  MF_INLINE void store(double* p, Reg x) { vst1q_f64(p, x); }
  MF_INLINE Reg sub(Reg a, Reg b) { return vsubq_f64(a, b); }
  MF_INLINE Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f64(c, a, b); }
  MF_INLINE unsigned count_not_below(Reg x, Reg limit) {
    return kLanes - static_cast<unsigned>(vaddvq_u64(vshrq_n_u64(vcltq_f64(vabsq_f64(x), limit), 63)));
  }

  template <DType kDType>
  MF_INLINE Reg load_as(const std::byte* p) {
    if constexpr (kDType == DType::kF64) {
      Reg x;
      __builtin_memcpy(&x, p, sizeof(x));
      return x;
    } else if constexpr (kDType == DType::kF32) {
      float32x2_t x;
      __builtin_memcpy(&x, p, sizeof(x));
      return vcvt_f64_f32(x);
    } else {
      std::uint16_t bits[4] = {};
      __builtin_memcpy(bits, p, 2 * sizeof(bits[0]));
      const uint16x4_t half = vld1_u16(bits);
      if constexpr (kDType == DType::kF16) {
        return vcvt_f64_f32(vget_low_f32(vcvt_f32_f16(vreinterpret_f16_u16(half))));
      } else {
        return vcvt_f64_f32(vget_low_f32(vreinterpretq_f32_u32(vshll_n_u16(half, 16))));
      }
    }
  }

  template <DType kDType>
  MF_INLINE void store_as(std::byte* p, Reg x) {
    if constexpr (kDType == DType::kF64) {
      __builtin_memcpy(p, &x, sizeof(x));
    } else if constexpr (kDType == DType::kF32) {
      const float32x2_t narrow = vcvt_f32_f64(x);
      __builtin_memcpy(p, &narrow, sizeof(narrow));
    } else {
      double values[kLanes];
      vst1q_f64(values, x);
      narrow_from_double<kDType>(values, kLanes, p);
    }
  }
};
