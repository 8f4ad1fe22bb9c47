#include <algorithm>
#include <vector>

#include "../core/thread_pool.h"
#include "isa.h"
#include "per_column.h"
#include "spans.h"

namespace metagpt_fast::cpu {
namespace {

// Rows that are summed starting at +0, before they are added to the rest. Part of the numerical contract.
constexpr std::size_t kBlockRows = 256;
// Wide tensors are cut so that the sums of a block stay small; no sum depends on it.
constexpr std::size_t kMaxColumns = 8192;
constexpr std::size_t kBlocksPerWorker = 2;
// Columns of one item of the addition of blocks.
constexpr std::size_t kAddedColumns = 512;

struct Block {
  std::size_t tensor;
  std::size_t row;
  std::size_t rows;
  std::size_t column;
  std::size_t columns;
  std::size_t sums;  // where its sums begin in the buffer of its wave
};

// Ordered by tensor, columns, rows: the blocks to be added to the same columns follow one another.
std::vector<Block> cut_into_blocks(const Layer& layer, const std::int64_t* columns) {
  std::vector<Block> blocks;
  for (std::size_t k = 0; k < layer.num_tensors; ++k) {
    if (layer.numels[k] == 0) continue;
    const auto num_columns = static_cast<std::size_t>(columns[k]);
    const std::size_t num_rows = static_cast<std::size_t>(layer.numels[k]) / num_columns;
    for (std::size_t column = 0; column < num_columns; column += kMaxColumns) {
      for (std::size_t row = 0; row < num_rows; row += kBlockRows) {
        blocks.push_back(
            {k, row, std::min(kBlockRows, num_rows - row), column, std::min(kMaxColumns, num_columns - column), 0});
      }
    }
  }
  return blocks;
}

void sum_block(const KernelTable& table, const Layer& layer, const Block& block, std::size_t num_columns,
               ThreadScratch& scratch, double* sums) {
  // Operands in files are read as whole rows, a span at a time, or row by row where the block is narrower.
  bool in_files = false;
  for (std::size_t i = 0; i < layer.num_operands; ++i) {
    in_files |= layer.files[block.tensor * layer.num_operands + i] >= 0;
  }
  std::size_t step = block.rows;
  if (in_files) step = block.columns == num_columns ? std::max<std::size_t>(1, kSpanNumel / num_columns) : 1;
  for (std::size_t row = 0; row < block.rows; row += step) {
    const std::size_t rows = std::min(step, block.rows - row);
    const std::size_t first = (block.row + row) * num_columns + block.column;
    const Operand* operands = scratch.load(layer, {block.tensor, first, (rows - 1) * num_columns + block.columns});
    table.column_gram_rows(operands, layer.num_operands, layer.has_base, rows, block.columns, num_columns,
                           scratch.workspace(), sums);
  }
}

struct Addition {
  std::size_t first_block;
  std::size_t end_block;
  std::size_t column;  // within the blocks
  std::size_t columns;
};

std::vector<Addition> additions_of(const std::vector<Block>& blocks, std::size_t first, std::size_t end) {
  std::vector<Addition> additions;
  while (first < end) {
    std::size_t next = first + 1;
    while (next < end && blocks[next].tensor == blocks[first].tensor && blocks[next].column == blocks[first].column) {
      ++next;
    }
    for (std::size_t column = 0; column < blocks[first].columns; column += kAddedColumns) {
      additions.push_back({first, next, column, std::min(kAddedColumns, blocks[first].columns - column)});
    }
    first = next;
  }
  return additions;
}

void add(const Layer& layer, const std::vector<Block>& blocks, const Addition& addition, const double* sums,
         double* gram) {
  const std::size_t num_operands = layer.num_operands;
  for (std::size_t b = addition.first_block; b < addition.end_block; ++b) {
    const Block& block = blocks[b];
    for (std::size_t c = addition.column; c < addition.column + addition.columns; ++c) {
      double* entries = gram + (block.column + c) * num_operands * num_operands;
      const double* sum = sums + block.sums + c;
      for (std::size_t i = 0; i < num_operands; ++i) {
        for (std::size_t j = i; j < num_operands; ++j, sum += block.columns) {
          entries[i * num_operands + j] += *sum;
          entries[j * num_operands + i] = entries[i * num_operands + j];
        }
      }
    }
  }
}

}  // namespace

void column_gram(const Layer& layer, const std::int64_t* columns, const std::uint64_t* grams) {
  cut_into_row_spans(layer, columns);  // for its checks
  std::vector<Block> blocks = cut_into_blocks(layer, columns);
  const KernelTable& table = kernels();
  const int num_workers = num_threads();
  const std::size_t num_pairs = layer.num_operands * (layer.num_operands + 1) / 2;
  const std::size_t capacity = static_cast<std::size_t>(num_workers) * kBlocksPerWorker * kMaxColumns * num_pairs;
  std::vector<ThreadScratch> scratch = make_scratch(layer.num_operands, num_workers);
  std::vector<double> sums;
  // Waves of blocks: all are summed, then they are added to the result in order.
  for (std::size_t first = 0, end = 0; first < blocks.size(); first = end) {
    std::size_t used = 0;
    for (; end < blocks.size() && used + blocks[end].columns * num_pairs <= capacity; ++end) {
      blocks[end].sums = used;
      used += blocks[end].columns * num_pairs;
    }
    sums.assign(used, 0.0);
    parallel_for(end - first, num_workers, [&](std::size_t item, int worker) {
      const Block& block = blocks[first + item];
      sum_block(table, layer, block, static_cast<std::size_t>(columns[block.tensor]),
                scratch[static_cast<std::size_t>(worker)], &sums[block.sums]);
    });
    const std::vector<Addition> additions = additions_of(blocks, first, end);
    parallel_for(additions.size(), num_workers, [&](std::size_t item, int) {
      const Addition& addition = additions[item];
      add(layer, blocks, addition, sums.data(), reinterpret_cast<double*>(grams[blocks[addition.first_block].tensor]));
    });
  }
}

}  // namespace metagpt_fast::cpu
