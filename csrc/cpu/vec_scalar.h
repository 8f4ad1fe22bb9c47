// One lane at a time, for processors without a vector unit we know, and to check the others against.

template <class T>
struct VecScalar {
  using Scalar = T;
  using Reg = T;
  static constexpr std::size_t kLanes = 1;
  static constexpr int kNumRegs = 16;

  MF_INLINE Reg zero() { return T(0); }
  MF_INLINE Reg broadcast(T x) { return x; }
  MF_INLINE Reg load(const T* p) { return *p; }
  MF_INLINE void store(T* p, Reg x) { *p = x; }
  MF_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  MF_INLINE Reg fma(Reg a, Reg b, Reg c) {
    if constexpr (sizeof(T) == 4) return __builtin_fmaf(a, b, c);
    return static_cast<T>(__builtin_fma(a, b, c));
  }
  MF_INLINE Reg max_abs(Reg a, Reg b) {
    const T magnitude = b < 0 ? -b : b;
    return magnitude > a ? magnitude : a;
  }
  MF_INLINE unsigned count_not_below(Reg x, Reg limit) { return !((x < 0 ? -x : x) < limit); }

  template <class Narrow, class Wide>
  MF_INLINE void widen(const Narrow& x, Wide& out) {
    out = __builtin_convertvector(x, Wide);
  }

  MF_INLINE std::uint32_t greater(const std::uint32_t* keys, std::uint32_t limit) { return *keys > limit; }
  MF_INLINE std::uint32_t equal(const std::uint32_t* keys, std::uint32_t key) { return *keys == key; }
  MF_INLINE std::size_t pack(const std::uint32_t* keys, std::uint32_t bits, std::uint32_t* out) {
    return pack_one_by_one(keys, bits, out);
  }
  MF_INLINE void expand(std::uint32_t bits, std::uint32_t* out) { *out = bits != 0 ? ~0u : 0u; }

  template <DType kDType>
  MF_INLINE Reg load_as(const std::byte* p) {
    if constexpr (kDType == DType::kF64 || kDType == DType::kF32) {
      std::conditional_t<kDType == DType::kF64, double, float> x;
      __builtin_memcpy(&x, p, sizeof(x));
      return static_cast<T>(x);
    } else {
      std::uint16_t bits;
      __builtin_memcpy(&bits, p, sizeof(bits));
      return kDType == DType::kBF16 ? float_from_bf16(bits) : float_from_f16(bits);
    }
  }

  template <DType kDType>
  MF_INLINE void store_as(std::byte* p, Reg x) {
    if constexpr (kDType == DType::kF64 || kDType == DType::kF32) {
      const auto y = static_cast<std::conditional_t<kDType == DType::kF64, double, float>>(x);
      __builtin_memcpy(p, &y, sizeof(y));
    } else {
      const float y = sizeof(T) == 8 ? float_from_double_to_odd(x) : static_cast<float>(x);
      const std::uint16_t bits = kDType == DType::kBF16 ? bf16_from_float(y) : f16_from_float(y);
      __builtin_memcpy(p, &bits, sizeof(bits));
    }
  }
};

using VecF = VecScalar<float>;
using VecD = VecScalar<double>;
