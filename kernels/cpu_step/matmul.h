// The one matrix kernel: a few rows times a few panels of 16 columns, for decode, prefill and attention scores alike.
//
// Every output is one accumulator that runs over the words of its row from first to last, whatever the tile around it:
// the number of rows, the panels beside it and the thread do not change a bit of it.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "simd.h"

namespace matmul {

using simd::Bits;
using simd::Lanes;
using simd::LANES;
using simd::TILE;

constexpr int MOST_ROWS = TILE;
constexpr int MOST_PANELS = TILE >= 16 ? 4 : 2;
constexpr int AHEAD = 1024;  // words from what is being multiplied to what is being fetched
constexpr int BLOCK_ROWS = TILE >= 6 ? TILE / 2 : TILE;  // of many rows: so that a tile is two panels wide

// Panels that a tile of so many rows takes at once.
constexpr int panels_beside(int rows) { return std::max(1, std::min(MOST_PANELS, TILE / rows)); }

// Into the second-level cache. Into the first was measured to be slower, whether weights or keys: on a Zen 4 core,
// attention of 16 sequences took 1.6 times as long.
INLINE void fetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// rows[r · stride + k], panels[p][k · 16 + column] → out[r · out_stride + p · 16 + column], all in words.
// While it reads panels[p] it fetches soon[p], which as much as soon will be read.
typedef void (*Kernel)(const uint32_t* rows, size_t stride, const uint32_t* const* panels, const uint32_t* const* soon,
                       int words, float* out, size_t out_stride);

template <class T, int ROWS, int PANELS>
void tile(const uint32_t* rows, size_t stride, const uint32_t* const* panels, const uint32_t* const* soon, int words,
          float* out, size_t out_stride) {
    Lanes sums[ROWS][PANELS];
    const uint32_t* row[(ROWS + 2) / 3];  // every third row; its neighbours are reached by address arithmetic
    const uint32_t *panel[PANELS], *next[PANELS];
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r += 3) row[r / 3] = rows + r * stride;
#pragma GCC unroll 32
    for (int p = 0; p < PANELS; p++) panel[p] = panels[p], next[p] = soon[p];
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 32
        for (int p = 0; p < PANELS; p++) sums[r][p] = simd::zero();
    for (int k = 0; k < words; k++) {
        Bits columns[PANELS];
#pragma GCC unroll 32
        for (int p = 0; p < PANELS; p++) {
            const uint32_t* const at = panel[p] + (size_t)k * LANES;
            columns[p] = simd::load<Bits>(at);
            fetch(next[p] + (size_t)k * LANES);
        }
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; r++) {
            const uint32_t word = row[r / 3][r % 3 * stride + k];
#pragma GCC unroll 32
            for (int p = 0; p < PANELS; p++) sums[r][p] = T::dot(sums[r][p], word, columns[p]);
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 32
        for (int p = 0; p < PANELS; p++) simd::store(out + r * out_stride + p * LANES, sums[r][p]);
}

// [rows − 1][0]: one panel; [rows − 1][1]: as many as fit beside so many rows.
template <class T, int... ROW>
constexpr std::array<std::array<Kernel, 2>, MOST_ROWS> kernels(std::integer_sequence<int, ROW...>) {
    return {{{tile<T, ROW + 1, 1>, tile<T, ROW + 1, panels_beside(ROW + 1)>}...}};
}

// A few rows times any number of panels.
template <class T>
void rows_by_panels(const uint32_t* rows, size_t stride, int row_count, const uint32_t* const* panels,
                    const uint32_t* const* soon, int panel_count, int words, float* out, size_t out_stride) {
    static constexpr auto table = kernels<T>(std::make_integer_sequence<int, MOST_ROWS>{});
    const int wide = panels_beside(row_count);
    for (int p = 0; p < panel_count;) {
        const bool fits = p + wide <= panel_count;
        table[row_count - 1][fits](rows, stride, panels + p, soon + p, words, out + p * LANES, out_stride);
        p += fits ? wide : 1;
    }
}

// A linear layer cut into pieces for threads. Weights: [columns / 16][words][16] words; where the type is SCALED, the
// factors of its columns stand behind each panel.
template <class M>
struct Linear {
    const uint32_t* weights;
    int panels, words;

    // How `rows` rows are cut: into blocks of at most block_rows, of which a piece takes blocks_per_piece.
    struct Cut {
        int rows, block_rows, rows_per_piece, panels_per_piece, row_pieces, pieces;
    };

    Cut cut(int rows) const {
        if (rows == 0) return {};
        const int most = rows <= MOST_ROWS ? MOST_ROWS : BLOCK_ROWS;
        const int blocks = (rows + most - 1) / most;
        Cut c{};
        c.rows = rows;
        c.block_rows = (rows + blocks - 1) / blocks;
        c.rows_per_piece = c.block_rows * 8;
        c.panels_per_piece = rows <= MOST_ROWS ? MOST_PANELS : panels_beside(c.block_rows);
        c.row_pieces = (rows + c.rows_per_piece - 1) / c.rows_per_piece;
        c.pieces = c.row_pieces * ((panels + c.panels_per_piece - 1) / c.panels_per_piece);
        return c;
    }

    // Calls finish(row, panel, sums) for each row and panel of a piece.
    template <class Finish>
    void run(const Cut& c, int piece, const uint32_t* input, size_t stride, Finish finish) const {
        const int first_row = piece % c.row_pieces * c.rows_per_piece;
        const int last_row = std::min(c.rows, first_row + c.rows_per_piece);
        const int first = piece / c.row_pieces * c.panels_per_piece;
        const int count = std::min(c.panels_per_piece, panels - first);
        const uint32_t *panel[MOST_PANELS], *soon[MOST_PANELS];
        for (int p = 0; p < count; p++) {
            panel[p] = weights + (size_t)(first + p) * (words + M::SCALED) * LANES;
            soon[p] = panel[p] + AHEAD;
        }
        alignas(64) float out[MOST_ROWS * MOST_PANELS * LANES];
        for (int row = first_row; row < last_row; row += c.block_rows) {
            const int block = std::min(c.block_rows, last_row - row);
            const uint32_t* const rows = input + row * stride;
            rows_by_panels<M>(rows, stride, block, panel, soon, count, words, out, count * LANES);
            for (int r = 0; r < block; r++)
                for (int p = 0; p < count; p++) {
                    Lanes sums = simd::load<Lanes>(out + (r * count + p) * LANES);
                    if constexpr (M::SCALED)
                        sums = M::scaled(sums, M::row(rows + r * stride + words),
                                         simd::load<Lanes>(panel[p] + (size_t)words * LANES));
                    finish(row + r, first + p, sums);
                }
        }
    }
};

}  // namespace matmul
