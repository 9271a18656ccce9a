// The phases of a step (celo2/phases.py) on whole float32 matrices of a CPU: two reads of a matrix's state, one write.
//
// celo2/backends/compiled.py compiles this file on the machine where it runs, and fills the tables. HIDDEN0 and HIDDEN1
// are the widths of theta's hidden layers. A phase goes over tiles of all matrices at once. Every tile has places of its
// own for its sums, and they are added up in order: results do not depend on the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * LANES)));
// the same in memory, at any address of a float
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr int COLUMNS = 18;
// a column's sum within a tile is in float32
constexpr int64_t TILE_COLUMNS = 4096, TILE_ROWS = 256, TILE = 65536;
// additions in float32 before a sum goes on in float64
constexpr int FLUSH = 64;

constexpr float GRADIENT_CLIP = 1000.0f, FEATURE_CLIP = 0.1f;
constexpr float MOMENTUM_RATES[3] = {1 - 0.9, 1 - 0.99, 1 - 0.999};
constexpr float SECOND_MOMENT_DECAY = 0.95f, SECOND_MOMENT_RATE = 1 - 0.95;
constexpr float FACTOR_DECAYS[3] = {0.9f, 0.99f, 0.999f}, FACTOR_RATES[3] = {1 - 0.9, 1 - 0.99, 1 - 0.999};
constexpr float SQUARE_EPS = 1e-30f, FACTOR_EPS = 1e-9f, RMS_EPS = 1e-8f;
constexpr double NORM_EPS = 1e-9;

// the fields of celo2.folded.FoldedTheta, one after another
struct Theta {
    float element[COLUMNS][HIDDEN0], of_short[6][HIDDEN0], of_long[6][HIDDEN0], bias0[HIDDEN0];
    float hidden[HIDDEN1][HIDDEN0], bias1[HIDDEN1], output[HIDDEN1], bias2;
};

// MATRIX in compiled.py
struct Matrix {
    float *p, *g, *momenta[3], *v;
    int64_t p_stride, g_stride, momentum_strides[3], v_stride;  // between rows, in elements; columns have 1
    float *row_factor, *column_factor;                          // [rows][3], [columns][3]
    const Theta* theta;
    int64_t rows, columns;
    float *row_sums, *column_sums;  // of g^2: [tiles of columns][rows], [tiles of rows][columns]
    double *squares, *features, *direction_squares;  // [tiles], [tiles][COLUMNS], [tiles]
    float *row_terms, *column_terms;                 // [rows][3 + HIDDEN0], [3 + HIDDEN0][columns]
    float* direction;                                // [rows][columns]
    float scale, lr, weight_decay, moves;
    int64_t clip;
    int64_t ns_steps;  // 0: no Newton-Schulz; -1: it and phase 4 are not done here
};

struct Tile {
    const Matrix* matrix;
    int64_t index, row_tile, column_tile, first_row, last_row, first_column, last_column;
};

struct Tiling {
    int64_t tile_rows, row_tiles, column_tiles;
    explicit Tiling(const Matrix& a) {
        int64_t tile_columns = std::min(a.columns, TILE_COLUMNS);
        tile_rows = std::clamp<int64_t>(TILE / tile_columns, 1, TILE_ROWS);
        row_tiles = (a.rows + tile_rows - 1) / tile_rows;
        column_tiles = (a.columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    }
    int64_t count() const { return row_tiles * column_tiles; }
};

std::vector<Tile> tiles_of(const Matrix* matrices, int64_t count) {
    std::vector<Tile> tiles;
    for (const Matrix* a = matrices; a != matrices + count; ++a) {
        Tiling tiling(*a);
        for (int64_t i = 0; i < tiling.count(); ++i) {
            int64_t r = i / tiling.column_tiles, c = i % tiling.column_tiles;
            int64_t row = r * tiling.tile_rows, column = c * TILE_COLUMNS;
            tiles.push_back({a, i, r, c, row, std::min(a->rows, row + tiling.tile_rows), column,
                             std::min(a->columns, column + TILE_COLUMNS)});
        }
    }
    return tiles;
}

// Do work(0) to work(count - 1) on this thread and others. Nobody waits for a thread that has not begun: on a busy
// machine it may be long in coming, and the others do its part.
template <class Work>
void share(int64_t count, int64_t threads, const Work& work) {
    struct Shared {
        std::atomic<int64_t> next{0}, done{0};
        std::atomic<bool> failed{false};
        std::mutex mutex;
        std::condition_variable all_done;
    };
    auto shared = std::make_shared<Shared>();
    // a late thread finds nothing to do, and does not touch `work`, which is gone by then
    auto take = [shared, count, &work] {
        for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
            try {
                work(i);
            } catch (...) {
                shared->failed = true;
            }
            if (shared->done.fetch_add(1) + 1 == count) {
                std::lock_guard<std::mutex> lock(shared->mutex);
                shared->all_done.notify_one();
            }
        }
    };
    try {
        for (int64_t i = 1; i < std::min(threads, count); ++i) std::thread(take).detach();
    } catch (const std::exception&) {
        // no more threads are to be had
    }
    take();
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->all_done.wait(lock, [&] { return shared->done.load() >= count; });
    if (shared->failed) throw std::bad_alloc();
}

