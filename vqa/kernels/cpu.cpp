// `modulate` in float32: one pass over the maps forward, one backward. `vqa/kernels/cpu.py` builds and calls it.
//
// A map lies in memory as B matrices of rows and columns: positions by channels where it is channels-last, channels by
// positions where it is contiguous. A row is worked on in eights of columns, the last of which may be short; where a
// ReLU was open is a byte an eight. Matrices are cut into blocks of rows by their size alone, and sums are added up in
// the blocks' order: the result does not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));  // a comparison gives -1 where it is true

constexpr int64_t BLOCK = 1 << 15;  // elements
using Eight = std::integral_constant<int, 8>;

template <class Count>
inline Floats load(const float* from, Count count) {
    Floats values = {};
    std::memcpy(&values, from, count * sizeof(float));
    return values;
}

template <class Count>
inline void store(float* to, Floats values, Count count) {
    std::memcpy(to, &values, count * sizeof(float));
}

inline Floats where(Ints chosen, Floats values) { return (Floats)(chosen & (Ints)values); }

inline Ints open_of(Floats sums) { return ~(sums <= 0.0f); }  // as torch has it, NaN passes a ReLU

inline uint8_t packed(Ints open) {
#ifdef __AVX__
    return _mm256_movemask_ps((__m256)open);
#else
    uint8_t byte = 0;
    for (int i = 0; i < 8; ++i) byte |= (open[i] & 1) << i;
    return byte;
#endif
}

inline Ints unpacked(uint8_t byte) {
    constexpr Ints own = {1, 2, 4, 8, 16, 32, 64, 128};
    return ((byte & own) != 0);
}

inline float total(Floats values) {
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += values[i];
    return sum;
}

// Calls body(first column, how many) for each eight of a row.
template <class Body>
inline void in_eights(int64_t columns, Body body) {
    int64_t column = 0;
    for (; column + 8 <= columns; column += 8) body(column, Eight());
    if (column < columns) body(column, static_cast<int>(columns - column));
}

// The sum over blocks of what `backward` found in each of them, [blocks, 2, channels].
void add_up(const float* sums, int64_t blocks, int64_t channels, float* to) {
    std::memcpy(to, sums, channels * sizeof(float));
    for (int64_t block = 1; block < blocks; ++block)
        for (int64_t i = 0; i < channels; ++i) to[i] += sums[2 * block * channels + i];
}

// Calls body with each flag as a type, so that its loops are compiled for every choice.
template <class Body>
void for_flags(Body body) {
    body();
}
template <class Body, class... Flags>
void for_flags(Body body, bool flag, Flags... flags) {
    if (flag)
        for_flags([&](auto... rest) { body(std::true_type(), rest...); }, flags...);
    else
        for_flags([&](auto... rest) { body(std::false_type(), rest...); }, flags...);
}

}  // namespace

struct Shape {
    int64_t samples, channels, positions;
    int64_t scale_stride, shift_stride;  // from a sample's to the next one's
    int32_t channels_last, relu, threads;

    int64_t rows() const { return channels_last ? positions : channels; }
    int64_t columns() const { return channels_last ? channels : positions; }
    int64_t rows_of_block() const { return std::min(rows(), std::max<int64_t>(1, BLOCK / columns())); }
    int64_t blocks() const { return (rows() + rows_of_block() - 1) / rows_of_block(); }  // of a sample
};

// Sums that `backward` needs memory for, in floats.
extern "C" int64_t modulate_workspace(const Shape* shape) {
    return shape->channels_last ? 2 * shape->samples * shape->blocks() * shape->channels : 0;
}

// residual and bits may be null.
extern "C" void modulate_forward(const Shape* shape, const float* x, const float* scale, const float* shift,
                                 const float* residual, float* y, uint8_t* bits) {
    const int64_t rows = shape->rows(), columns = shape->columns(), bytes = (columns + 7) / 8;
    const int64_t step = shape->rows_of_block(), blocks = shape->blocks();
    const auto run = [&](auto last, auto adds, auto relu, auto keeps) {
#pragma omp parallel for num_threads(shape->threads) schedule(static)
        for (int64_t block = 0; block < shape->samples * blocks; ++block) {
            const int64_t sample = block / blocks, begin = block % blocks * step;
            const float* factors = scale + sample * shape->scale_stride;
            const float* terms = shift + sample * shape->shift_stride;
            for (int64_t row = begin; row < std::min(rows, begin + step); ++row) {
                const int64_t start = (sample * rows + row) * columns;
                in_eights(columns, [&](int64_t column, auto count) {
                    const int64_t place = start + column;
                    Floats out = load(x + place, count);
                    if constexpr (last)
                        out = out * load(factors + column, count) + load(terms + column, count);
                    else
                        out = out * factors[row] + terms[row];
                    if constexpr (adds) out += load(residual + place, count);
                    if constexpr (relu) {
                        const Ints open = open_of(out);
                        out = where(open, out);
                        if constexpr (keeps) bits[(sample * rows + row) * bytes + column / 8] = packed(open);
                    }
                    store(y + place, out, count);
                });
            }
        }
    };
    for_flags(run, shape->channels_last, residual != nullptr, shape->relu, bits != nullptr);
}

