#include "layer_row_divergence.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../core/float_environment.h"
#include "../core/thread_pool.h"
#include "isa.h"
#include "spans.h"

namespace metagpt_fast::cpu {
namespace {

// Rows up to this long keep their exponentials from the sum to the terms. 2 · 256 KiB per thread.
constexpr std::size_t kMaxKeptNumel = 32768;

Operand advanced(Operand operand, std::size_t numel) {
  return {operand.data + numel * itemsize(operand.dtype), operand.dtype};
}

double sum_of_span(const KernelTable& table, const Operand* operands, std::size_t numel, double* exps) {
  Softmax softmax[2];
  for (std::size_t i = 0; i < 2; ++i) {
    double* mine = exps == nullptr ? nullptr : exps + i * kMaxKeptNumel;
    const double max = table.row_max(operands[i], numel);
    softmax[i] = {max, 1.0 / table.row_exp_sum(operands[i], numel, max, mine), mine};
  }
  return table.row_divergence(operands, numel, softmax);
}

// A row longer than a span, cut into items that consecutive passes combine in order.
struct LongRow {
  std::size_t first_item;
  std::size_t end_item;
  double* divergence;
  Softmax softmax[2];
};

}  // namespace

void layer_row_divergence(const Layer& layer, const std::int64_t* columns, const std::uint64_t* divergences) {
  if (layer.num_operands != 2 || !layer.has_base) {
    throw std::invalid_argument("addresses: expected two operands, a base and a model");
  }
  const std::vector<Span> spans = cut_into_row_spans(layer, columns);
  const KernelTable& table = kernels();
  const int num_workers = num_threads();
  std::vector<ThreadScratch> scratch = make_scratch(2, num_workers);
  std::vector<std::vector<double>> exps(static_cast<std::size_t>(num_workers));

  std::vector<Span> parts;  // of long rows
  std::vector<std::size_t> row_of_part;
  std::vector<LongRow> long_rows;
  std::vector<Span> whole;  // rows
  for (const Span& span : spans) {
    const auto row_numel = static_cast<std::size_t>(columns[span.tensor]);
    if (row_numel <= kSpanNumel) {
      whole.push_back(span);
      continue;
    }
    if (span.first % row_numel == 0) {
      double* out = reinterpret_cast<double*>(divergences[span.tensor]) + span.first / row_numel;
      long_rows.push_back({parts.size(), parts.size(), out, {}});
    }
    parts.push_back(span);
    row_of_part.push_back(long_rows.size() - 1);
    long_rows.back().end_item = parts.size();
  }

  parallel_for(whole.size(), num_workers, [&](std::size_t item, int worker) {
    const Span& span = whole[item];
    const auto row_numel = static_cast<std::size_t>(columns[span.tensor]);
    std::vector<double>& kept = exps[static_cast<std::size_t>(worker)];
    if (row_numel <= kMaxKeptNumel && kept.empty()) kept.resize(2 * kMaxKeptNumel);
    double* out = reinterpret_cast<double*>(divergences[span.tensor]) + span.first / row_numel;
    const Operand* operands = scratch[static_cast<std::size_t>(worker)].load(layer, span);
    for (std::size_t first = 0; first < span.numel; first += row_numel) {
      const Operand row[2] = {advanced(operands[0], first), advanced(operands[1], first)};
      *out++ = sum_of_span(table, row, row_numel, row_numel <= kMaxKeptNumel ? kept.data() : nullptr);
    }
  });

  if (parts.empty()) return;
  const DefaultFloatEnvironment environment;  // the caller's thread adds
  std::vector<double> results(parts.size() * 2);
  const auto for_each_part = [&](const auto& body) {
    parallel_for(parts.size(), num_workers, [&](std::size_t item, int worker) {
      const Operand* operands = scratch[static_cast<std::size_t>(worker)].load(layer, parts[item]);
      body(operands, parts[item].numel, long_rows[row_of_part[item]].softmax, &results[2 * item]);
    });
  };
  for_each_part([&](const Operand* operands, std::size_t numel, const Softmax*, double* out) {
    for (std::size_t i = 0; i < 2; ++i) out[i] = table.row_max(operands[i], numel);
  });
  for (LongRow& row : long_rows) {
    for (std::size_t i = 0; i < 2; ++i) {
      row.softmax[i] = {results[2 * row.first_item + i], 0.0, nullptr};
      for (std::size_t item = row.first_item; item < row.end_item; ++item) {
        row.softmax[i].max = std::max(row.softmax[i].max, results[2 * item + i]);
      }
    }
  }
  for_each_part([&](const Operand* operands, std::size_t numel, const Softmax* softmax, double* out) {
    for (std::size_t i = 0; i < 2; ++i) out[i] = table.row_exp_sum(operands[i], numel, softmax[i].max, nullptr);
  });
  for (LongRow& row : long_rows) {
    for (std::size_t i = 0; i < 2; ++i) {
      double sum = 0;
      for (std::size_t item = row.first_item; item < row.end_item; ++item) sum += results[2 * item + i];
      row.softmax[i].scale = 1.0 / sum;
    }
  }
  for_each_part([&](const Operand* operands, std::size_t numel, const Softmax* softmax, double* out) {
    *out = table.row_divergence(operands, numel, softmax);
  });
  for (LongRow& row : long_rows) {
    *row.divergence = 0;
    for (std::size_t item = row.first_item; item < row.end_item; ++item) *row.divergence += results[2 * item];
  }
}

}  // namespace metagpt_fast::cpu
