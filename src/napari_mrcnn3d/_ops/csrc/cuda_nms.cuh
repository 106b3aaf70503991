// Non-maximum suppression on CUDA.
//
// Boxes come best first and are decided chunk by chunk, in three steps: drop what boxes kept from earlier chunks
// suppress; compare the boxes of the chunk with each other, 64 by 64 bits at a time; walk those bits in one block.
// How many are kept is known only to the device until the end.
#pragma once
#include "cuda_basics.cuh"

namespace mrcnn3d {

constexpr int word_bits = 64;

struct alignas(16) ScoredBox {
  float low[3], volume, high[3], unused;
  Int group;
};

MRCNN3D_DEVICE ScoredBox scored_box(const float* boxes, const Int* groups, Int index) {
  const float* box = boxes + index * 6;
  return {{box[0], box[1], box[2]}, box_volume(box), {box[3], box[4], box[5]}, 0.f, groups ? groups[index] : 0};
}

// Whether one of two boxes of a group suppresses the other.
// A coordinate that is no number makes its box's volume none, and with it the comparison false.
MRCNN3D_DEVICE bool suppresses(const ScoredBox& a, const ScoredBox& b, float threshold) {
  float sides[3];
  for (int axis = 0; axis < 3; ++axis) {
    sides[axis] = fmaxf(MRCNN3D_SUB(fminf(a.high[axis], b.high[axis]), fmaxf(a.low[axis], b.low[axis])), 0.f);
  }
  return overlaps_by_more(sides[0], sides[1], sides[2], a.volume, b.volume, threshold) && a.group == b.group;
}

// The boxes [begin, begin + size) of all.
struct Chunk {
  const float* boxes;
  const Int* groups;  // none: all of one group
  Int begin;
  int size;
  float threshold;

