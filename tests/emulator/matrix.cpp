// Tensor cores: 8x8 blocks between shared memory and registers, a warp's mma, a warpgroup's wgmma.
//
// Products of 16-bit numbers are exact in float64; a k16 step adds its 16 of them and the accumulator there
// and rounds to float32 once. Hardware adds in an order of its own: bits may differ from a GPU's in the last
// places.
#include "core/types.h"
#include "emulator/machine.h"
#include "kernels/device/tensor_map.h"

namespace flextron::emulator {
namespace {

double widen(uint16_t bits, bool is_bf16) {
  if (is_bf16) return bits_as<float>(static_cast<uint32_t>(bits) << 16);
  fp16 half;
  half.bits = bits;
  return static_cast<float>(half);
}

struct MatrixLane {
  uint32_t* registers;
  const uint32_t* values;
  uint32_t offset;  // of the row
};

uint32_t row_offset(const void* row, const char* what, const Site& site) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    fail(site, text(what, ": the row's address must be a multiple of 16"));
  return shared_offset(row, 16, site);
}

// Row of element (i, j) of block b: lane 8 b + i; its register: lane 4 i + j / 2, half j % 2.
template <class F>
void each_element(bool transposed, const F& f) {
  for (int b = 0; b < 4; ++b)
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 8; ++j)
        f(b, 8 * b + i, j, transposed ? 4 * j + i / 2 : 4 * i + j / 2, (transposed ? i : j) % 2);
}

}  // namespace

void ldmatrix_x4(uint32_t* registers, const void* row, bool transposed, const Site& site) {
  MatrixLane mine{registers, nullptr, row_offset(row, "ldmatrix", site)};
  Block& block = *current->block;
  for (uint32_t i = mine.offset / 4; i < mine.offset / 4 + 4; ++i)
    if (block.cells[i].kind == Cell::kFlying)
      fail(site, text("ldmatrix: offset ", 4 * i, " is read while the copy of line ", block.cells[i].line,
                      " is still on its way"));
  count_shared(mine.offset, 16, site);
  meet(~0u, transposed ? "ldmatrix.trans" : "ldmatrix", site, &mine, [&](std::array<void*, 32>& lanes) {
    each_element(transposed, [&](int b, int row_lane, int j, int lane, int half) {
      uint16_t bits;
      std::memcpy(&bits, block.shared + static_cast<MatrixLane*>(lanes[row_lane])->offset + 2 * j, 2);
      uint32_t& to = static_cast<MatrixLane*>(lanes[lane])->registers[b];
      to = half ? (to & 0xffffu) | static_cast<uint32_t>(bits) << 16 : (to & 0xffff0000u) | bits;
    });
  });
}

void stmatrix_x4(void* row, const uint32_t* registers, const Site& site) {
  MatrixLane mine{nullptr, registers, row_offset(row, "stmatrix", site)};
  Block& block = *current->block;
  touch_shared(row, 16, true, site);
  meet(~0u, "stmatrix", site, &mine, [&](std::array<void*, 32>& lanes) {
    each_element(false, [&](int b, int row_lane, int j, int lane, int half) {
      const auto bits =
          static_cast<uint16_t>(static_cast<MatrixLane*>(lanes[lane])->values[b] >> (16 * half));
      std::memcpy(block.shared + static_cast<MatrixLane*>(lanes[row_lane])->offset + 2 * j, &bits, 2);
    });
  });
}

uint32_t pack(bool is_bf16, float low, float high) {
  const auto bits = [&](float value) -> uint32_t {
    if (value != value) return 0x7fff;
    return is_bf16 ? bf16(value).bits : fp16(value).bits;
  };
  return bits(low) | bits(high) << 16;
}

