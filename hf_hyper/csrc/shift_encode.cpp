// Encoder of `shift`, format 1: which circular bit string decodes closest to a tile of 256 weights.
//
// DEFINITION. All arithmetic is on integers, so that every instruction set, thread count and reimplementation returns
// the same bytes. k = bits, sums[s] = byte sum of state s, mean and deviation those of sums over all 2^16 states.
//
// Units. scale = 32, 32, 48, 48 for k = 1..4 and 2^(k-4) above.
//   T[s] = (sums[s] - 510) * scale                                               table entry of a state
//   u    = round_half_even((w * deviation + mean - 510) * scale), in float64     target of a weight w
//   k <= 4: u clamped to [-32767, 32767];  d = T - u clamped to [-32768, 32767];  branch = (d*d + 2^14) >> 15
//   k >= 5: u clamped to [min T - 128, max T + 128];  d = min(|T - u|, 255);      branch = d*d
// The scales make the best path cost 7 to 200 a weight: against a full search in float32 the error grows by less than
// 0.1 %, at 8 bits by 0.2 % (160 Gaussian tiles). A sum of costs saturates at 65535. After each step, if the lowest
// cost is 4096 or more, it is subtracted from all.
//
// Full search, L' = 16. A class c is the low 16-k bits of a state. After a weight with target u
//   cost'[c] = min over h < 2^k of cost[(h * 2^(16-k) + c) >> k] + branch(T[h * 2^(16-k) + c], u),
// the lowest h on a tie.
// Ring: the low 16-k bits of the last state must be those that the first state began with.
//   Pass 1 runs over the weights 256-n..255, 0..n-1 with n = 8 * ceil(16 / k), all costs 0 at its start, and traces
//   back from the cheapest last class (the lowest one on a tie) to the seam between the weights 255 and 0: the
//   class of the seam. Half that n costs 1 to 1.5 % of error.
//   Pass 2 runs over the weights 0..255 from cost 0 in the seam's class and 65535 in all others, and traces back from
//   the seam's class.
//
// Survivor search, L' < 16. L' is raised to min(16, 2k); if that makes it 16 the search is the full one. R = L' - k. A
// class c is the low R bits of a window of 16 bits, and each class keeps one window W[c], from which the older bits of
// its states come. With p(h) = (h * 2^R + c) >> k and s(h) = (W[p(h)] * 2^k + c mod 2^k) mod 2^16
//   cost'[c] = min over h < 2^k of cost[p(h)] + branch(T[s(h)], u),   W'[c] = s(h chosen),   the lowest h on a tie.
// Ring: pass 1 as above, with n = 4 * ceil(16 / k), from W[c] = c; the seam is the low 16-k bits of the window there.
//   Pass 2 starts from W = the seam at its low R bits. It ends q = floor((16-k) / k) weights early, because the last q
//   symbols and the low b = (16-k) mod k bits of the symbol before them must repeat the seam. Towards that end it keeps
//   more and more windows: after a step with f steps to go, R = max(L' - k, 16-k - floor(f / 4)), and in a step where R
//   grows by one, h runs to 2^(k-1) only. Each window left whose low b bits are the seam's highest b bits is then
//   extended by the q symbols, its branches added to its cost without saturation, and the cheapest is traced back (the
//   lowest class on a tie). Widening takes a quarter more time at L' = 12 and k = 4 and 5 % off the error.
//
// Tails, k >= 5. If |T - u| >= 255 anywhere on the path found, the search could not tell far from farther there (at 8
// bits 0.1 deviations; one tile in a hundred). It is repeated with scale / 2, /4 ... down to 1 until that is no longer
// so, and of all paths found the one of least sum of (T - u)^2 in the first units wins, the earliest on a tie.
//
// Symbol t is the low k bits of the class after weight t. Position p = t*k + j of the string is bit j of symbol t
// counted from its most significant, and lies in word p / 32, most significant bit first.
#include "shift_encode.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "shift_full_search.h"
#include "shift_survivor_search.h"
#include "thread_pool.h"

