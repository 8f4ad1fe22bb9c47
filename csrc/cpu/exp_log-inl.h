// e^t and the terms of a divergence, in fp64; see vector_loops-inl.h for how this text is used. Every operation is
// written out, so that all instruction sets, and a GPU, give the same bits. No branches, so that loops over these
// functions become vector loops.

MF_INLINE std::uint64_t bits_of(double x) { return __builtin_bit_cast(std::uint64_t, x); }
MF_INLINE double double_from(std::uint64_t bits) { return __builtin_bit_cast(double, bits); }

// e^t for t <= 0 to 2^-52, NaN for NaN. Below −700 it is e^−700, which nobody sees after 1e-8 has been added.
// t = k ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r + r² P(r), P a Chebyshev fit of degree 9, relative error 1.6e-17.
MF_INLINE double exp_nonpositive(double t) {
  constexpr double kRoundToInteger = 0x1.8p52;
  const double x = t < -700.0 ? -700.0 : t;
  const double shifted = __builtin_fma(x, 0x1.71547652b82fep+0, kRoundToInteger);  // k in the low bits
  const double k = shifted - kRoundToInteger;
  double r = __builtin_fma(-k, 0x1.62e42fee00000p-1, x);  // exact: this part of ln 2 has 33 bits
  r = __builtin_fma(-k, 0x1.a39ef35793c76p-33, r);
  const double r2 = r * r;
  double p = __builtin_fma(0x1.af38a9b0ec855p-26, r, 0x1.289185613a3d6p-22);
  p = __builtin_fma(p, r2, __builtin_fma(0x1.71de0dae63bb3p-19, r, 0x1.a019b90d2ae7ap-16));
  p = __builtin_fma(p, r2, __builtin_fma(0x1.a01a01a7c41d5p-13, r, 0x1.6c16c1788bd90p-10));
  p = __builtin_fma(p, r2, __builtin_fma(0x1.11111111109b3p-7, r, 0x1.5555555553d63p-5));
  p = __builtin_fma(p, r2, __builtin_fma(0x1.5555555555556p-3, r, 0x1.0000000000001p-1));
  const double e = 1.0 + __builtin_fma(r2, p, r);
  return e * double_from((bits_of(shifted) << 52) + 0x3ff0000000000000u);  // times 2^k
}

// p log(p/q) − p + q for p, q in [1e-8, 1 + 1e-8]; NaN if one of them is. The two extra terms cancel in the sum over a
// row, where Σp = Σq. With them every term is >= 0 and of second order in q − p, and what p and q have been rounded
// by is of second order too; without them, terms of first order would cancel and leave little but rounding errors.
// q' = q 2^-k near p, D = q' − p, s = D / (q' + p), log(q'/p) = 2s + s s² R(s²), R a Chebyshev fit of degree 6,
// relative error of the logarithm 5.8e-17. Then D − 2ps = sD, and the term is s (D − p s² R) + (q − q') − p k ln 2.
MF_INLINE double divergence_term(double p, double q) {
  // The bits of a positive double are its logarithm, roughly: k + 1023 is their difference rounded, |log2(q'/p)| < 0.6.
  const std::uint64_t biased = (bits_of(q) - bits_of(p) + 0x3ff8000000000000u) >> 52;
  const double k = double_from(biased | 0x4330000000000000u) - (0x1p52 + 1023.0);
  const double scaled = q * double_from((2046u - biased) << 52);
  const double difference = scaled - p;
  const double s = difference / (scaled + p);
  const double z = s * s;
  const double z2 = z * z;
  double r = __builtin_fma(0x1.35b7a24a78d09p-3, z2, __builtin_fma(0x1.3900103513b4fp-3, z, 0x1.746bd59d469acp-3));
  r = __builtin_fma(r, z2, __builtin_fma(0x1.c71c3c54e25f9p-3, z, 0x1.2492495291fc2p-2));
  r = __builtin_fma(r, z2, __builtin_fma(0x1.999999997bf6bp-2, z, 0x1.555555555556ep-1));
  const double rest = __builtin_fma(p * -k, 0x1.62e42fefa39efp-1, q - scaled);  // exactly 0 where k = 0
  return __builtin_fma(s, __builtin_fma(-(p * z), r, difference), rest);
}