namespace {

// A fragment of 16 x 16: element (row, k) is in lane 4 (row % 8) + k % 8 / 2, register row / 8 + 2 (k / 8),
// half k % 2.
template <class Register>  // (lane, register) -> bits
void gather_a(double (&a)[16][16], bool is_bf16, const Register& of) {
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      a[row][k] =
          widen(static_cast<uint16_t>(of(4 * (row % 8) + k % 8 / 2, row / 8 + 2 * (k / 8)) >> (16 * (k % 2))),
                is_bf16);
}

}  // namespace

void mma_m16n8k16(bool is_bf16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, const Site& site) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  meet(~0u, is_bf16 ? "mma.bf16" : "mma.f16", site, &mine, [&](std::array<void*, 32>& lanes) {
    const auto lane = [&](int l) { return static_cast<Lane*>(lanes[l]); };
    double left[16][16], right[16][8];
    gather_a(left, is_bf16, [&](int l, int r) { return lane(l)->a[r]; });
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n)
        right[k][n] =
            widen(static_cast<uint16_t>(lane(4 * n + k % 8 / 2)->b[k / 8] >> (16 * (k % 2))), is_bf16);
    for (int row = 0; row < 16; ++row) {
      double sum[8] = {};
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) sum[n] += left[row][k] * right[k][n];
      for (int n = 0; n < 8; ++n) {
        float& to = lane(4 * (row % 8) + n / 2)->d[n % 2 + 2 * (row / 8)];
        to = static_cast<float>(to + sum[n]);
      }
    }
    ++grid().counters.mma;
    grid().counters.flops += 2 * 16 * 8 * 16;
  });
}

// ---- wgmma ----
//
// A warp's quarter of the product is worked out when it asks, into a hidden copy of the accumulators; the
// registers hold poison until the wait, which also checks that the operands have stayed as they were: all of
// them, as nothing says that a warp's part of the hardware reads its own rows of A alone.

namespace {

struct Operand {
  uint32_t start;  // address
  uint32_t leading, stride;
  Swizzle swizzle;
  bool mn_major;

  // Address of element (mn, k), by the canonical layouts of the PTX manual.
  uint32_t address(uint32_t mn, uint32_t k) const {
    const uint32_t width = swizzle_mask(swizzle) + 16, across = width / 2;  // bytes, elements
    const bool plain = swizzle == Swizzle::kNone;
    uint32_t offset;
    if (!mn_major)
      offset = mn % 8 * width + mn / 8 * stride + (plain ? k / 8 * leading + k % 8 * 2 : k * 2);
    else if (plain)
      offset = mn % 8 * 2 + mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    else
      offset = mn % across * 2 + mn / across * leading + k % 8 * width + k / 8 * stride;
    return swizzled(start + offset, swizzle);
  }
};

Operand operand(uint64_t descriptor, bool mn_major, const char* name, const Site& site) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
  const Operand o{field(0), field(16), field(32), Swizzle{static_cast<uint32_t>(descriptor >> 62)}, mn_major};
  const uint32_t pattern = 8 * (swizzle_mask(o.swizzle) + 16);
  if (o.swizzle != Swizzle::kNone) {
    if (o.start % pattern >= pattern / 8)
      fail(site,
           text("wgmma: descriptor of ", name, ": the tile must begin at a multiple of ", pattern,
                " bytes (and less than ", pattern / 8, " more for a step along K), got address ", o.start));
    if (o.stride % pattern != 0 || (mn_major && o.leading % pattern != 0))
      fail(site, text("wgmma: descriptor of ", name, ": with its swizzle, strides must be multiples of ",
                      pattern, ", got ", o.stride, mn_major ? text(" and ", o.leading) : ""));
  }
  return o;
}

