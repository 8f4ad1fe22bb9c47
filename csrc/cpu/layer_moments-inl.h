// layer_moments for one instruction set; see vector_loops-inl.h for how this text is used.

// lanes[0 .. 4) += |δ|, |δ|m, δ², (δm)² of one chunk, padded to a multiple of kNumLanes.
template <class Scalar, bool kWeighted>
MF_NOINLINE void add_moments(const Scalar* delta, const std::uint32_t* mask, const double* weights, std::size_t n,
                             double* __restrict lanes) {
  for (std::size_t i = 0; i < n; i += kNumLanes) {
    for (std::size_t l = 0; l < kNumLanes; ++l) {
      const double magnitude = __builtin_fabs(static_cast<double>(delta[i + l]));
      const double weighted = kWeighted ? magnitude * weights[i + l] : magnitude;
      const double kept = mask[i + l] != 0 ? weighted : 0.0;
      lanes[l] += magnitude;
      lanes[kNumLanes + l] += kept;
      lanes[2 * kNumLanes + l] += magnitude * magnitude;
      lanes[3 * kNumLanes + l] += kept * kept;
    }
  }
}

MF_INLINE double sum_of_lanes(const double* lanes) {
  double tree[kNumLanes];
  for (std::size_t l = 0; l < kNumLanes; ++l) tree[l] = lanes[l];
  for (std::size_t width = kNumLanes / 2; width > 0; width /= 2) {
    for (std::size_t l = 0; l < width; ++l) tree[l] += tree[l + width];
  }
  return tree[0];
}

// sums[t, 0] += elements kept, sums[t, 5] += elements that only model t keeps.
MF_NOINLINE void count_kept(const std::uint32_t* masks, std::size_t num_models, std::size_t n, double* sums) {
  std::uint64_t once[kChunkNumel / 64] = {};   // kept by some model
  std::uint64_t twice[kChunkNumel / 64] = {};  // kept by more than one
  std::uint64_t kept[kChunkNumel / 64];
  const std::size_t num_words = round_up(n, 64) / 64;
  for (std::size_t t = 0; t < num_models; ++t) {
    pack_bits<VecF>(masks + t * kChunkNumel, n, kept);
    for (std::size_t w = 0; w < num_words; ++w) {
      twice[w] |= once[w] & kept[w];
      once[w] |= kept[w];
    }
  }
  for (std::size_t t = 0; t < num_models; ++t) {
    pack_bits<VecF>(masks + t * kChunkNumel, n, kept);
    int num_kept = 0;
    int num_alone = 0;
    for (std::size_t w = 0; w < num_words; ++w) {
      num_kept += __builtin_popcountll(kept[w]);
      num_alone += __builtin_popcountll(kept[w] & ~twice[w]);
    }
    sums[t * kNumMoments] += num_kept;
    sums[t * kNumMoments + 5] += num_alone;
  }
}

template <class Vec>
void sum_moments(const SparseRun& run, const SparseRows& rows, double* sums) {
  using Scalar = typename Vec::Scalar;
  const std::size_t num_models = run.num_models;
  for (std::size_t i = 0; i < num_models * kNumMoments; ++i) sums[i] = 0;
  for (std::size_t begin = 0; begin < run.numel; begin += kBlockNumel) {
    const std::size_t end = min_size(run.numel, begin + kBlockNumel);
    for (std::size_t i = 0; i < num_models * 4 * kNumLanes; ++i) rows.lanes[i] = 0;
    for (std::size_t offset = begin; offset < end; offset += kChunkNumel) {
      const std::size_t n = min_size(kChunkNumel, end - offset);
      load_deltas<Vec>(run.operands, num_models, offset, n, rows);
      chunk_masks<Scalar>(run, offset, n, rows);
      count_kept(rows.masks, num_models, n, sums);
      for (std::size_t t = 0; t < num_models; ++t) {
        const auto add = run.masks[t].kind == MaskKind::kNear ? add_moments<Scalar, true> : add_moments<Scalar, false>;
        add(row_of<Scalar>(rows.deltas, t), rows.masks + t * kChunkNumel, rows.weights + t * kChunkNumel,
            round_up(n, kNumLanes), rows.lanes + t * 4 * kNumLanes);
      }
    }
    for (std::size_t t = 0; t < num_models; ++t) {
      for (std::size_t i = 0; i < 4; ++i) {
        sums[t * kNumMoments + 1 + i] += sum_of_lanes(rows.lanes + (t * 4 + i) * kNumLanes);
      }
    }
  }
}

void moments_span(const SparseRun& run, const SparseRows& rows, double* sums) {
  const auto sum = any_f64(run.operands, 1 + run.num_models) ? sum_moments<VecD> : sum_moments<VecF>;
  sum(run, rows, sums);
}
