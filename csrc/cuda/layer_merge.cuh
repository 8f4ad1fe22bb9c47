// layer_merge:  out[e] = round(fma(c_{T-1}, τ_{T-1}[e], ... fma(c_0, τ_0[e], base[e])))  (docs/numerics.md), bit for
// bit the CPU's. In fp32 with coefficients rounded to fp32, or all in fp64 where an operand or the output is F64.
#pragma once

#include "sums.cuh"

namespace metagpt_fast::cuda {

inline constexpr int kMergeThreads = 256;

// The least magnitude that becomes Inf when rounded to the dtype.
template <class Scalar>
__device__ inline Scalar overflow_threshold(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return Scalar(65520);
    case DType::kBF16:
      return Scalar(0x1.ffp+127);
    case DType::kF32:
      return sizeof(Scalar) == 8 ? Scalar(0x1.ffffffp+127) : Scalar(__uint_as_float(0x7f800000u));
    case DType::kF64:
      return Scalar(__uint_as_float(0x7f800000u));
  }
  return 0;
}

// Element e of the result, before it is rounded to the output's dtype, with these coefficients, [T].
template <class Scalar>
__device__ inline Scalar merged_element(const LayerTable& table, std::int64_t k, std::int64_t e,
                                        const double* coefficients) {
  const std::uint64_t* addresses = table.addresses + k * table.num_operands;
  const std::uint8_t* dtypes = table.dtypes + k * table.num_operands;
  Scalar base = 0;
  Scalar sum = -Scalar(0);  // c·x + (−0) is c·x for either sign of zero
  int i = 0;
  if (table.has_base) {
    base = load_element<Scalar>(__ldg(addresses), static_cast<DType>(__ldg(dtypes)), e);
    sum = base;
    i = 1;
  }
  for (; i < table.num_operands; ++i) {
    const Scalar x = load_element<Scalar>(__ldg(addresses + i), static_cast<DType>(__ldg(dtypes + i)), e);
    sum = fused(static_cast<Scalar>(__ldg(coefficients++)), x - base, sum);
  }
  return sum;
}

template <class Scalar>
__device__ inline bool is_nonfinite(Scalar value, Scalar threshold) {
  return !(value < threshold && value > -threshold);
}

template <class Scalar>
__device__ inline unsigned merge_element(const LayerTable& table, std::int64_t k, std::int64_t e) {
  const auto out_dtype = static_cast<DType>(table.out_dtypes[k]);
  const double* coefficients = table.coefficients + k * (table.num_operands - table.has_base);
  const Scalar sum = merged_element<Scalar>(table, k, e, coefficients);
  store_element(table.out_addresses[k], out_dtype, e, sum);
  return is_nonfinite(sum, overflow_threshold<Scalar>(out_dtype));
}

// kVec elements, each two or four bytes wide, from 16 bytes.
template <DType kDType>
struct Vector {
  static constexpr int kNumel = 16 / kItemsize<kDType>;
  uint4 words;

  __device__ void load(std::uint64_t address, std::int64_t e) {
    words = *in_global<const uint4>(address + static_cast<std::uint64_t>(e) * kItemsize<kDType>);
  }
  __device__ float operator[](int n) const {
    if constexpr (kDType == DType::kF32) {
      return __uint_as_float(n == 0 ? words.x : n == 1 ? words.y : n == 2 ? words.z : words.w);
    } else {
      const std::uint32_t word = n < 2 ? words.x : n < 4 ? words.y : n < 6 ? words.z : words.w;
      return widen<kDType>(static_cast<std::uint16_t>(n % 2 == 0 ? word : word >> 16));
    }
  }
};

template <int kNumel, class Narrow>
__device__ inline void store_narrow(std::uint64_t address, const float* values, Narrow narrow) {
  std::uint32_t words[kNumel / 2];
#pragma unroll
  for (int n = 0; n < kNumel / 2; ++n) {
    words[n] = narrow(values[2 * n]) | static_cast<std::uint32_t>(narrow(values[2 * n + 1])) << 16;
  }
  if constexpr (kNumel == 8) {
    *in_global<uint4>(address) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    *in_global<uint2>(address) = make_uint2(words[0], words[1]);
  }
}

template <int kNumel>
__device__ inline void store_vector(std::uint64_t out, DType dtype, std::int64_t e, const float* values) {
  const std::uint64_t address = out + static_cast<std::uint64_t>(e) * (dtype == DType::kF32 ? 4 : 2);
  if (dtype == DType::kF32) {
#pragma unroll
    for (int n = 0; n < kNumel; n += 4) {
      in_global<float4>(address)[n / 4] = make_float4(values[n], values[n + 1], values[n + 2], values[n + 3]);
    }
  } else if (dtype == DType::kF16) {
    store_narrow<kNumel>(address, values, [](float value) { return f16_bits(value); });
  } else {
    store_narrow<kNumel>(address, values, [](float value) { return bf16_bits(value); });
  }
}