// The operand's values, [16][count] of its rows of M or N; notes the 16-byte pieces in `part`.
void read_operand(const Operand& o, uint32_t count, bool is_bf16, std::vector<double>& values,
                  WarpMatrix& part, const Site& site) {
  Block& block = *current->block;
  values.resize(size_t{count} * 16);
  uint32_t last = ~0u;
  const auto element = [&](uint32_t mn, uint32_t k) {
    const uint32_t address = o.address(mn, k);
    if (address < kSharedBase) fail(site, text("wgmma: address ", address, " is not in shared memory"));
    const uint32_t offset = address - kSharedBase, piece = offset / 16 * 16;
    if (piece != last) {
      shared_offset(block.shared + piece, 16, site);
      check_async_read(block, piece, 16, site, static_cast<int>(o.swizzle));
      part.reads.push_back(piece);
      part.bytes.insert(part.bytes.end(), block.shared + piece, block.shared + piece + 16);
      last = piece;
    }
    uint16_t bits;
    std::memcpy(&bits, block.shared + offset, 2);
    values[k * count + mn] = widen(bits, is_bf16);
  };
  if (o.mn_major)
    for (uint32_t k = 0; k < 16; ++k)
      for (uint32_t mn = 0; mn < count; ++mn) element(mn, k);
  else
    for (uint32_t mn = 0; mn < count; ++mn)
      for (uint32_t k = 0; k < 16; ++k) element(mn, k);
}

void finish(WarpMatrix& part, const Site& site) {
  Block& block = *current->block;
  Warp& w = warp();
  for (size_t i = 0; i < part.reads.size(); ++i)
    if (std::memcmp(block.shared + part.reads[i], &part.bytes[16 * i], 16) != 0)
      fail(site, text("wgmma of ", at(part.site), ": shared memory at offset ", part.reads[i],
                      " was overwritten before this wait"));
  for (size_t i = 0; i < part.a_values.size(); ++i)
    if (part.a_registers[i / 4][i % 4] != part.a_values[i])
      fail(site,
           text("wgmma of ", at(part.site), ": register ", i % 4, " of A was changed before this wait"));
  Accumulators& acc = w.accumulators.at(part.accumulators);
  if (--acc.users > 0) return;
  const int count = acc.N / 2;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < count; ++i) {
      float& to = acc.registers[lane][i];
      if (bits_as<uint32_t>(to) != 0xffffffffu)
        fail(site, text("wgmma of ", at(part.site), ": accumulator ", i, " of lane ", lane,
                        " was written before this wait"));
      to = acc.value[static_cast<size_t>(lane * count + i)];
    }
  w.accumulators.erase(part.accumulators);
}

}  // namespace

void hold(const float* d, const Site& site) {
  for (const auto& [first, accumulators] : warp().accumulators)
    if (accumulators.registers[static_cast<size_t>(current->lane)] == d)
      fail(site, "hold: a wgmma on these accumulators is under way");
}

void wgmma_fence(const Site& site) {
  meet(~0u, "wgmma_fence", site, nullptr, [&](auto&) { warp().fenced = true; });
}

void wgmma_commit(const Site& site) {
  meet(~0u, "wgmma_commit", site, nullptr,
       [&](auto&) { warp().groups.push_back(std::exchange(warp().open, {})); });
}

void wgmma_wait(int pending, const Site& site) {
  meet(~0u, "wgmma_wait", site, nullptr, [&](auto&) {
    Warp& w = warp();
    while (static_cast<int>(w.groups.size()) > pending) {
      for (WarpMatrix& part : w.groups.front()) finish(part, site);
      w.groups.pop_front();
    }
    if (w.groups.empty() && w.open.empty()) w.fenced = false;  // the registers are the threads' own again
  });
}

