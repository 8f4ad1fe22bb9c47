// column_gram and column_merge for one instruction set; see vector_loops-inl.h for how this text is used.

// Columns that are summed together: four rows of them fill a chunk of the workspace.
constexpr std::size_t kTileColumns = 128;
constexpr std::size_t kTileRows = kChunkNumel / kTileColumns;

// sums[c] = fma(a[3, c], b[3, c], ... fma(a[0, c], b[0, c], sums[c])) for rows of kTileColumns.
MF_NOINLINE void add_products(const double* __restrict a, const double* __restrict b, std::size_t rows, std::size_t n,
                              double* __restrict sums) {
  if (rows == kTileRows) {
    for (std::size_t c = 0; c < n; ++c) {
      double sum = __builtin_fma(a[c], b[c], sums[c]);
      sum = __builtin_fma(a[kTileColumns + c], b[kTileColumns + c], sum);
      sum = __builtin_fma(a[2 * kTileColumns + c], b[2 * kTileColumns + c], sum);
      sums[c] = __builtin_fma(a[3 * kTileColumns + c], b[3 * kTileColumns + c], sum);
    }
    return;
  }
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < n; ++c) {
      sums[c] = __builtin_fma(a[r * kTileColumns + c], b[r * kTileColumns + c], sums[c]);
    }
  }
}

void column_gram_rows(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t rows,
                      std::size_t columns, std::size_t row_stride, const Workspace& workspace, double* sums) {
  auto* values = reinterpret_cast<double*>(workspace.values);
  for (std::size_t column = 0; column < columns; column += kTileColumns) {
    const std::size_t n = min_size(kTileColumns, columns - column);
    for (std::size_t row = 0; row < rows; row += kTileRows) {
      const std::size_t num_rows = min_size(kTileRows, rows - row);
      for (std::size_t i = 0; i < num_operands; ++i) {
        for (std::size_t r = 0; r < num_rows; ++r) {
          const double* base = values + r * kTileColumns;
          double* out = values + i * kChunkNumel + r * kTileColumns;
          const bool subtract = has_base && i > 0;
          for_each_vector<VecD>(operands[i], (row + r) * row_stride + column, n, [=](std::size_t c, VecD::Reg x) {
            VecD::store(out + c, subtract ? VecD::sub(x, VecD::load(base + c)) : x);
          });
        }
      }
      double* pair_sums = sums + column;
      for (std::size_t i = 0; i < num_operands; ++i) {
        for (std::size_t j = i; j < num_operands; ++j, pair_sums += columns) {
          add_products(values + i * kChunkNumel, values + j * kChunkNumel, num_rows, n, pair_sums);
        }
      }
    }
  }
}

template <class Vec>
std::size_t merge_columns(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t numel,
                          std::size_t columns, const double* coefficients, const Workspace& workspace, std::byte* out,
                          DType out_dtype) {
  using Scalar = typename Vec::Scalar;
  const std::size_t num_models = num_operands - has_base;
  auto* base = reinterpret_cast<Scalar*>(workspace.values);
  Scalar* c = base + 2 * kChunkNumel;
  // Several short rows are treated as one.
  const std::size_t width = columns < kChunkNumel ? kChunkNumel / columns * columns : columns;
  std::size_t num_nonfinite = 0;
  for (std::size_t column = 0; column < min_size(width, numel); column += kChunkNumel) {
    const std::size_t n = min_size(kChunkNumel, width - column);
    for (std::size_t t = 0; t < num_models; ++t) {
      for (std::size_t e = 0; e < round_up(n, Vec::kLanes); ++e) {
        const std::size_t from = columns < kChunkNumel ? e % columns : min_size(column + e, columns - 1);
        c[t * kChunkNumel + e] = static_cast<Scalar>(coefficients[from * num_models + t]);
      }
    }
    for (std::size_t first = column; first < numel; first += width) {
      const auto coefficients_of = [=](std::size_t t) {
        const Scalar* row = c + t * kChunkNumel;
        return [=](std::size_t e) { return Vec::load(row + e); };
      };
      num_nonfinite += merge_chunk<Vec>(operands, num_operands, has_base, first, min_size(n, numel - first),
                                        coefficients_of, base, out, out_dtype);
    }
  }
  return num_nonfinite;
}

std::size_t column_merge_span(const Operand* operands, std::size_t num_operands, bool has_base, std::size_t numel,
                              std::size_t columns, const double* coefficients, const Workspace& workspace,
                              std::byte* out, DType out_dtype) {
  const bool in_fp64 = out_dtype == DType::kF64 || any_f64(operands, num_operands);
  const auto merge = in_fp64 ? merge_columns<VecD> : merge_columns<VecF>;
  return merge(operands, num_operands, has_base, numel, columns, coefficients, workspace, out, out_dtype);
}