namespace hyper {
namespace {

void pack(const uint8_t* symbols, int bits, uint32_t* words) {
  uint64_t pending = 0;
  int held = 0;
  for (int t = 0; t < kTileWeights; ++t) {
    pending = pending << bits | symbols[t];
    held += bits;
    if (held >= 32) {
      held -= 32;
      *words++ = static_cast<uint32_t>(pending >> held);
    }
  }
}

// What the path of some symbols leaves: the squared error in table units, and whether a branch on it was clamped.
struct Residue {
  int64_t error;
  bool clamped;
};

Residue residue(const Code& code, const int16_t* targets, const uint8_t* symbols) {
  Residue out{0, false};
  int state = 0;
  for (int t = -kStateBits; t < kTileWeights; ++t) {
    state = (state << code.bits | symbols[t & (kTileWeights - 1)]) & (kStates - 1);
    if (t < 0) continue;
    const int64_t d = code.table[state] - targets[t];
    out.error += d * d;
    out.clamped |= std::abs(d) >= kMaxDistance;
  }
  return out;
}

// The encoder of one thread: the searches keep their workspace from tile to tile.
class Encoder {
 public:
  Encoder(const Code& code, const uint16_t* byte_sums) : code_(code), byte_sums_(byte_sums) {}

  // weights [count][256] -> codes [count][8 * bits], count up to kTogether
  void encode(const float* weights, int count, uint32_t* codes) {
    for (int i = 0; i < count * kTileWeights; ++i) {
      targets_[i / kTileWeights][i % kTileWeights] = code_.target(weights[i]);
    }
    if (code_.full()) {
      std::unique_ptr<FullSearch>& search = full_[count - 1];
      if (!search) search.reset(new FullSearch(code_, count));
      search->encode(targets_, symbols_);
    } else {
      if (!survivors_) survivors_.reset(new SurvivorSearch(code_));
      for (int i = 0; i < count; ++i) survivors_->encode(targets_[i], symbols_[i]);
    }
    for (int i = 0; i < count; ++i) {
      if (code_.bits > 4) mend_tails(weights + i * kTileWeights, targets_[i], symbols_[i]);
      pack(symbols_[i], code_.bits, codes + i * 8 * code_.bits);
    }
  }

  static constexpr int kTogether = 2;

 private:
  void mend_tails(const float* weights, const int16_t* targets, uint8_t* symbols) const {
    Residue best = residue(code_, targets, symbols);
    bool clamped = best.clamped;
    for (int scale = code_.scale / 2; clamped && scale >= 1; scale /= 2) {
      const Code coarse(code_.bits, code_.class_bits + code_.bits, byte_sums_, scale);
      int16_t coarse_targets[1][kTileWeights];
      uint8_t found[1][kTileWeights];
      for (int t = 0; t < kTileWeights; ++t) coarse_targets[0][t] = coarse.target(weights[t]);
      if (coarse.full()) {
        FullSearch(coarse, 1).encode(coarse_targets, found);
      } else {
        SurvivorSearch(coarse).encode(coarse_targets[0], found[0]);
      }
      clamped = residue(coarse, coarse_targets[0], found[0]).clamped;
      const Residue now = residue(code_, targets, found[0]);
      if (now.error < best.error) {
        best = now;
        std::copy_n(found[0], kTileWeights, symbols);
      }
    }
  }

  const Code& code_;
  const uint16_t* byte_sums_;
  std::unique_ptr<FullSearch> full_[kTogether];
  std::unique_ptr<SurvivorSearch> survivors_;
  int16_t targets_[kTogether][kTileWeights];
  uint8_t symbols_[kTogether][kTileWeights];
};

}  // namespace

void encode_tiles(const float* tiles, int64_t n, int bits, int survivor_bits, const uint16_t* byte_sums, int threads,
                  uint32_t* codes) {
  const Code code(bits, survivor_bits, byte_sums, kScale[bits]);
  WorkCounter work(n, Encoder::kTogether);
  const int64_t runs = (n + Encoder::kTogether - 1) / Encoder::kTogether;
  run_on_threads(static_cast<int>(std::min<int64_t>(threads, runs)), [&] {
    Encoder encoder(code, byte_sums);
    int64_t begin, end;
    while (work.take(&begin, &end)) {
      encoder.encode(tiles + begin * kTileWeights, static_cast<int>(end - begin), codes + begin * 8 * bits);
    }
  });
}

}  // namespace hyper