void wgmma(bool is_bf16, int N, float* d, const uint32_t* a_registers, uint64_t a, bool a_mn_major,
           uint64_t b, bool b_mn_major, int accumulate, const Site& site) {
  struct Lane {
    float* d;
    const uint32_t* a;
  } mine{d, a_registers};
  meet(~0u, "wgmma", site, &mine, [&](std::array<void*, 32>& lanes) {
    const auto lane = [&](int l) { return static_cast<Lane*>(lanes[l]); };
    Warp& w = warp();
    if (!w.fenced) fail(site, "wgmma: wgmma_fence must come first, after the registers were last touched");
    w.issued.push_back({site, N, a, b, accumulate});

    WarpMatrix part;
    part.site = site;
    part.accumulators = lane(0)->d;
    const auto count = static_cast<uint32_t>(N);
    std::vector<double> left, right;  // [16][rows of left], [16][N]
    uint32_t rows = 16, first = 0;    // of left, and where the warp's begin
    if (a_registers) {
      left.resize(256);
      double fragment[16][16];
      gather_a(fragment, is_bf16, [&](int l, int r) { return lane(l)->a[r]; });
      for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k) left[static_cast<size_t>(k * 16 + row)] = fragment[row][k];
      for (int l = 0; l < 32; ++l) {
        part.a_registers[l] = lane(l)->a;
        part.a_values.insert(part.a_values.end(), lane(l)->a, lane(l)->a + 4);
      }
    } else {
      rows = 64, first = 16 * static_cast<uint32_t>(current->warp % 4);
      read_operand(operand(a, a_mn_major, "A", site), rows, is_bf16, left, part, site);
    }
    read_operand(operand(b, b_mn_major, "B", site), count, is_bf16, right, part, site);

    auto [entry, is_new] = w.accumulators.try_emplace(part.accumulators);
    Accumulators& acc = entry->second;
    const size_t each = count / 2;
    if (is_new) {
      acc.N = N;
      acc.value.resize(32 * each);
      for (size_t l = 0; l < 32; ++l) {
        acc.registers[l] = lane(static_cast<int>(l))->d;
        std::copy_n(acc.registers[l], each, &acc.value[l * each]);
        std::memset(acc.registers[l], kPoison, each * sizeof(float));
      }
    }
    if (acc.N != N)
      fail(site, text("wgmma: these accumulators are in use by one with N = ", acc.N, ", got ", N));
    ++acc.users;

    std::vector<double> sum(count);
    for (uint32_t row = 0; row < 16; ++row) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (uint32_t k = 0; k < 16; ++k) {
        const double factor = left[k * rows + first + row], *column = &right[size_t{k} * count];
        for (uint32_t n = 0; n < count; ++n) sum[n] += factor * column[n];
      }
      for (uint32_t n = 0; n < count; ++n) {
        float& to = acc.value[(4 * (row % 8) + n % 8 / 2) * each + n / 8 * 4 + row / 8 * 2 + n % 2];
        to = static_cast<float>((accumulate ? to : 0.0) + sum[n]);
      }
    }
    ++grid().counters.wgmma;
    grid().counters.flops += int64_t{2} * 16 * N * 16;
    w.open.push_back(std::move(part));
  });
}

std::string Issue::text() const {
  return emulator::text("m64n", N, "k16 of ", at(site), ", operands ", static_cast<int64_t>(a), " ",
                        static_cast<int64_t>(b), ", accumulate ", accumulate);
}

void check_matrices(Block& block) {
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const Warp& warp = block.warps[w];
    if (!warp.open.empty() || !warp.groups.empty())
      throw std::runtime_error(
          text("emulator: ", block.grid->name, ", warp ", w,
               ": the block ends before wgmma_wait for the wgmma of ",
               at(warp.open.empty() ? warp.groups.front().front().site : warp.open.front().site)));
    const auto& first = block.warps[w / 4 * 4].issued;
    for (size_t i = 0; i < std::max(warp.issued.size(), first.size()); ++i) {
      const auto of = [i](const std::vector<Issue>& issued) {
        return i < issued.size() ? issued[i].text() : std::string("nothing");
      };
      if (i < warp.issued.size() && i < first.size() && warp.issued[i] == first[i]) continue;
      const std::string mine = of(warp.issued), theirs = of(first);
      throw std::runtime_error(text("emulator: ", block.grid->name, ": divergent wgmma ", i, ": warp ",
                                    w / 4 * 4, " issues ", theirs, ", warp ", w, " of its warpgroup ", mine));
    }
  }
}

}  // namespace flextron::emulator