// Add up what every tile has of `width` sums, in order, in the place of the first one.
void add_up(double* sums, int64_t tiles, int64_t width) {
    for (int64_t i = 1; i < tiles; ++i)
        for (int64_t c = 0; c < width; ++c) sums[c] += sums[i * width + c];
}

inline Vec splat(float x) { return Vec{} + x; }
// a NaN in the first one stays
inline Vec least(Vec a, Vec b) { return b < a ? b : a; }
inline Vec most(Vec a, Vec b) { return a < b ? b : a; }
inline Vec clamp(Vec x, float limit) { return most(least(x, splat(limit)), splat(-limit)); }

inline Vec inverse_root(Vec x) {
#if defined(__AVX512F__)
    return 1.0f / (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
    return 1.0f / (Vec)_mm256_sqrt_ps((__m256)x);
#else
    float root[LANES];
    std::memcpy(root, &x, sizeof(x));
    for (int lane = 0; lane < LANES; ++lane) root[lane] = std::sqrt(root[lane]);
    std::memcpy(&x, root, sizeof(x));
    return 1.0f / x;
#endif
}

// `count` elements; the lanes beyond them are zero
template <bool PART>
inline Vec load(const float* from, int64_t count) {
    if (!PART) return *reinterpret_cast<const Loose*>(from);
    Vec x{};
    std::memcpy(&x, from, sizeof(float) * count);
    return x;
}

template <bool PART>
inline void store(float* to, Vec x, int64_t count) {
    if (PART)
        std::memcpy(to, &x, sizeof(float) * count);
    else
        *reinterpret_cast<Loose*>(to) = x;
}

inline double sum(Vec x) {
    double total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

// Call body(column, lanes, whether these are fewer than LANES) for the columns of a tile.
template <class Body>
inline void each_vector(const Tile& tile, const Body& body) {
    int64_t column = tile.first_column;
    for (; column + LANES <= tile.last_column; column += LANES) body(column, LANES, std::false_type{});
    if (column < tile.last_column) body(column, tile.last_column - column, std::true_type{});
}

// phase 1: sums of g^2 by row and column, of clamp(scale g) where an element may exceed the clip
void gradient_moments(const Tile& tile) {
    const Matrix& a = *tile.matrix;
    float* column_sums = a.column_sums + tile.row_tile * a.columns;
    std::fill(column_sums + tile.first_column, column_sums + tile.last_column, 0.0f);
    double total = 0;
    for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
        const float* g = a.g + row * a.g_stride;
        Vec row_sum{};
        each_vector(tile, [&](int64_t column, int64_t lanes, auto part) {
            Vec x = load<part>(g + column, lanes);
            if (a.clip) x = clamp(x * a.scale, GRADIENT_CLIP);
            x *= x;
            row_sum += x;
            store<part>(column_sums + column, load<part>(column_sums + column, lanes) + x, lanes);
        });
        double of_row = sum(row_sum);
        a.row_sums[tile.column_tile * a.rows + row] = of_row;
        total += of_row;
    }
    a.squares[tile.index] = total;
}

// New factors of one axis, which has `length` elements of `across` each; returns whether there was ever a gradient.
bool advance_factor(float* factor, const float* sums, int64_t parts, int64_t length, int64_t across, float square_scale,
                    double* means) {
    double old = 0, now = 0;
    std::vector<double> square(length, 0.0);
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = 0; i < length; ++i) square[i] += sums[part * length + i];
    for (int64_t i = 0; i < length; ++i) {
        now += square[i];
        for (int k = 0; k < 3; ++k) old += factor[3 * i + k];
    }
    bool started = now > 0 || old > 0;
    for (int k = 0; k < 3; ++k) means[k] = 0;
    for (int64_t i = 0; i < length; ++i) {
        float mean = float(square[i] / across) * square_scale + SQUARE_EPS;
        for (int k = 0; k < 3; ++k) {
            float& value = factor[3 * i + k];
            value = started ? FACTOR_DECAYS[k] * value + FACTOR_RATES[k] * mean : 0.0f;
            means[k] += double(value) / length;
        }
    }
    return started;
}