// A gradient that is null is not computed. x, scale and shift are read where they are needed; without bits, a ReLU was
// open where scale · x + shift says so.
extern "C" void modulate_backward(const Shape* shape, const float* gradient, const float* x, const float* scale,
                                  const float* shift, const uint8_t* bits, float* of_x, float* of_scale,
                                  float* of_shift, float* of_residual, float* workspace) {
    const int64_t rows = shape->rows(), columns = shape->columns(), bytes = (columns + 7) / 8;
    const int64_t channels = shape->channels, step = shape->rows_of_block(), blocks = shape->blocks();
    const auto run = [&](auto last, auto relu, auto stored, auto wants_x, auto wants_scale, auto wants_residual) {
        constexpr bool recomputes = relu && !stored;
        // one eight of a row of all samples' rows: writes its gradients and adds to its sums
        const auto one = [&](int64_t row, int64_t column, auto count, Floats factor, Floats term, Floats& scales,
                             Floats& shifts) {
            const int64_t place = row * columns + column;
            Floats g = load(gradient + place, count), value = {};
            if constexpr (wants_scale || recomputes) value = load(x + place, count);
            if constexpr (recomputes) g = where(open_of(value * factor + term), g);
            if constexpr (stored) g = where(unpacked(bits[row * bytes + column / 8]), g);
            if constexpr (wants_residual) store(of_residual + place, g, count);
            if constexpr (wants_x) store(of_x + place, g * factor, count);
            if constexpr (wants_scale) scales += g * value;
            shifts += g;
        };
        if constexpr (last) {
#pragma omp parallel for num_threads(shape->threads) schedule(static)
            for (int64_t block = 0; block < shape->samples * blocks; ++block) {
                const int64_t sample = block / blocks, begin = block % blocks * step;
                const float* factors = scale + sample * shape->scale_stride;
                const float* terms = shift + sample * shape->shift_stride;
                float *sums_scale = workspace + 2 * block * channels, *sums_shift = sums_scale + channels;
                std::memset(sums_scale, 0, 2 * channels * sizeof(float));
                for (int64_t row = begin; row < std::min(rows, begin + step); ++row)
                    in_eights(columns, [&](int64_t column, auto count) {
                        Floats factor = {}, term = {}, scales = {}, shifts = load(sums_shift + column, count);
                        if constexpr (wants_x || recomputes) factor = load(factors + column, count);
                        if constexpr (recomputes) term = load(terms + column, count);
                        if constexpr (wants_scale) scales = load(sums_scale + column, count);
                        one(sample * rows + row, column, count, factor, term, scales, shifts);
                        if constexpr (wants_scale) store(sums_scale + column, scales, count);
                        store(sums_shift + column, shifts, count);
                    });
            }
        } else {
#pragma omp parallel for num_threads(shape->threads) schedule(static)
            for (int64_t row = 0; row < shape->samples * rows; ++row) {
                const int64_t sample = row / rows, channel = row % rows;
                Floats factor = {}, term = {}, scales = {}, shifts = {};
                if constexpr (wants_x || recomputes) factor += scale[sample * shape->scale_stride + channel];
                if constexpr (recomputes) term += shift[sample * shape->shift_stride + channel];
                in_eights(columns, [&](int64_t column, auto count) {
                    one(row, column, count, factor, term, scales, shifts);
                });
                if constexpr (wants_scale) of_scale[row] = total(scales);
                if (of_shift) of_shift[row] = total(shifts);
            }
        }
    };
    for_flags(run, shape->channels_last, shape->relu, bits != nullptr, of_x != nullptr, of_scale != nullptr,
              of_residual != nullptr);
    if (shape->channels_last)
        for (int64_t sample = 0; sample < shape->samples; ++sample) {
            const float* sums = workspace + 2 * sample * blocks * channels;
            if (of_scale) add_up(sums, blocks, channels, of_scale + sample * channels);
            if (of_shift) add_up(sums + channels, blocks, channels, of_shift + sample * channels);
        }
}