// Tensors of one dtype: 16 bytes of the base and of up to four models are on their way at a time. A thread reads its
// elements of every operand before it writes them, so the output may be an operand.
template <DType kDType>
__global__ void __launch_bounds__(kMergeThreads)
    merge_uniform_kernel(LayerTable table, unsigned long long* num_nonfinite) {
  using Vec = Vector<kDType>;
  constexpr int kAtOnce = 4;
  const std::int64_t k = tensor_of(table.first_blocks, table.num_tensors, blockIdx.x);
  if (table.kinds[k] != kUniform + static_cast<int>(kDType)) return;
  const std::int64_t first = (blockIdx.x - table.first_blocks[k]) * kBlockNumel;
  const std::int64_t numel = table.numels[k];
  const std::int64_t end = first + kBlockNumel < numel ? first + kBlockNumel : numel;
  const int num_models = table.num_operands - table.has_base;
  const std::uint64_t* addresses = table.addresses + k * table.num_operands;
  const std::uint64_t* models = addresses + table.has_base;
  const double* coefficients = table.coefficients + k * num_models;
  const auto out_dtype = static_cast<DType>(table.out_dtypes[k]);
  const float threshold = overflow_threshold<float>(out_dtype);
  unsigned count = 0;
  for (std::int64_t e = first + static_cast<int>(threadIdx.x) * Vec::kNumel; e < end;
       e += kMergeThreads * Vec::kNumel) {
    if (e + Vec::kNumel > end) {  // the last elements of a tensor
      for (; e < end; ++e) count += merge_element<float>(table, k, e);
      break;
    }
    Vec base{};
    if (table.has_base) base.load(__ldg(addresses), e);
    float sums[Vec::kNumel], subtrahends[Vec::kNumel];
    for (int t = 0; t < num_models; t += kAtOnce) {
      Vec model[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (t + n < num_models) model[n].load(__ldg(models + t + n), e);
      }
      if (t == 0) {
#pragma unroll
        for (int m = 0; m < Vec::kNumel; ++m) {
          subtrahends[m] = table.has_base ? base[m] : 0.0f;
          sums[m] = table.has_base ? base[m] : -0.0f;
        }
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (t + n < num_models) {
          const auto coefficient = static_cast<float>(__ldg(coefficients + t + n));
#pragma unroll
          for (int m = 0; m < Vec::kNumel; ++m) {
            sums[m] = __fmaf_rn(coefficient, model[n][m] - subtrahends[m], sums[m]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < Vec::kNumel; ++m) count += is_nonfinite(sums[m], threshold);
    store_vector<Vec::kNumel>(table.out_addresses[k], out_dtype, e, sums);
  }
  add_count(count, num_nonfinite + table.rows[k]);
}

// Everything else, an element at a time.
__global__ void __launch_bounds__(kMergeThreads, 4)
    merge_general_kernel(LayerTable table, unsigned long long* num_nonfinite) {
  const std::int64_t k = tensor_of(table.first_blocks, table.num_tensors, blockIdx.x);
  const std::uint8_t kind = table.kinds[k];
  if (kind != kGeneral && kind != kFp64) return;
  const std::int64_t first = (blockIdx.x - table.first_blocks[k]) * kBlockNumel;
  const std::int64_t numel = table.numels[k];
  const std::int64_t end = first + kBlockNumel < numel ? first + kBlockNumel : numel;
  unsigned count = 0;
  for (std::int64_t e = first + threadIdx.x; e < end; e += kMergeThreads) {
    count += kind == kFp64 ? merge_element<double>(table, k, e) : merge_element<float>(table, k, e);
  }
  add_count(count, num_nonfinite + table.rows[k]);
}

// Writes the merged tensors without waiting, and adds how many elements are NaN or Inf to num_nonfinite, [rows].
// `kinds`: bit b is set if a tensor is of kind b.
inline void layer_merge(const LayerTable& table, std::int64_t num_blocks, unsigned kinds,
                        unsigned long long* num_nonfinite, Stream stream) {
  const auto run = [&](const char* name, void (*kernel)(LayerTable, unsigned long long*)) {
    launch(name, kernel, num_blocks, kMergeThreads, stream, table, num_nonfinite);
  };
  const auto has = [kinds](int kind) { return (kinds >> kind & 1u) != 0; };
  const auto uniform = [](DType dtype) { return kUniform + static_cast<int>(dtype); };
  if (has(uniform(DType::kF32))) run("merge_uniform_kernel", merge_uniform_kernel<DType::kF32>);
  if (has(uniform(DType::kF16))) run("merge_uniform_kernel", merge_uniform_kernel<DType::kF16>);
  if (has(uniform(DType::kBF16))) run("merge_uniform_kernel", merge_uniform_kernel<DType::kBF16>);
  if (has(kGeneral) || has(kFp64)) run("merge_general_kernel", merge_general_kernel);
}

}  // namespace metagpt_fast::cuda