// What rows or columns give to each element: three scales, and terms of the first layer [HIDDEN0]; `stride` between the
// values of an element, `step` between elements. The longer axis gives the bias as well.
void vector_terms(const float* factor, int64_t length, const double* short_means, const float (*weights)[HIDDEN0],
                  const float* bias, float* terms, int64_t step, int64_t stride) {
    double squares[6] = {};
    auto column = [&](int64_t i, int c) {
        float value = factor[3 * i + c % 3];
        return c < 3 ? value : 1.0f / std::sqrt(value + RMS_EPS);
    };
    for (int64_t i = 0; i < length; ++i)
        for (int c = 0; c < 6; ++c) squares[c] += double(column(i, c)) * column(i, c);
    float normaliser[6];
    for (int c = 0; c < 6; ++c) normaliser[c] = 1.0 / std::sqrt(squares[c] / length + NORM_EPS);
    for (int64_t i = 0; i < length; ++i) {
        float *out = terms + i * step, term[HIDDEN0];
        for (int k = 0; k < 3; ++k) {
            float value = factor[3 * i + k];
            if (short_means != nullptr) value /= float(short_means[k]) + FACTOR_EPS;
            out[k * stride] = 1.0f / std::sqrt(std::max(value, FACTOR_EPS));
        }
        for (int unit = 0; unit < HIDDEN0; ++unit) term[unit] = bias == nullptr ? 0.0f : bias[unit];
        for (int c = 0; c < 6; ++c) {
            float value = column(i, c) * normaliser[c];
            for (int unit = 0; unit < HIDDEN0; ++unit) term[unit] += value * weights[c][unit];
        }
        for (int unit = 0; unit < HIDDEN0; ++unit) out[(3 + unit) * stride] = term[unit];
    }
}

// between phases 1 and 2: new factors, and what rows and columns give to each element
void factors(Matrix& a) {
    Tiling tiling(a);
    // sums of a clipped gradient are of the scaled one
    float square_scale = a.clip ? 1.0f : a.scale * a.scale;
    double row_means[3], column_means[3];
    bool started =
        advance_factor(a.row_factor, a.row_sums, tiling.column_tiles, a.rows, a.columns, square_scale, row_means);
    advance_factor(a.column_factor, a.column_sums, tiling.row_tiles, a.columns, a.rows, square_scale, column_means);
    a.moves = started ? 1.0f : 0.0f;
    // a square matrix counts axis 0 as the shorter
    bool rows_are_short = a.rows <= a.columns;
    const Theta& theta = *a.theta;
    vector_terms(a.row_factor, a.rows, rows_are_short ? row_means : nullptr,
                 rows_are_short ? theta.of_short : theta.of_long, nullptr, a.row_terms, 3 + HIDDEN0, 1);
    vector_terms(a.column_factor, a.columns, rows_are_short ? nullptr : column_means,
                 rows_are_short ? theta.of_long : theta.of_short, theta.bias0, a.column_terms, 1, a.columns);
}

