// The compiler's own vectors, which every instruction set carries in as many registers as it needs; see
// vector_loops-inl.h for how this text is used. Each operation is IEEE's, element by element, so the bits are the same
// on all of them. 32 bytes, not 64: GCC 12 takes comparisons of vectors wider than the registers apart, element by
// element.

#define MF_WIDE(type, bytes) typedef type __attribute__((vector_size(bytes)))
MF_WIDE(float, 16) F32x4;
MF_WIDE(double, 32) F64x4;
MF_WIDE(std::int32_t, 16) I32x4;
MF_WIDE(std::int64_t, 32) I64x4;
MF_WIDE(std::int32_t, 32) I32x8;
#undef MF_WIDE

constexpr std::size_t kWide = 8;

// Of two vectors of eight; the second one's elements are numbers 8 to 15.
#if defined(__clang__)
#define MF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I32x8{__VA_ARGS__})
#endif

// They are passed by reference: as values they would be passed differently with and without AVX.
template <class Wide, class T>
MF_INLINE void load_wide(const T* p, Wide& x) {
  __builtin_memcpy(&x, p, sizeof(Wide));
}
template <class Wide, class T>
MF_INLINE void store_wide(T* p, const Wide& x) {
  __builtin_memcpy(p, &x, sizeof(Wide));
}
