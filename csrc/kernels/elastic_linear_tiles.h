// Which tiles of y a block of elastic_linear's kernels computes, and in which order; host and device.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace flextron {

// Tiles of `side` elements that cover `size`.
FLEXTRON_HD int tiles_over(int64_t size, int side) { return static_cast<int>((size + side - 1) / side); }

struct Tile {
  int row, block, column;  // in tiles; columns are counted within a block
  bool needed;             // else all zeros
};

// A block's share of rows x blocks x columns tiles: every `step`-th from `first` on, first of the tiles that
// are needed, then of those that hold zeros alone. Row r needs its first needed(r) columns of each block, a
// number that does not rise with r: a staircase. What is not needed is the same staircase upside down. Rows
// are taken kGroup at a time and column by column within a group, so that blocks at work at the same time
// read the same rows and columns.
template <class Needed>
class TileSequence {
 public:
  static constexpr int kGroup = 8;

  FLEXTRON_HD TileSequence(int rows, int blocks, int columns, Needed needed, int first, int step)
      : rows_(rows), blocks_(blocks), columns_(columns), needed_(needed), step_(step), index_(first) {}

  // The next tile; false when there is none.
  FLEXTRON_HD bool next(Tile& tile) {
    for (;; zeros_ = true, group_ = 0) {
      for (; group_ < rows_; group_ += kGroup) {
        const int tiles = group_tiles();
        if (index_ < tiles * blocks_) {
          tile = at(index_ % tiles, index_ / tiles);
          index_ += step_;
          return true;
        }
        index_ -= tiles * blocks_;
      }
      if (zeros_) return false;
    }
  }

 private:
  // Columns of a row of the staircase that is being walked; its rows are counted from its widest.
  FLEXTRON_HD int width(int row) const { return zeros_ ? columns_ - needed_(rows_ - 1 - row) : needed_(row); }

  FLEXTRON_HD int group_rows() const { return rows_ - group_ < kGroup ? rows_ - group_ : kGroup; }

  FLEXTRON_HD int group_tiles() const {
    int tiles = 0;
    for (int row = 0; row < group_rows(); ++row) tiles += width(group_ + row);
    return tiles;
  }

  // The columns that the group's narrowest row reaches hold all its rows, those behind that the next one
  // reaches one row less, and so on.
  FLEXTRON_HD Tile at(int index, int block) const {
    int rows = group_rows(), column = 0;
    for (;; --rows) {
      const int end = width(group_ + rows - 1), tiles = (end - column) * rows;
      if (index < tiles) break;
      index -= tiles;
      column = end;
    }
    const int row = group_ + index % rows;
    column += index / rows;
    return zeros_ ? Tile{rows_ - 1 - row, block, columns_ - 1 - column, false}
                  : Tile{row, block, column, true};
  }

  const int rows_, blocks_, columns_;
  const Needed needed_;
  const int step_;
  int index_;      // of the next tile, counted from the group's first
  int group_ = 0;  // its first row
  bool zeros_ = false;
};

// The tile of block `index` of a grid that has one for every tile, needed or not: kGroup rows at a time,
// column by column, for the same reason as above.
FLEXTRON_HD Tile tile_of(unsigned index, unsigned rows, unsigned blocks, unsigned columns) {
  constexpr unsigned kGroup = 8;
  const unsigned group = index / (kGroup * blocks * columns) * kGroup,
                 within = index - group * blocks * columns;
  const unsigned group_rows = rows - group < kGroup ? rows - group : kGroup;
  const unsigned place = within / group_rows;
  return {static_cast<int>(group + within % group_rows), static_cast<int>(place / columns),
          static_cast<int>(place % columns), true};
}

}  // namespace flextron