// The 18 columns of celo2.folded.ELEMENT_ROWS for some elements of a row, of the new accumulators; not normalised.
template <bool PART>
inline void columns_of(const Matrix& a, int64_t row, int64_t column, int64_t lanes, Vec* x) {
    Vec g = clamp(load<PART>(a.g + row * a.g_stride + column, lanes) * a.scale, GRADIENT_CLIP);
    Vec v = load<PART>(a.v + row * a.v_stride + column, lanes);
    v = SECOND_MOMENT_DECAY * v + (SECOND_MOMENT_RATE * g) * g;
    Vec q = inverse_root(v + RMS_EPS);
    x[0] = g;
    x[4] = g * q;
    for (int k = 0; k < 3; ++k) {
        Vec m = load<PART>(a.momenta[k] + row * a.momentum_strides[k] + column, lanes);
        m += MOMENTUM_RATES[k] * (g - m);
        Vec factor = load<PART>(a.column_terms + k * a.columns + column, lanes) * a.row_terms[row * (3 + HIDDEN0) + k];
        x[1 + k] = m;
        x[5 + k] = m * q;
        x[8 + k] = g * factor;
        x[11 + k] = m * factor;
    }
    x[14] = clamp(g, FEATURE_CLIP);
    x[15] = load<PART>(a.p + row * a.p_stride + column, lanes);
    x[16] = v;
    x[17] = q;
}

// phase 2: sums of the squares of the 18 columns
void feature_sums(const Tile& tile) {
    const Matrix& a = *tile.matrix;
    double total[COLUMNS] = {};
    Vec sums[COLUMNS] = {};
    int pending = 0;
    auto flush = [&] {
        for (int c = 0; c < COLUMNS; ++c) {
            total[c] += sum(sums[c]);
            sums[c] = Vec{};
        }
        pending = 0;
    };
    for (int64_t row = tile.first_row; row < tile.last_row; ++row)
        each_vector(tile, [&](int64_t column, int64_t lanes, auto part) {
            Vec x[COLUMNS];
            columns_of<part>(a, row, column, lanes, x);
            if (part) {
                // q is not zero where there is no element
                std::memset(reinterpret_cast<float*>(&x[17]) + lanes, 0, sizeof(float) * (LANES - lanes));
            }
            for (int c = 0; c < COLUMNS; ++c) sums[c] += x[c] * x[c];
            if (++pending == FLUSH) flush();
        });
    flush();
    std::copy(total, total + COLUMNS, a.features + tile.index * COLUMNS);
}

// phase 3: write momenta and second moment, and the direction
void learned_update(const Tile& tile) {
    const Matrix& a = *tile.matrix;
    const Theta& theta = *a.theta;
    float first[COLUMNS][HIDDEN0];
    for (int c = 0; c < COLUMNS; ++c) {
        float normaliser = 1.0 / std::sqrt(a.features[c] / (double(a.rows) * a.columns) + NORM_EPS);
        for (int unit = 0; unit < HIDDEN0; ++unit) first[c][unit] = theta.element[c][unit] * normaliser;
    }
    double total = 0;
    Vec squares{};
    int pending = 0;
    for (int64_t row = tile.first_row; row < tile.last_row; ++row) {
        const float* row_term = a.row_terms + row * (3 + HIDDEN0) + 3;
        each_vector(tile, [&](int64_t column, int64_t lanes, auto part) {
            Vec x[COLUMNS], unit0[HIDDEN0];
            columns_of<part>(a, row, column, lanes, x);
            for (int k = 0; k < 3; ++k)
                store<part>(a.momenta[k] + row * a.momentum_strides[k] + column, x[1 + k], lanes);
            store<part>(a.v + row * a.v_stride + column, x[16], lanes);
            for (int unit = 0; unit < HIDDEN0; ++unit)
                unit0[unit] = load<part>(a.column_terms + (3 + unit) * a.columns + column, lanes) + row_term[unit];
            for (int c = 0; c < COLUMNS; ++c)
                for (int unit = 0; unit < HIDDEN0; ++unit) unit0[unit] += x[c] * first[c][unit];
            for (int unit = 0; unit < HIDDEN0; ++unit) unit0[unit] = most(unit0[unit], Vec{});
            Vec direction = splat(theta.bias2);
            for (int unit = 0; unit < HIDDEN1; ++unit) {
                Vec unit1 = splat(theta.bias1[unit]);
                for (int source = 0; source < HIDDEN0; ++source) unit1 += unit0[source] * theta.hidden[unit][source];
                direction += most(unit1, Vec{}) * theta.output[unit];
            }
            store<part>(a.direction + row * a.columns + column, direction, lanes);
            if (part)
                for (int64_t lane = lanes; lane < LANES; ++lane) direction[lane] = 0.0f;
            squares += direction * direction;
            if (++pending == FLUSH) {
                total += sum(squares);
                squares = Vec{};
                pending = 0;
            }
        });
    }
    a.direction_squares[tile.index] = total + sum(squares);
}

