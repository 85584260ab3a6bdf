// Training steps of one head, `z_hat = z - W_out relu(W_in z)`: what adam_step.py does with torch, for one core.
//
// kernel.py calls `train` for a block of steps. The file is compiled once for each instruction set (setup.py), with the
// compiler's vector types and no intrinsics. A head's weights and Adam's moments lie by hidden unit: the unit's row of
// W_in and its column of W_out side by side. A step computes
//   1. u = relu(W_in z), in tiles of rows and units that stay in registers;
//   2. the outputs W_out u;
//   3. in place of the outputs, the gradient of the loss with respect to them;
//   4. for each unit, its gradient over the rows in which it is not zero, which Adam uses up at once, so that the
//      gradient of the weights is never written to memory.
// d is padded with zeros to a multiple of 32. Padding stays zero: its outputs, errors, noise and gradients are zero.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16, UNITS = 4, COLUMNS = 2;
#elif defined(__AVX2__)
constexpr int LANES = 8, UNITS = 3, COLUMNS = 1;
#else  // 128 bits, as of NEON
constexpr int LANES = 4, UNITS = 4, COLUMNS = 2;
#endif
constexpr int ROWS = 8;    // of a tile of the outputs; the rows of u and of the outputs are padded to a multiple
constexpr int GROUP = 12;  // rows whose gradients are added at once: of a batch of 16, seldom more are on
constexpr double BETA1 = 0.9, BETA2 = 0.999;  // in double, as 1 - 0.999f is not 0.001f
constexpr float EPSILON = 1e-8f, MIN_NORM = 1e-8f;

// Inlined into their callers, these loops lose their registers to GCC's allocation.
#define HOT __attribute__((noinline)) static

// No instruction; GCC would load a vector that is used twice twice.
#if defined(__x86_64__)
#define IN_REGISTER(x) asm("" : "+v"(x))
#else  // ARM
#define IN_REGISTER(x) asm("" : "+w"(x))
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16)));
#if defined(__clang__)
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t int_quad __attribute__((vector_size(16)));
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, int_quad{i, j, k, l})
#endif

extern "C" int32_t interface() { return 2; }  // as `INTERFACE` in kernel.py

enum Loss { L1, MSE, SMOOTH_L1, COSINE };  // in the order of LOSSES in config.py

extern "C" struct Head {  // as `_Head` in kernel.py
    float *state;         // (width, 3, (1 + parts) padded): of each unit weights, Adam's means, its means of squares
    double *loss_sum;
    double lr, kl_weight;
    int64_t dim, padded, width, parts;  // parts: outputs for each feature, 1 (Surgery) or 2 (mean and log-variance)
    int64_t batch, samples, loss, updates;  // updates by gradients so far
    int64_t tasks;        // each is followed by tasks - 1 steps of Adam without a gradient (joint.py)
};

extern "C" struct Block {            // as `_Block` in kernel.py
    const float *z, *expert, *noise; // (tasks, steps, batch, dim), twice; (tasks, samples, steps, batch, dim)
    int64_t tasks, steps, loss_every;
};

