// Nearest node of `winding` for every point of the plane, the same as a search through all nodes.
//
// DEFINITION. index = the lowest j that minimises dx * dx + dy * dy, dx = point.x - node.x, dy = point.y - node.y, each
// operation rounded to float32 by itself (no fused multiply-add). Nothing else decides, so every machine agrees.
//
// A grid covers the points. A cell lists the nodes that can be nearest to some point in it, or, where these are many,
// names a finer grid. A node is left out of a cell when another one beats it everywhere in the cell by more than rounding
// can undo:
//
//     +-----+-----+-----+          The difference of two squared distances is linear in the point, so its least value
//     |  a  |  b  | c d |          over a cell is known exactly from the centre and the half sides.
//     +-----+-----+--+--+
//     |  e  | e f |  |g |          Cells are tested a little larger than they are, so that a point which rounding puts
//     +-----+-----+--+--+          into the neighbour's cell still finds its node.
//
// Lists are made by halving: those of four quarters come from that of the whole.
#include "winding.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "thread_pool.h"

namespace hyper {
namespace {

constexpr int kMaxHalvings = 10;      // of the first grid
constexpr int kFineHalvings = 2;      // of the grids that refine a cell
constexpr int kLongList = 12;         // lists up to this length are not refined
constexpr size_t kEntriesPerNode = 64;  // in all lists together, about: nodes on a circle are all near its centre
constexpr size_t kRivals = 128;       // entries of a list among which the one to beat is sought
constexpr int64_t kRun = 4096;        // points dealt to a thread at a time
constexpr double kOverlap = 0.01;     // of a cell's side, by which it is tested larger
constexpr double kRounding = 1e-5;    // relative; float32 distances are within 1e-6 of exact ones
constexpr double kUnderflow = 1e-30;  // absolute; squares below 1e-38 lose digits
constexpr double kResolution = 1e-6;  // relative to the largest coordinate; float32 steps are 1e-7

struct Rectangle {
  double x, y, half_x, half_y;  // centre and half sides
};

struct Cell {
  uint32_t first;  // place of its list in entries_, or the grid that refines it
  int32_t count;  // length of its list, or -1
};

struct Grid {
  float x, y;            // lower corner
  float per_x, per_y;    // cells per unit
  int side;              // cells in each direction
  size_t first_cell;     // place of the cells, row by row, in cells_
  double width, height;  // of one cell
};

struct Entry {
  float x, y;
  int32_t id;
};

class NodeGrids {
 public:
  NodeGrids(const float* nodes, int64_t count, const Rectangle& bounds, int64_t points) {
    magnitude_ = std::max(std::abs(bounds.x) + bounds.half_x, std::abs(bounds.y) + bounds.half_y);
    std::vector<Entry> all(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) all[i] = {nodes[2 * i], nodes[2 * i + 1], static_cast<int32_t>(i)};
    // About two cells a node, and no more cells than pay for themselves.
    const int64_t wanted = std::min(2 * count, points);
    int halvings = 0;
    while (halvings < kMaxHalvings && int64_t{1} << (2 * halvings) < wanted) ++halvings;
    most_entries_ = kEntriesPerNode * static_cast<size_t>(std::max(count, wanted));
    add_grid(bounds, halvings, all);
    // Breadth first, so that the limit on cells drops the finest grids.
    const size_t most_cells = static_cast<size_t>(8 * wanted) + cells_.size();
    std::vector<Entry> list;
    for (size_t grid = 0; grid < grids_.size(); ++grid) {
      const Grid coarse = grids_[grid];
      for (int cell = 0; cell < coarse.side * coarse.side && cells_.size() < most_cells; ++cell) {
        if (entries_.size() > most_entries_) return;
        const Cell found = cells_[coarse.first_cell + cell];
        const Rectangle area = area_of(coarse, cell % coarse.side, cell / coarse.side, 1);
        if (found.count <= kLongList || !divisible(area)) continue;
        list.assign(entries_.begin() + found.first, entries_.begin() + found.first + found.count);
        cells_[coarse.first_cell + cell] = {static_cast<uint32_t>(grids_.size()), -1};
        add_grid(area, kFineHalvings, list);
      }
    }
  }

  int32_t nearest(float x, float y) const {
    const Grid* grid = grids_.data();
    Cell cell;
    for (;;) {
      const int column = step(x - grid->x, grid->per_x, grid->side), row = step(y - grid->y, grid->per_y, grid->side);
      cell = cells_[grid->first_cell + row * grid->side + column];
      if (cell.count >= 0) break;
      grid = grids_.data() + cell.first;
    }
    const Entry* const list = entries_.data() + cell.first;
    float least = std::numeric_limits<float>::infinity();
    int32_t best = 0;
    for (int32_t i = 0; i < cell.count; ++i) {
      const float dx = x - list[i].x, dy = y - list[i].y;
      const float distance = dx * dx + dy * dy;
      best = distance < least ? list[i].id : best;
      least = distance < least ? distance : least;
    }
    return best;
  }

 private:
  // Cell along one side of a grid, never outside it.
  static int step(float offset, float per_unit, int side) {
    const float position = offset * per_unit;
    return position >= static_cast<float>(side - 1) ? side - 1 : position > 0.0f ? static_cast<int>(position) : 0;
  }

  // The square of `size` cells whose lowest one is (column, row).
  static Rectangle area_of(const Grid& grid, int column, int row, int size) {
    return {grid.x + (column + 0.5 * size) * grid.width, grid.y + (row + 0.5 * size) * grid.height,
            0.5 * size * grid.width, 0.5 * size * grid.height};
  }