// Newton-Schulz of small matrices (celo2/newton_schulz.py): both forms, one matrix on one thread

constexpr float NS_COEFFICIENTS[3] = {3.4445f, -4.7750f, 2.0315f};
constexpr double NS_EPS = 1e-8;
constexpr int64_t FIRST_SEGMENT = 2, SEGMENT = 3;
constexpr int BLOCK_ROWS = 6, BLOCK_VECTORS = LANES == 16 ? 4 : 2;

// Rows are padded with zeros to whole vectors, and one vector more: powers of two fall into the same lines of a cache.
struct Dense {
    int64_t rows, columns, stride;
    std::vector<float> values;
    Dense(int64_t m, int64_t n)
        : rows(m), columns(n), stride((n + LANES - 1) / LANES * LANES + LANES), values(m * stride, 0.0f) {}
    float* row(int64_t i) { return values.data() + i * stride; }
    const float* row(int64_t i) const { return values.data() + i * stride; }
};

template <int ROWS, int VECTORS>
inline void product_block(Dense& out, const Dense& a, const Dense& b, float alpha, const Dense* add, float beta,
                          int64_t row, int64_t column) {
    Vec sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < a.columns; ++k) {
        Vec from[VECTORS];
        for (int j = 0; j < VECTORS; ++j) from[j] = load<false>(b.row(k) + column + j * LANES, LANES);
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < VECTORS; ++j) sums[i][j] += a.row(row + i)[k] * from[j];
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < VECTORS; ++j) {
            int64_t here = column + j * LANES;
            Vec value = sums[i][j] * alpha;
            if (add != nullptr) value += load<false>(add->row(row + i) + here, LANES) * beta;
            store<false>(out.row(row + i) + here, value, LANES);
        }
}

template <int ROWS>
void product_rows(Dense& out, const Dense& a, const Dense& b, float alpha, const Dense* add, float beta, int64_t row,
                  int64_t rows) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return product_rows<ROWS - 1>(out, a, b, alpha, add, beta, row, rows);
    int64_t column = 0;
    for (; column + BLOCK_VECTORS * LANES <= out.columns; column += BLOCK_VECTORS * LANES)
        product_block<ROWS, BLOCK_VECTORS>(out, a, b, alpha, add, beta, row, column);
    for (; column < out.columns; column += LANES) product_block<ROWS, 1>(out, a, b, alpha, add, beta, row, column);
}

// out = alpha a b + beta add; out is none of these
void product(Dense& out, const Dense& a, const Dense& b, float alpha = 1, const Dense* add = nullptr, float beta = 0) {
    for (int64_t row = 0; row < a.rows; row += BLOCK_ROWS)
        product_rows<BLOCK_ROWS>(out, a, b, alpha, add, beta, row, a.rows - row);
}

void transpose(Dense& out, const Dense& a) {
    for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t j = 0; j < a.columns; ++j) out.row(j)[i] = a.row(i)[j];
}