namespace {

struct Step {
    const float *z, *expert, *noise;  // (batch, padded), twice; samples of it, `sample_stride` floats apart
    int64_t sample_stride;
    bool noted;                       // whether the loss is computed
    float *u, *out, *gradient;        // (width, rows), (rows, parts padded), ((1 + parts) padded)
    float *cosines;                   // (samples, 2)
    int32_t *active;                  // (batch): rows in which a unit is not zero
    float *zero_steps;                // (2, tasks)
    int64_t rows;                     // the batch, padded
};

inline vec load(const float *p) { return *reinterpret_cast<const unaligned_vec *>(p); }
inline void store(float *p, vec x) { *reinterpret_cast<unaligned_vec *>(p) = x; }
inline vec all(float x) { return x - vec{}; }
inline int64_t rounded(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline quad folded(vec x) {
    quad part[LANES / 4];
    memcpy(part, &x, sizeof x);
    for (int half = LANES / 8; half; half /= 2)
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
}

// The sums of four vectors.
inline quad sums(const vec *x) {
    const quad a = folded(x[0]), b = folded(x[1]), c = folded(x[2]), d = folded(x[3]);
    const quad ab = PICK(a, b, 0, 4, 1, 5) + PICK(a, b, 2, 6, 3, 7);
    const quad cd = PICK(c, d, 0, 4, 1, 5) + PICK(c, d, 2, 6, 3, 7);
    return PICK(ab, cd, 0, 1, 4, 5) + PICK(ab, cd, 2, 3, 6, 7);
}

inline float sum(vec x) {
    const quad part = folded(x);
    return part[0] + part[2] + (part[1] + part[3]);
}

// exp(x) to 1e-7 of its value: 2^n times a polynomial of the rest. Infinite above 88.7, 0 below -87.3; NaN stays.
inline vec exponential(vec x) {
    const vec high = all(88.72f), low = all(-87.3f), shift = all(12582912.f);  // 1.5 * 2^23: adding it rounds
    vec bounded = x > high ? high : x;
    bounded = bounded < low ? low : bounded;
    const vec n = (bounded * 1.44269504f + shift) - shift;
    const vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691e-4f + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.f;
    const ints whole = __builtin_convertvector(n, ints), half = whole >> 1;
    const ints powers[] = {(half + 127) << 23, (whole - half + 127) << 23};  // two, as 2^128 is no float
    vec factors[2];
    memcpy(factors, powers, sizeof factors);
    p = x < low ? vec{} : p * factors[0] * factors[1];
    return x > high ? all(INFINITY) : p;
}

// 1. u = relu(W_in z), (width, rows). Rows and units beyond the last repeat it. NaN stays NaN.
HOT void hidden_units(const Head &head, const Step &step) {
    const int64_t unit = 3 * (1 + head.parts) * head.padded;
    for (int64_t j = 0; j < head.width; j += UNITS)
        for (int64_t b = 0; b < step.rows; b += 4) {
            const float *w[UNITS], *z[4];
            for (int c = 0; c < UNITS; ++c) w[c] = head.state + least(j + c, head.width - 1) * unit;
            for (int r = 0; r < 4; ++r) z[r] = step.z + least(b + r, head.batch - 1) * head.padded;
            vec total[UNITS][4] = {};
            for (int64_t i = 0; i < head.padded; i += LANES) {
                vec row[4];
                for (int r = 0; r < 4; ++r) row[r] = load(z[r] + i);
                for (int c = 0; c < UNITS; ++c) {
                    const vec weight = load(w[c] + i);
                    for (int r = 0; r < 4; ++r) total[c][r] += row[r] * weight;
                }
            }
            for (int c = 0; c < UNITS; ++c) {
                const quad x = sums(total[c]), u = x < 0 ? quad{} : x;
                memcpy(step.u + (j + c) * step.rows + b, &u, sizeof u);
            }
        }
}

// 2. The outputs W_out u, (rows, parts padded).
HOT void outputs(const Head &head, const Step &step) {
    const int64_t unit = 3 * (1 + head.parts) * head.padded, size = head.parts * head.padded;
    const float *w_out = head.state + head.padded;
    for (int64_t b = 0; b < step.rows; b += ROWS)
        for (int64_t i = 0; i < size; i += COLUMNS * LANES) {
            vec total[ROWS][COLUMNS] = {};
            for (int64_t j = 0; j < head.width; ++j) {
                const float *u = step.u + j * step.rows + b;
                vec weight[COLUMNS];
                for (int c = 0; c < COLUMNS; ++c) weight[c] = load(w_out + j * unit + i + c * LANES);
                for (int r = 0; r < ROWS; ++r)
                    for (int c = 0; c < COLUMNS; ++c) total[r][c] += u[r] * weight[c];
            }
            for (int r = 0; r < ROWS; ++r)
                for (int c = 0; c < COLUMNS; ++c) store(step.out + (b + r) * size + i + c * LANES, total[r][c]);
        }
}

template <int LOSS> inline vec slope(vec error) {
    const vec one = all(1.f);
    if (LOSS == L1) return (error > 0 ? one : vec{}) - (error < 0 ? one : vec{});
    if (LOSS == MSE) return 2.f * error;
    error = error > one ? one : error;
    return error < -one ? -one : error;
}

template <int LOSS> inline vec distance(vec error) {
    const vec size = error < 0 ? -error : error;
    if (LOSS == L1) return size;
    if (LOSS == MSE) return error * error;
    return size < 1 ? 0.5f * error * error : size - 0.5f;
}

// One row of a step, in its outputs' place.
struct Row {
    const float *z, *expert, *noise;
    float *mu, *log_var;  // log_var: null for Surgery
    vec sigma(int64_t i) const { return log_var ? exponential(0.5f * load(log_var + i)) : vec{}; }
    vec spread(const Step &step, int64_t sample, int64_t i, vec sigma) const {
        return noise ? load(noise + sample * step.sample_stride + i) * sigma : vec{};
    }
};

// The cosine loss of a row, summed over samples; its gradient is `corrected * cosines[0] - expert * cosines[1]`.
double cosine_loss(const Head &head, const Step &step, const Row &row, int64_t samples) {
    double loss = 0;
    for (int64_t s = 0; s < samples; ++s) {
        vec product = {}, corrected_square = {}, expert_square = {};
        for (int64_t i = 0; i < head.padded; i += LANES) {
            const vec expert = load(row.expert + i);
            const vec corrected = load(row.z + i) - row.spread(step, s, i, row.sigma(i)) - load(row.mu + i);
            product += corrected * expert;
            corrected_square += corrected * corrected;
            expert_square += expert * expert;
        }
        float norm = std::sqrt(sum(corrected_square)), expert_norm = std::sqrt(sum(expert_square));
        norm = norm < MIN_NORM ? MIN_NORM : norm;
        expert_norm = expert_norm < MIN_NORM ? MIN_NORM : expert_norm;
        const float cosine = sum(product) / (norm * expert_norm);
        step.cosines[2 * s] = cosine / (norm * norm);
        step.cosines[2 * s + 1] = 1 / (norm * expert_norm);
        loss += 1 - cosine;
    }
    return loss;
}

// 3. The gradient of the loss with respect to the outputs, in their place; adds the loss to the head's sum if noted.
template <int LOSS> HOT void output_gradient(const Head &head, const Step &step) {
    const int64_t samples = head.samples ? head.samples : 1, size = head.parts * head.padded;
    const double mean = 1.0 / (samples * head.batch * (LOSS == COSINE ? 1 : head.dim));
    const float scale = mean, kl = head.kl_weight / head.batch;
    double total = 0, divergence = 0;
    for (int64_t b = 0; b < head.batch; ++b) {
        const int64_t at = b * head.padded;
        float *mu = step.out + b * size, *log_var = head.parts == 2 ? mu + head.padded : nullptr;
        const Row row = {step.z + at, step.expert + at, step.noise ? step.noise + at : nullptr, mu, log_var};
        if (LOSS == COSINE) total += cosine_loss(head, step, row, samples);
        vec losses = {}, divergences = {};
        for (int64_t i = 0; i < head.padded; i += LANES) {
            const vec z = load(row.z + i), expert = load(row.expert + i), m = load(mu + i), sigma = row.sigma(i);
            vec sum_g = {}, sum_g_spread = {};
            for (int64_t s = 0; s < samples; ++s) {
                const vec spread = row.spread(step, s, i, sigma), corrected = z - spread - m;
                vec g;
                if (LOSS == COSINE) {
                    g = corrected * step.cosines[2 * s] - expert * step.cosines[2 * s + 1];
                } else {
                    g = slope<LOSS>(corrected - expert);
                    if (step.noted) losses += distance<LOSS>(corrected - expert);
                }
                sum_g += g;
                sum_g_spread += g * spread;
            }
            if (!log_var) {
                store(mu + i, -scale * sum_g);
                continue;
            }
            const vec variance = sigma * sigma;
            if (step.noted) divergences += m * m + variance - 1.f - load(log_var + i);
            store(mu + i, kl * m - scale * sum_g);
            store(log_var + i, 0.5f * (kl * (variance - 1.f) - scale * sum_g_spread));
        }
        total += sum(losses);
        divergence += sum(divergences);
    }
    if (!step.noted) return;
    *head.loss_sum += mean * total;
    if (head.parts == 2) *head.loss_sum += 0.5 * head.kl_weight / head.batch * divergence;
}

// Adam's step for one vector of a unit's weights; the means, and the means of squares, lie `size` and `2 size` further.
struct Adam {
    float rate, root;  // the learning rate and the root of the squares, with the corrections of their biases
    int64_t size;
    void update(float *weights, vec gradient) const {
        vec mean = load(weights + size), square = load(weights + 2 * size), root_square;
        mean += float(1 - BETA1) * (gradient - mean);
        square = float(BETA2) * square + float(1 - BETA2) * gradient * gradient;
        for (int i = 0; i < LANES; ++i) root_square[i] = std::sqrt(square[i]);
        store(weights + size, mean);
        store(weights + 2 * size, square);
        store(weights, load(weights) - rate * mean / (root * root_square + EPSILON));
    }
};

// Adds up to GROUP rows, each times its factor, to the gradient of some of a unit's weights, which Adam takes if it is
// complete. With `products`, writes the rows' products with the weights before that.
template <int R, bool COMPLETE, bool PRODUCTS>
HOT void add_rows(const float *const *row, const float *factor, int64_t size, float *weights, float *gradient,
                  const Adam &adam, float *products) {
    const float *from[R + 1];  // local, as a store could change the arguments' arrays
    vec by[R + 1], product[GROUP] = {};
    for (int r = 0; r < R; ++r) from[r] = row[r], by[r] = all(factor[r]);
    for (int64_t i = 0; i < size; i += LANES) {
        vec sum = load(gradient + i), weight = load(weights + i);
        for (int r = 0; r < R; ++r) {
            vec x = load(from[r] + i);
            IN_REGISTER(x);
            sum += x * by[r];
            if (PRODUCTS) product[r] += x * weight;
        }
        if (COMPLETE) adam.update(weights + i, sum);
        else store(gradient + i, sum);
    }
    if (PRODUCTS)
        for (int r = 0; r < R; r += 4) {
            const quad part = sums(product + r);
            memcpy(products + r, &part, sizeof part);
        }
}

// The rows of one step in which a unit is not zero, GROUP at a time: W_out first, whose products with the outputs'
// gradients are the gradients of u.
template <int R, bool COMPLETE>
void add_group(int count, const float *const *g, const float *const *z, const float *u, const Head &head,
               float *weights, float *gradient, const Adam &adam) {
    if constexpr (R > 0)
        if (count < R) return add_group<R - 1, COMPLETE>(count, g, z, u, head, weights, gradient, adam);
    float u_gradient[GROUP];
    const int64_t inner = head.padded;
    add_rows<R, COMPLETE, true>(g, u, head.parts * inner, weights + inner, gradient + inner, adam, u_gradient);
    add_rows<R, COMPLETE, false>(z, u_gradient, inner, weights, gradient, adam, nullptr);
}

// The tasks - 1 steps of Adam without a gradient that follow an update. With the moments m and v after the update, step
// j moves the weights by -a[j] m / (r[j] sqrt(v) + EPSILON). Once the r hardly differ, the sum over j is a series around
// their mean r: with x = r sqrt(v) + EPSILON and y = sqrt(v) / x, it is m / x (series[0] + series[1] y + ...).
struct ZeroSteps {
    static constexpr int TERMS = 5;
    static constexpr double RANGE = 0.03;  // RANGE^TERMS, the first term left out, is less than a float's precision
    int64_t count;
    const float *a, *r;
    float mean_decay, square_decay, mean_r, series[TERMS];
    bool is_series;
};

ZeroSteps zero_steps(const Head &head, float *a, float *r) {
    ZeroSteps steps = {head.tasks - 1, a, r, 1, 1, 0, {}, true};
    const double update = double(head.updates) * head.tasks + 1;
    double mean_decay = 1, square_decay = 1, sum = 0, mean_r = 0, series[ZeroSteps::TERMS] = {};
    for (int64_t j = 0; j < steps.count; ++j) {
        mean_decay *= BETA1, square_decay *= BETA2;
        a[j] = head.lr * mean_decay / (1 - std::pow(BETA1, update + j + 1));
        r[j] = std::sqrt(square_decay / (1 - std::pow(BETA2, update + j + 1)));
        sum += a[j], mean_r += double(a[j]) * r[j];
    }
    mean_r /= sum;
    for (int64_t j = 0; j < steps.count; ++j) {
        const double away = mean_r - r[j];
        steps.is_series = steps.is_series && std::fabs(away) < ZeroSteps::RANGE * mean_r;
        double power = a[j];
        for (int k = 0; k < ZeroSteps::TERMS; ++k, power *= away) series[k] += power;
    }
    for (int k = 0; k < ZeroSteps::TERMS; ++k) steps.series[k] = series[k];
    steps.mean_decay = mean_decay, steps.square_decay = square_decay, steps.mean_r = mean_r;
    return steps;
}

// Takes them for `size` weights, whose moments lie `size` and `2 size` further.
HOT void take_zero_steps(const ZeroSteps &steps, float *weights, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        const vec mean = load(weights + size + i), square = load(weights + 2 * size + i);
        vec root, moved = {};
        for (int k = 0; k < LANES; ++k) root[k] = std::sqrt(square[k]);
        if (steps.is_series) {
            const vec inverse = 1.f / (steps.mean_r * root + EPSILON), y = root * inverse;
            for (int k = ZeroSteps::TERMS - 1; k >= 0; --k) moved = moved * y + steps.series[k];
            moved *= inverse;
        } else {
            for (int64_t j = 0; j < steps.count; ++j) moved += steps.a[j] / (steps.r[j] * root + EPSILON);
        }
        store(weights + i, load(weights + i) - moved * mean);
        store(weights + size + i, steps.mean_decay * mean);
        store(weights + 2 * size + i, steps.square_decay * square);
    }
}

// 4. The gradient of each unit's weights, and Adam.
void update_units(const Head &head, const Step &step) {
    const int64_t size = (1 + head.parts) * head.padded;
    const double count = head.updates * head.tasks + 1;
    const Adam adam = {float(head.lr / (1 - std::pow(BETA1, count))),
                       float(1 / std::sqrt(1 - std::pow(BETA2, count))), size};
    const ZeroSteps zeros = zero_steps(head, step.zero_steps, step.zero_steps + head.tasks);
    for (int64_t j = 0; j < head.width; ++j) {
        float *weights = head.state + j * 3 * size, factor[GROUP];
        const float *u = step.u + j * step.rows, *g[GROUP], *z[GROUP];
        int64_t active = 0;
        for (int64_t b = 0; b < head.batch; ++b) {  // no branch, as it could not be foreseen
            step.active[active] = b;
            active += u[b] != 0;
        }
        for (int64_t from = 0; from == 0 || from < active; from += GROUP) {
            const int count = least(GROUP, active - from);
            for (int r = 0; r < count; ++r) {
                const int64_t b = step.active[from + r];
                g[r] = step.out + b * head.parts * head.padded;
                z[r] = step.z + b * head.padded;
                factor[r] = u[b];
            }
            if (from + GROUP >= active) add_group<GROUP, true>(count, g, z, factor, head, weights, step.gradient, adam);
            else add_group<GROUP, false>(count, g, z, factor, head, weights, step.gradient, adam);
        }
        if (active > GROUP) memset(step.gradient, 0, size * sizeof(float));
        if (head.tasks > 1) take_zero_steps(zeros, weights, size);
    }
}

// Rows of `dim` floats to rows of `padded`, whose padding is zero already.
void copy_rows(const float *from, float *to, const Head &head) {
    for (int64_t b = 0; b < head.batch; ++b)
        memcpy(to + b * head.padded, from + b * head.dim, head.dim * sizeof(float));
}

}  // namespace