  MRCNN3D_DEVICE int words() const { return (size + word_bits - 1) / word_bits; }
  MRCNN3D_DEVICE ScoredBox at(int index) const { return scored_box(boxes, groups, begin + index); }
};

// 64 threads compare 64 boxes of the chunk (grid x) with those kept, 64 at a time (shared by grid y); sets the bits of
// the suppressed.
MRCNN3D_DEVICE void nms_drop(const Chunk& chunk, const Int* kept, const Int* kept_count, Int limit, Bits* removed) {
  static __shared__ ScoredBox winners[word_bits];
  const Int count = *kept_count;
  if (count >= limit) return;
  const int index = int(blockIdx.x) * word_bits + threadIdx.x;
  bool suppressed = index >= chunk.size;
  const ScoredBox box = chunk.at(suppressed ? 0 : index);
  for (Int first = Int(blockIdx.y) * word_bits; first < count; first += Int(gridDim.y) * word_bits) {
    if (__syncthreads_and(suppressed)) break;
    const int found = int(min(Int(word_bits), count - first));
    if (int(threadIdx.x) < found)
      winners[threadIdx.x] = scored_box(chunk.boxes, chunk.groups, kept[first + threadIdx.x]);
    __syncthreads();
    for (int i = 0; i < found && !suppressed; ++i) suppressed = suppresses(winners[i], box, chunk.threshold);
  }
  if (suppressed) atomicOr(&removed[blockIdx.x], Bits(1) << threadIdx.x);
}

// 64 threads compare two groups of 64 boxes of the chunk: one tile of the upper triangle of the bit matrix
// [size, words]; grid x has words + 1 blocks, grid y half as many as there are words. Diagonal tiles hold both halves.
MRCNN3D_DEVICE void nms_compare(const Chunk& chunk, const Int* kept_count, Int limit, Bits* matrix) {
  static __shared__ ScoredBox others[word_bits];
  if (*kept_count >= limit) return;
  // Row `pair` of the triangle and the one as far from its end make words + 1 tiles together.
  const int words = chunk.words(), pair = blockIdx.y, offset = blockIdx.x;
  const bool longer = offset > pair;
  const int row_word = longer ? pair : words - 1 - pair, column_word = longer ? offset - 1 : words - 1 - offset;
  const int row = row_word * word_bits + threadIdx.x, column = column_word * word_bits + threadIdx.x;
  if (column < chunk.size) others[threadIdx.x] = chunk.at(column);
  __syncthreads();
  if (row >= chunk.size) return;
  const ScoredBox box = chunk.at(row);
  const int count = min(word_bits, chunk.size - column_word * word_bits);
  Bits bits = 0;
  for (int i = 0; i < count; ++i) bits |= Bits(suppresses(box, others[i], chunk.threshold)) << i;
  if (row_word == column_word) bits &= ~(Bits(1) << threadIdx.x);
  matrix[Int(row) * words + column_word] = bits;
}

MRCNN3D_DEVICE Bits ballot(bool first_half, bool second_half) {
  const Bits low = __ballot_sync(0xffffffffu, first_half), high = __ballot_sync(0xffffffffu, second_half);
  return low | high << 32;
}

// Which of 64 boxes are kept, worked out by one warp whose lane l has boxes l and l + 32. A box whose every earlier
// suppressor is out is in, and one that a kept box suppresses is out: a few rounds instead of 64 steps.
MRCNN3D_DEVICE Bits decide(Bits undecided, const Bits suppressors[2]) {
  Bits kept = 0;
  while (undecided != 0) {
    bool in[2], out[2];
    for (int half = 0; half < 2; ++half) {
      const bool open = undecided >> (threadIdx.x + 32 * half) & 1;
      in[half] = open && (suppressors[half] & (undecided | kept)) == 0;
      out[half] = open && (suppressors[half] & kept) != 0;
    }
    const Bits entered = ballot(in[0], in[1]), left = ballot(out[0], out[1]);
    kept |= entered;
    undecided &= ~(entered | left);
  }
  return kept;
}

// One block of 1024 threads walks the chunk and appends the positions of the boxes kept.
constexpr int keep_threads = 1024, keep_columns = 128, keep_rows = word_bits / (keep_threads / keep_columns);

MRCNN3D_DEVICE void nms_keep(const Chunk& chunk, const Bits* matrix, const Bits* dropped, Int limit, Int* kept,
                             Int* kept_count) {
  static __shared__ Bits winners;
  Bits* removed = reinterpret_cast<Bits*>(shared_memory);  // [words]
  const int words = chunk.words(), thread = threadIdx.x;
  for (int word = thread; word < words; word += blockDim.x) removed[word] = dropped[word];
  Int kept_before = *kept_count;
  Bits rows[2] = {0, 0};  // of this lane's two boxes in the diagonal tile, fetched one step ahead
  const auto fetch = [&](int word) {
    for (int half = 0; half < 2; ++half) {
      const int row = word * word_bits + thread + 32 * half;
      if (row < chunk.size) rows[half] = matrix[Int(row) * words + word];
    }
  };
  if (thread < 32) fetch(0);
  __syncthreads();
  for (int word = 0; word < words && kept_before < limit; ++word) {
    if (thread < 32) {
      const int left = chunk.size - word * word_bits;
      const Bits valid = left < word_bits ? (Bits(1) << left) - 1 : ~Bits(0);
      Bits suppressors[2], earlier[2];
      for (int half = 0; half < 2; ++half) {
        earlier[half] = (Bits(1) << (thread + 32 * half)) - 1;
        suppressors[half] = rows[half] & earlier[half];
      }
      const Bits decided = decide(valid & ~removed[word], suppressors);
      for (int half = 0; half < 2; ++half) {
        const Int place = kept_before + __popcll(decided & earlier[half]);
        if ((decided >> (thread + 32 * half) & 1) && place < limit) {
          kept[place] = chunk.begin + word * word_bits + thread + 32 * half;
        }
      }
      if (thread == 0) winners = decided;
      if (word + 1 < words) fetch(word + 1);
    }
    __syncthreads();
    kept_before += __popcll(winners);
    // Eight rows of winners per thread, loaded together; groups of 128 threads take neighbouring words.
    const int first_row = thread / keep_columns * keep_rows;
    const unsigned mine = unsigned(winners >> first_row) & ((1u << keep_rows) - 1);
    for (int column = word + 1 + thread % keep_columns; column < words && mine != 0; column += keep_columns) {
      const Bits* tile = matrix + (Int(word) * word_bits + first_row) * words + column;
      Bits bits = 0;
      for (int row = 0; row < keep_rows; ++row) bits |= mine >> row & 1 ? tile[Int(row) * words] : 0;
      if (bits != 0) atomicOr(&removed[column], bits);
    }
    __syncthreads();
  }
  if (thread == 0) *kept_count = min(kept_before, limit);
}

}  // namespace mrcnn3d