// After phase 3: the direction in place, and its sum of squares.
void newton_schulz(const Matrix& a) {
    if (a.ns_steps <= 0) return;
    const float ca = NS_COEFFICIENTS[0], cb = NS_COEFFICIENTS[1], cc = NS_COEFFICIENTS[2];
    float scale = 1.0 / (std::sqrt(a.direction_squares[0]) + NS_EPS);
    bool tall = a.rows > a.columns;
    int64_t m = std::min(a.rows, a.columns), n = std::max(a.rows, a.columns);
    Dense x(m, n), y(m, n), xt(n, m), r(m, m), p(m, m), q(m, m), half(m, m);
    for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t j = 0; j < a.columns; ++j)
            (tall ? x.row(j)[i] : x.row(i)[j]) = scale * a.direction[i * a.columns + j];
    bool gram_form = n >= 2 * m;
    for (int64_t left = a.ns_steps, segment = FIRST_SEGMENT; left > 0; segment = SEGMENT) {
        transpose(xt, x);
        product(r, x, xt);
        if (!gram_form) {
            product(p, r, r, cc, &r, cb);
            product(y, p, x, 1, &x, ca);
            --left;
        } else {
            int64_t length = std::min(segment, left);
            for (int64_t i = 0; i < length; ++i) {
                product(p, r, r, cc, &r, cb);
                for (int64_t d = 0; d < m; ++d) p.row(d)[d] += ca;
                if (i == 0) {
                    std::swap(q.values, p.values);
                    if (length == 1) break;
                    product(half, r, q);
                    product(r, q, half);
                    continue;
                }
                if (i + 1 < length) {
                    product(half, r, p);
                    product(r, p, half);
                }
                product(half, p, q);
                std::swap(q.values, half.values);
            }
            product(y, q, x);
            left -= length;
        }
        std::swap(x.values, y.values);
    }
    a.direction_squares[0] = 0;
    for (int64_t i = 0; i < a.rows; ++i) {
        double total = 0;
        for (int64_t j = 0; j < a.columns; ++j) {
            float value = tall ? x.row(j)[i] : x.row(i)[j];
            a.direction[i * a.columns + j] = value;
            total += double(value) * value;
        }
        a.direction_squares[0] += total;
    }
}

// phase 4: p <- p - lr (d / rms(d) + weight_decay p)
void apply_update(const Tile& tile) {
    const Matrix& a = *tile.matrix;
    if (a.ns_steps < 0) return;
    float step = a.moves / std::sqrt(a.direction_squares[0] / (double(a.rows) * a.columns) + NORM_EPS) * a.lr;
    float keep = 1.0 - double(a.lr) * a.weight_decay;
    for (int64_t row = tile.first_row; row < tile.last_row; ++row)
        each_vector(tile, [&](int64_t column, int64_t lanes, auto part) {
            float* p = a.p + row * a.p_stride + column;
            Vec direction = load<part>(a.direction + row * a.columns + column, lanes);
            store<part>(p, load<part>(p, lanes) * keep - direction * step, lanes);
        });
}

// phases 2 to 4 of a small matrix on one thread, whose cache has it from phase to phase
void step_alone(Matrix& a) {
    factors(a);
    std::vector<Tile> tiles = tiles_of(&a, 1);
    for (const Tile& tile : tiles) feature_sums(tile);
    add_up(a.features, tiles.size(), COLUMNS);
    for (const Tile& tile : tiles) learned_update(tile);
    add_up(a.direction_squares, tiles.size(), 1);
    newton_schulz(a);
    for (const Tile& tile : tiles) apply_update(tile);
}

}  // namespace

extern "C" {

int64_t tiles_along(int64_t rows, int64_t columns, int64_t* of_rows, int64_t* of_columns) {
    Matrix a{};
    a.rows = rows;
    a.columns = columns;
    Tiling tiling(a);
    *of_rows = tiling.row_tiles;
    *of_columns = tiling.column_tiles;
    return tiling.count();
}

int64_t sizes(int64_t* matrix, int64_t* theta) {
    *matrix = sizeof(Matrix);
    *theta = sizeof(Theta);
    return 0;
}

// returns 1 where there is no memory for lists and scratch
int64_t run(int64_t phase, Matrix* matrices, int64_t count, int64_t threads) {
    try {
        if (phase == 1 || phase == 4 || phase == 6) {
            share(count, threads, [=](int64_t i) {
                Matrix& a = matrices[i];
                phase == 1 ? factors(a) : phase == 4 ? newton_schulz(a) : step_alone(a);
            });
            return 0;
        }
        std::vector<Tile> tiles = tiles_of(matrices, count);
        auto work = phase == 0 ? gradient_moments : phase == 2 ? feature_sums : phase == 3 ? learned_update : apply_update;
        share(tiles.size(), threads, [&](int64_t i) { work(tiles[i]); });
        for (Matrix* a = matrices; a != matrices + count; ++a) {
            if (phase == 2) add_up(a->features, Tiling(*a).count(), COLUMNS);
            if (phase == 3) add_up(a->direction_squares, Tiling(*a).count(), 1);
        }
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
}