  // Whether float32 still tells the cells of a finer grid apart.
  bool divisible(const Rectangle& area) const {
    const double half = std::max(area.half_x, area.half_y);
    return half > 100 * kResolution * magnitude_ && half > kUnderflow;
  }

  void add_grid(const Rectangle& area, int halvings, const std::vector<Entry>& list) {
    Grid grid;
    grid.side = 1 << halvings;
    grid.x = static_cast<float>(area.x - area.half_x);
    grid.y = static_cast<float>(area.y - area.half_y);
    grid.width = 2 * area.half_x / grid.side;
    grid.height = 2 * area.half_y / grid.side;
    grid.per_x = grid.width > kUnderflow ? static_cast<float>(1 / grid.width) : 0.0f;
    grid.per_y = grid.height > kUnderflow ? static_cast<float>(1 / grid.height) : 0.0f;
    grid.first_cell = cells_.size();
    cells_.resize(cells_.size() + static_cast<size_t>(grid.side) * grid.side);
    grids_.push_back(grid);
    fill(grid, 0, 0, grid.side, list);
  }

  // Writes the lists of a square of `size` cells, given one that serves all of it. Where lists have grown too long
  // already, all cells of the square share that one.
  void fill(const Grid& grid, int column, int row, int size, const std::vector<Entry>& list) {
    if (size == 1 || entries_.size() + 4 * list.size() > most_entries_) {
      if (entries_.size() + list.size() > std::numeric_limits<uint32_t>::max()) throw std::bad_alloc();
      const Cell shared{static_cast<uint32_t>(entries_.size()), static_cast<int32_t>(list.size())};
      entries_.insert(entries_.end(), list.begin(), list.end());
      for (int r = row; r < row + size; ++r) {
        std::fill_n(cells_.begin() + grid.first_cell + static_cast<size_t>(r) * grid.side + column, size, shared);
      }
      return;
    }
    const int half = size / 2;
    std::vector<Entry> kept;
    kept.reserve(list.size());
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int x = column + quarter % 2 * half, y = row + quarter / 2 * half;
      Rectangle area = area_of(grid, x, y, half);
      area.half_x += kOverlap * grid.width + kResolution * magnitude_;
      area.half_y += kOverlap * grid.height + kResolution * magnitude_;
      keep_candidates(area, list, &kept);
      fill(grid, x, y, half, kept);
    }
  }

  // The entries of `list` that one of them, near the centre, does not beat all over the rectangle, in the same order.
  static void keep_candidates(const Rectangle& area, const std::vector<Entry>& list, std::vector<Entry>* kept) {
    Entry rival = list.front();
    double least = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < list.size(); i += 1 + list.size() / kRivals) {
      const double dx = list[i].x - area.x, dy = list[i].y - area.y;
      const double distance = dx * dx + dy * dy;
      if (distance < least) {
        least = distance;
        rival = list[i];
      }
    }
    const double from_x = rival.x - area.x, from_y = rival.y - area.y;
    const double far_x = std::abs(from_x) + area.half_x, far_y = std::abs(from_y) + area.half_y;
    const double margin = kRounding * (far_x * far_x + far_y * far_y) + kUnderflow;
    kept->resize(list.size());
    size_t count = 0;
    for (const Entry& entry : list) {
      const double step_x = static_cast<double>(entry.x) - rival.x, step_y = static_cast<double>(entry.y) - rival.y;
      const double at_centre = step_x * (step_x + 2 * from_x) + step_y * (step_y + 2 * from_y);
      const double lead = at_centre - 2 * (std::abs(step_x) * area.half_x + std::abs(step_y) * area.half_y);
      const bool repeats_rival = (step_x == 0.0) & (step_y == 0.0) & (entry.id > rival.id);
      (*kept)[count] = entry;
      count += (lead <= margin) & !repeats_rival;
    }
    kept->resize(count);
  }

  double magnitude_;  // largest coordinate of a point
  size_t most_entries_;  // beyond which lists are shared
  std::vector<Grid> grids_;
  std::vector<Cell> cells_;
  std::vector<Entry> entries_;  // the lists, each in ascending order of id
};

// Smallest rectangle around the points; false if one is NaN or infinite.
bool bounds_of(const float* points, int64_t n, Rectangle* bounds) {
  float low[2] = {points[0], points[1]}, high[2] = {points[0], points[1]};
  float poison = 0.0f;  // 0 * NaN and 0 * infinity are NaN
  for (int64_t i = 0; i < n; ++i) {
    for (int axis = 0; axis < 2; ++axis) {
      const float value = points[2 * i + axis];
      poison += 0.0f * value;
      low[axis] = value < low[axis] ? value : low[axis];
      high[axis] = value > high[axis] ? value : high[axis];
    }
  }
  *bounds = {0.5 * low[0] + 0.5 * high[0], 0.5 * low[1] + 0.5 * high[1], 0.5 * high[0] - 0.5 * low[0],
             0.5 * high[1] - 0.5 * low[1]};
  return poison == 0.0f;
}

}  // namespace

bool nearest_nodes(const float* points, int64_t n, const float* nodes, int64_t num_nodes, int threads,
                   int32_t* index) {
  Rectangle bounds, unused;
  if (!bounds_of(points, n, &bounds) || !bounds_of(nodes, num_nodes, &unused)) return false;
  const NodeGrids grids(nodes, num_nodes, bounds, n);
  WorkCounter work(n, kRun);
  run_on_threads(threads, [&] {
    int64_t begin, end;
    while (work.take(&begin, &end)) {
      for (int64_t i = begin; i < end; ++i) index[i] = grids.nearest(points[2 * i], points[2 * i + 1]);
    }
  });
  return true;
}

}  // namespace hyper