// Updates `first` to `last` (exclusive) of a block, which takes the tasks in turn. Returns 1 if memory ran out, else 0.
extern "C" int train(Head *head, const Block *block, int64_t first, int64_t last) {
    const int64_t rows = rounded(head->batch, ROWS);
    const int64_t features = head->batch * head->padded, values = head->batch * head->dim;
    const bool is_padded = head->dim != head->padded;
    const int64_t sizes[] = {
        rows * rounded(head->width, UNITS),              // u
        rows * head->parts * head->padded,               // outputs
        (1 + head->parts) * head->padded,                // gradient
        2 * head->samples + 2,                           // cosines
        head->batch,                                     // active
        2 * head->tasks,                                 // zero_steps
        is_padded ? (2 + head->samples) * features : 0,  // a step's rows
    };
    int64_t place[8] = {};
    for (int k = 0; k < 7; ++k) place[k + 1] = place[k] + rounded(sizes[k], 16);
    float *memory = static_cast<float *>(aligned_alloc(64, place[7] * sizeof(float)));
    if (!memory) return 1;
    memset(memory, 0, place[7] * sizeof(float));

    constexpr auto smooth = output_gradient<SMOOTH_L1>, cosine = output_gradient<COSINE>;
    constexpr decltype(smooth) gradients[] = {output_gradient<L1>, output_gradient<MSE>, smooth, cosine};
    for (int64_t update = first; update < last; ++update, ++head->updates) {
        const int64_t number = update / block->tasks, task = update % block->tasks;
        const int64_t at = (task * block->steps + number) * values, stride = block->steps * values;
        Step step = {block->z + at, block->expert + at, nullptr, stride, number % block->loss_every == 0, memory,
                     memory + place[1], memory + place[2], memory + place[3],
                     reinterpret_cast<int32_t *>(memory + place[4]), memory + place[5], rows};
        if (head->samples) step.noise = block->noise + task * head->samples * stride + number * values;
        if (is_padded) {
            float *padded = memory + place[6];
            copy_rows(step.z, padded, *head);
            copy_rows(step.expert, padded + features, *head);
            for (int64_t s = 0; s < head->samples; ++s)
                copy_rows(step.noise + s * stride, padded + (2 + s) * features, *head);
            step.z = padded;
            step.expert = padded + features;
            step.noise = head->samples ? padded + 2 * features : nullptr;
            step.sample_stride = features;
        }
        hidden_units(*head, step);
        outputs(*head, step);
        gradients[head->loss](*head, step);
        update_units(*head, step);
    }
    free(memory);
    return 0;
}
