// The launch plan: one pure function of the batch's shape, its layout and the device.
#pragma once

#include <cstdint>

namespace fastsoftloss {
namespace cuda {

// What a row's target is: a class, two classes with a weight each, or a probability for each class.
enum class Form : int { index, mixture, probabilities };

enum class Kernel : int {
  tile_staged,   // few classes, rows one behind the other: through shared memory
  tile_direct,   // few classes, any strides
  resident,      // a row in the registers of a group of threads
  stream,        // a row in passes, by several blocks where there are few rows
  careful_rows,  // everything else
  // of class probabilities:
  probabilities_held,    // in the registers of a group of threads
  probabilities_passed,  // in passes
};

struct Batch {
  int64_t rows, classes;
  int bytes;          // of a logit
  bool contiguous;    // class stride 1
  bool packed;        // and each row where the one before it ends, the first at a multiple of 16 bytes, the gradient's too
  bool side_by_side;  // neighbouring rows are neighbours in memory
  bool weighted;      // class weights under label smoothing
  bool fused;         // the gradient is wanted in the pass that gives the losses
  Form form;
};

struct Plan {
  Kernel kernel;
  int lanes;       // threads a row
  int threads;     // of a block
  int tile_rows;   // of a tile, where there are tiles
  int splits;      // parts of a row, each a grid's row of blocks
  int64_t blocks;  // of the kernel that reads the logits, for each split
  int64_t merge_blocks;
  int64_t spread_blocks;  // of the backward that follows, a warp a part
  int spread_splits;
  int shared;  // bytes of shared memory a block
};

constexpr int64_t kTileClasses = 512;     // up to here a row has few threads, and need not be aligned
constexpr int64_t kFusedClasses = 16384;  // up to here the forward writes the gradient too
constexpr int64_t kKeptClasses = 1024;    // from here the forward keeps six floats a row for the backward
constexpr int kProbabilitiesHeld = 36;    // classes a thread: 32, and some for what a row starts before
constexpr int kMostShares = 256;
constexpr int kMostSplits = 4096;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
inline int power_of_two(int64_t n, int least, int most) {
  int p = least;
  while (p < n && p < most) p *= 2;
  return p;
}

// Both are properties of the shape alone, so that a fake tensor knows them.
inline bool fused(int64_t classes) { return classes <= kFusedClasses; }
inline int64_t kept(int64_t rows, int64_t classes, bool mean, int floats) { return classes > kKeptClasses ? 1 + floats * rows : mean; }

inline Plan plan(const Batch& b, int multiprocessors) {
  const int64_t wave = 16 * int64_t(multiprocessors);  // blocks; more than fit at once, so that none waits for the last
  Plan p{};
  p.splits = 1;
  p.threads = 128;
  const bool quick = b.bytes < 8 && !b.weighted && b.classes >= 2 + (b.form == Form::mixture);  // some class is no label
  if (b.form == Form::probabilities) {
    // a warp starts where a sector does, which may be up to 15 classes before the first
    const int64_t most = b.classes + (b.classes > 512 ? 15 : 0);
    const bool held = b.bytes < 8 && !b.weighted && most <= 256 * kProbabilitiesHeld;
    p.kernel = held ? Kernel::probabilities_held : Kernel::probabilities_passed;
    p.lanes = held ? power_of_two(divide_up(most, kProbabilitiesHeld), 1, 256) : power_of_two(divide_up(b.classes, 8), 4, 256);
    p.threads = p.lanes > 32 ? p.lanes : 128;
    p.blocks = at_most(divide_up(b.rows, p.threads / p.lanes), wave);
  } else if (quick && b.packed && b.classes <= kTileClasses) {
    p.kernel = Kernel::tile_staged;
    p.lanes = power_of_two(divide_up(b.classes, 32), 1, 16);
    const int rows_at_once = p.threads / p.lanes;
    // some 8 KB, so that a multiprocessor's blocks together wait for enough of the memory
    p.tile_rows = rows_at_once * int(at_least(1, at_most(8192 / (rows_at_once * b.classes * b.bytes), 8)));
    p.shared = int(p.tile_rows * b.classes * b.bytes + 15) / 16 * 16;
    p.blocks = at_most(divide_up(b.rows, p.tile_rows), wave);
  } else if (quick && (b.classes <= 32 || (b.contiguous && b.classes <= kTileClasses))) {
    p.kernel = Kernel::tile_direct;
    p.lanes = b.contiguous ? power_of_two(divide_up(b.classes, 32), 4, 16) : 1;
    p.tile_rows = p.threads / p.lanes;
    p.blocks = at_most(divide_up(b.rows, p.tile_rows), wave);
  } else if (quick && b.contiguous && b.classes <= (b.fused ? kFusedClasses : kKeptClasses)) {
    p.kernel = Kernel::resident;
    p.lanes = power_of_two(divide_up(b.classes, 64), 16, 256);
    p.threads = p.lanes > 32 ? p.lanes : 128;
    p.blocks = at_most(divide_up(b.rows, p.threads / p.lanes), wave);
  } else if (quick && b.contiguous) {
    p.kernel = Kernel::stream;
    p.lanes = b.classes <= kFusedClasses ? 32 : p.threads;  // 32 to 512 logits a thread, or more than 128
    const int64_t groups = p.threads / p.lanes, most = at_most(divide_up(b.classes, p.lanes * 64), kMostSplits);
    p.splits = int(at_least(1, at_most(most, wave / 2 * groups / at_least(b.rows, 1))));
    p.blocks = at_most(divide_up(b.rows, groups), wave);
    p.spread_splits = p.splits * (p.lanes / 32);
    p.spread_blocks = at_most(divide_up(b.rows, p.threads / 32), wave);
    p.merge_blocks = at_most(divide_up(b.rows, 8), multiprocessors);
  } else {
    p.kernel = Kernel::careful_rows;
    p.lanes = b.contiguous || !b.side_by_side ? power_of_two(divide_up(b.classes, 8), 1, 32) : 1;
    p.blocks = at_most(divide_up(b.rows, p.threads / p.lanes), wave);
  }
  return p;
}

// Blocks that sum the mean's divisor before a kernel that writes gradients.
inline int share_count(int64_t rows) { return int(at_least(1, at_most(divide_up(rows, 4096), kMostShares))); }

static_assert(kTileClasses < 1 << 15, "the labels that are kept beside the mean's shares are int16");

// Numbers of scratch memory: what blocks add up to, the mean's shares, a long row's parts, a counter, and the labels where the
// mean's divisor comes first and classes are few (`labelled`).
struct Scratch {
  int64_t partial, shares, moments, counter, labels, size;
};

inline Scratch scratch(const Plan& p, int64_t rows, int moments_of_a_part, bool labelled) {
  const bool merged = p.splits > 1;
  const int64_t totals = merged ? p.merge_blocks : p.blocks;
  Scratch s;
  s.partial = 0;
  s.shares = 4 * totals;
  s.moments = s.shares + kMostShares;
  s.counter = s.moments + (merged ? rows * p.splits * moments_of_a_part : 0);
  s.labels = (s.counter + 8) / 8 * 8;  // at a sector of 32 bytes
  s.size = s.labels + (labelled ? divide_up(rows, 2) : 0);
  return s;
}

}  // namespace cuda
}  // namespace fastsoftloss
