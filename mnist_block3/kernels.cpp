// Training and evaluation of runs of convolutions on a CPU; nbs/08_kernels.ipynb explains the layout.
//
// An activation is [block][channel][row][column][lane]: a block is as many images as a vector register has lanes.
// Every loop is over whole vectors, one image a lane. Only the last sums add lanes up.
//
// An op hands on `Images`: numbers `a` and, for each channel and image, a scale `s` and a shift `t`. What they mean is
// a*s + t, with a ReLU after it or not. The op that reads them computes that on the way, so BatchNorm, ReLU and
// dropout of whole channels need no pass over memory of their own.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
#include <unistd.h>

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

#if defined(__AVX512F__)
constexpr int vec_bytes = 64, n_registers = 32;
#elif defined(__AVX__)
constexpr int vec_bytes = 32, n_registers = 16;
#elif defined(__aarch64__)
constexpr int vec_bytes = 16, n_registers = 32;
#else
constexpr int vec_bytes = 16, n_registers = 16;
#endif
constexpr int L = vec_bytes/sizeof(real); // lanes: images in a block
typedef real vec __attribute__((vector_size(vec_bytes)));
constexpr int first_cache = 16384, second_cache = 524288; // bytes of the caches that a loop should stay in

template<int n> static inline real sum_lanes(const real* v) { // by halves, since a chain of n sums is slow
    if constexpr (n == 1) return v[0];
    else {
        typedef real half __attribute__((vector_size(sizeof(real)*n/2)));
        half low, high;
        memcpy(&low, v, sizeof low);
        memcpy(&high, v + n/2, sizeof high);
        low += high;
        return sum_lanes<n/2>((const real*)&low);
    }
}
static inline real sum_lanes(const vec& v) { return sum_lanes<L>((const real*)&v); }

struct Buffer { // vectors in memory, zero at first
    vec* p = nullptr;
    long n = 0;
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer() { free(p); }
    vec* at_least(long size) {
        if (size <= n) return p;
        free(p);
        n = size;
        p = (vec*)aligned_alloc(64, (n*sizeof(vec) + 63)/64*64);
        memset((void*)p, 0, n*sizeof(vec));
        return p;
    }
};

// --------------------------------------------------------------------------------------------------------- threads
// Threads take the blocks of a job one by one. A thread that does not get a core takes none. One that loses its core with
// a block in hand is waited for; after that the first thread works alone for a while. The sums of a block do not depend
// on the thread, so neither does any result.

namespace { // each library has a team of its own, also where a process loads several
struct Team {
    std::atomic<uint64_t> job{0}; // number of the job, how many blocks it has, the next one: 24, 20 and 20 bits
    std::atomic<int> n_done{0};
    const std::function<void(int,int)>* work = nullptr; // of block and thread
    std::atomic<int> n_threads{1};
    int n_started = 1;
    int alone = 0;        // so many jobs go without other threads,
    int jobs_alone = 100; // as many as this after a long wait for one
    pid_t pid = getpid();
    std::mutex in_use; // by one of several threads of Python

    static constexpr uint64_t mask = (1 << 20) - 1;
    static bool open(uint64_t j) { return (j & mask) < (j >> 20 & mask); }

    void take_blocks(int thread) {
        while (open(job.load(std::memory_order_acquire))) {
            uint64_t j = job.fetch_add(1, std::memory_order_acq_rel);
            if (!open(j)) return;
            (*work)(j & mask, thread);
            n_done.fetch_add(1, std::memory_order_release);
        }
    }

    void serve(int thread) {
        for (int spins = 0;;) {
            uint64_t j = job.load(std::memory_order_acquire);
            if (open(j) && thread < n_threads.load()) { take_blocks(thread); spins = 0; }
            else if (++spins < 2000) relax();
            else job.wait(j);
        }
    }

    void run(int n_blocks, int threads, const std::function<void(int,int)>& f) {
        threads = std::min(threads, n_blocks);
        if (threads < 2 || alone > 0) {
            alone = std::max(alone - 1, 0);
            for (int b = 0; b < n_blocks; b++) f(b, 0);
            return;
        }
        for (; n_started < threads; n_started++) std::thread(&Team::serve, this, n_started).detach();
        work = &f;
        n_done = 0;
        n_threads = threads;
        uint64_t number = (job.load() >> 40) + 1;
        job.store(number << 40 | uint64_t(n_blocks) << 20, std::memory_order_release);
        job.notify_all();
        auto began = std::chrono::steady_clock::now();
        take_blocks(0);
        auto own_end = std::chrono::steady_clock::now();
        for (int spins = 0; n_done.load(std::memory_order_acquire) < n_blocks; spins++)
            if (spins < 2000) relax();
            else std::this_thread::yield();
        auto waited = std::chrono::steady_clock::now() - own_end;
        bool held_up = waited > 2*(own_end - began) + std::chrono::microseconds(200);
        if (held_up) alone = jobs_alone;
        jobs_alone = held_up ? std::min(2*jobs_alone, 8000) : std::max(jobs_alone - 1, 100);
    }

    int most_threads(int threads) const { return std::max(threads, n_started); } // that may take a block

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
    }

    static Team& get() { // threads do not survive a fork, so a forked process has a team of its own
        static Team* team = new Team;
        if (team->pid != getpid()) team = new Team;
        return *team;
    }
};
} // namespace

// ---------------------------------------------------------------------------------------------------------- images

struct Images { // what an op hands on
    int c, h, w;
    bool scaled = false, relu = false; // read as a, or a*s + t, or that with a ReLU
    bool wants_grad = true;
    Buffer a_, s_, t_, ga_, gs_, gt_;  // `g`: gradients
    std::vector<real> mean;            // of a; gs is the gradient of s if a - mean is what s scales

    Images(int c, int h, int w): c(c), h(h), w(w), mean(c) {}
    long size() const { return long(c)*h*w; }
    void allocate(int blocks, bool grad) {
        a_.at_least(blocks*size());
        if (scaled) { s_.at_least(blocks*c); t_.at_least(blocks*c); }
        if (!grad || !wants_grad) return;
        ga_.at_least(blocks*size());
        if (scaled) { gs_.at_least(blocks*c); gt_.at_least(blocks*c); }
    }
    vec* a(int b) const { return a_.p + b*size(); }
    vec* ga(int b) const { return ga_.p + b*size(); }
    vec* s(int b) const { return s_.p + b*c; }
    vec* t(int b) const { return t_.p + b*c; }
    vec* gs(int b) const { return gs_.p + b*c; }
    vec* gt(int b) const { return gt_.p + b*c; }
};

static inline vec positive(vec v) { return v < 0 ? vec{} : v; }
static inline vec larger(vec a, vec b) { return (b > a) | (b != b) ? b : a; } // NaN if one of them is

struct Channel { // reads a channel of a block, and takes the gradient of what it read
    const vec* a;
    vec* ga;
    vec s, t, mean, gs{}, gt{};
    bool scaled, relu;

    Channel(const Images& x, int b, int ch):
        a(x.a(b) + long(ch)*x.h*x.w), ga(x.ga_.p ? x.ga(b) + long(ch)*x.h*x.w : nullptr),
        s(x.scaled ? x.s(b)[ch] : vec{} + 1), t(x.scaled ? x.t(b)[ch] : vec{}), mean(vec{} + x.mean[ch]),
        scaled(x.scaled), relu(x.relu) {}

    vec read(long j) const {
        vec v = a[j]*s + t;
        return relu ? positive(v) : v;
    }
    void grad(long j, vec g) {
        if (relu) g = a[j]*s + t > 0 ? g : vec{};
        ga[j] = g*s;
        gs += g*(a[j] - mean);
        gt += g;
    }
    void done(const Images& x, int b, int ch) const {
        if (scaled) { x.gs(b)[ch] = gs; x.gt(b)[ch] = gt; }
    }
};

// ----------------------------------------------------------------------------------------------------- convolution

struct Planes { const vec* p; long plane, row; }; // a block's image: where its channels and rows lie
struct Scale { const vec *s, *t; };

constexpr int most_columns(int OB) { // of a tile of OB channels, so that its sums stay in registers
    return OB*4 <= n_registers*3/4 ? 4 : OB*3 <= n_registers*3/4 ? 3 : OB*2 <= n_registers*3/4 ? 2 : 1;
}

// OB output channels at PX neighbouring pixels, with the rows k0 to k1 of the kernel; `weight` is [ci][ky][kx][OB]
template<int K, int OB, int PX, bool affine>
static inline void tile(Planes x, int n_in, int k0, int k1, const real* weight, const real* bias, Scale scale,
                        vec (&acc)[OB][PX]) {
    for (int o = 0; o < OB; o++) for (auto& v : acc[o]) v = vec{} + bias[o];
    for (int ci = 0; ci < n_in; ci++) for (int ky = k0; ky < k1; ky++) {
        vec in[PX+K-1];
        const vec* p = x.p + ci*x.plane + ky*x.row;
        const real* w = weight + (ci*K + ky)*K*OB;
        #pragma GCC unroll 16
        for (int i = 0; i < PX+K-1; i++) in[i] = affine ? p[i]*scale.s[ci] + scale.t[ci] : p[i];
        #pragma GCC unroll 8
        for (int kx = 0; kx < K; kx++)
            #pragma GCC unroll 8
            for (int o = 0; o < OB; o++)
                #pragma GCC unroll 8
                for (int i = 0; i < PX; i++) acc[o][i] += in[kx+i]*w[kx*OB+o];
    }
}

// All outputs of a convolution go to `out.put`. The columns of x have `pad` zeros on both sides, its rows have none
template<int K, int OB, bool affine, class Out>
static void convolve(Planes x, int n_in, int n_out, int h, int w, int pad,
                     const real* weight, const real* bias, Scale scale, Out out) {
    constexpr int PX = most_columns(OB);
    for (int co = 0; co < n_out; co += OB, weight += n_in*K*K*OB, bias += OB) {
        int n = std::min(OB, n_out-co);
        typename Out::template Sums<OB> sums{};
        // The moments are of differences from the first pixel, which keeps the digits of a small variance
        vec corner[OB][1];
        Planes first{x.p - pad*x.row, x.plane, x.row};
        tile<K,OB,1,affine>(first, n_in, pad, std::min(K, h+K-1-pad), weight, bias, scale, corner);
        for (int o = 0; o < n; o++) out.first(sums, co+o, o, corner[o][0]);
        for (int y = 0; y < h; y++) {
            int col = 0, k0 = std::max(0, pad-y), k1 = std::min(K, h+K-1-pad-y);
            auto columns = [&]<int P>() {
                for (; col+P <= w; col += P) {
                    vec acc[OB][P];
                    Planes at{x.p + (y-pad)*x.row + col, x.plane, x.row};
                    tile<K,OB,P,affine>(at, n_in, k0, k1, weight, bias, scale, acc);
                    #pragma GCC unroll 8
                    for (int o = 0; o < OB; o++) if (o < n)
                        #pragma GCC unroll 8
                        for (int i = 0; i < P; i++) out.put(sums, co+o, o, long(y)*w + col+i, acc[o][i]);
                }
            };
            columns.template operator()<PX>();
            if constexpr (PX > 2) columns.template operator()<2>();
            if constexpr (PX > 1) columns.template operator()<1>();
        }
        for (int o = 0; o < n; o++) out.last(sums, co+o, o);
    }
}

static int tile_channels(int c, int k) { // few variants, since each takes the compiler a while
    return k == 5 ? 4 : (c+4)/5*5 < (c+7)/8*8 ? 5 : 8;
}

template<class F> static void with_tile(int c, int k, F f) {
    if (k == 5) return f.template operator()<5,4>();
    bool five = tile_channels(c, k) == 5;
    if (k == 1) five ? f.template operator()<1,5>() : f.template operator()<1,8>();
    if (k == 3) five ? f.template operator()<3,5>() : f.template operator()<3,8>();
}

// Weights (n_out, n_in, k, k) as `tile` reads them.
// `back`: for the gradient of the input, turned round and channels swapped
static void pack(const real* weight, int n_out, int n_in, int k, bool back, std::vector<real>& packed) {
    if (back) std::swap(n_out, n_in);
    int ob = tile_channels(n_out, k), kk = k*k;
    packed.assign(long(n_out+ob-1)/ob*ob*n_in*kk, 0);
    for (int o = 0; o < n_out; o++) for (int i = 0; i < n_in; i++) {
        const real* from = back ? weight + (long(i)*n_out + o)*kk : weight + (long(o)*n_in + i)*kk;
        real* to = &packed[(long(o/ob)*n_in + i)*kk*ob + o%ob];
        for (int j = 0; j < kk; j++) to[j*ob] = from[back ? kk-1-j : j];
    }
}

// acc[co][ci][ky][kx] += sums over pixels of g(co, pixel) * x(ci, pixel + k), for OB channels of g and IB of x
template<int K, int OB, int IB, bool affine>
static void weight_grad_tile(Planes x, Planes g, int co, int n_out, int ci, int n_in, int h, int pad,
                             int y0, int y1, int w, Scale scale, vec* acc) {
    vec sum[OB][IB][K], s[IB], t[IB];
    const vec* gp[OB];
    for (int o = 0; o < OB; o++) gp[o] = g.p + std::min(co+o, n_out-1)*g.plane;
    if (affine) for (int i = 0; i < IB; i++) { s[i] = scale.s[ci+i]; t[i] = scale.t[ci+i]; }
    for (int ky = 0; ky < K; ky++) {
        for (auto& a : sum) for (auto& b : a) for (auto& v : b) v = vec{};
        for (int y = std::max(y0, pad-ky); y < std::min(y1, h+pad-ky); y++) {
            const vec* xp = x.p + ci*x.plane + (y+ky-pad)*x.row;
            for (int c = 0; c < w; c++) {
                vec xv[IB][K];
                #pragma GCC unroll 8
                for (int i = 0; i < IB; i++)
                    #pragma GCC unroll 8
                    for (int kx = 0; kx < K; kx++) {
                        vec v = xp[i*x.plane + c + kx];
                        xv[i][kx] = affine ? v*s[i] + t[i] : v;
                    }
                #pragma GCC unroll 8
                for (int o = 0; o < OB; o++) {
                    vec gv = gp[o][y*g.row + c];
                    #pragma GCC unroll 8
                    for (int i = 0; i < IB; i++)
                        #pragma GCC unroll 8
                        for (int kx = 0; kx < K; kx++) sum[o][i][kx] += gv*xv[i][kx];
                }
            }
        }
        for (int o = 0; o < OB && co+o < n_out; o++) for (int i = 0; i < IB; i++) for (int kx = 0; kx < K; kx++)
            acc[((long(co+o)*n_in + ci+i)*K + ky)*K + kx] += sum[o][i][kx];
    }
}

template<int K, int OB, bool affine>
static void weight_grad(Planes x, Planes g, int n_in, int n_out, int h, int pad,
                        int y0, int y1, int w, Scale scale, vec* acc) {
    constexpr int IB = K > 1 ? 1 : OB > 6 ? 3 : 4;
    int rows = std::max(1, first_cache/int(sizeof(vec))/(OB*w)); // so that this part of g stays in the first cache
    for (int y = y0; y < y1; y += rows) for (int co = 0; co < n_out; co += OB) {
        int end = std::min(y1, y+rows), ci = 0;
        for (; ci+IB <= n_in; ci += IB)
            weight_grad_tile<K,OB,IB,affine>(x, g, co, n_out, ci, n_in, h, pad, y, end, w, scale, acc);
        for (; ci < n_in; ci++)
            weight_grad_tile<K,OB,1,affine>(x, g, co, n_out, ci, n_in, h, pad, y, end, w, scale, acc);
    }
}

struct Forward { // where a convolution's outputs go, and their sums for the moments
    vec* a;
    long plane;
    vec low;           // the least value: 0 with a ReLU
    vec *first_, *sum_, *square_;
    template<int OB> struct Sums { vec first[OB], sum[OB], square[OB]; };
    template<class S> void first(S& s, int c, int o, vec v) const { s.first[o] = v < low ? low : v; }
    template<class S> void put(S& s, int c, int o, long j, vec v) const {
        v = v < low ? low : v;
        a[c*plane + j] = v;
        v -= s.first[o]; // a channel that hardly varies would lose its variance otherwise
        s.sum[o] += v;
        s.square[o] += v*v;
    }
    template<class S> void last(S& s, int c, int o) const {
        first_[c] = s.first[o];
        sum_[c] = s.sum[o];
        square_[c] = s.square[o];
    }
};

struct Backward { // where the gradient of a convolution's input goes
    const Images& x;
    int b;
    long from; // number of the first pixel
    bool add;  // to gs and gt
    template<int OB> struct Sums { vec s[OB], t[OB], mean[OB], gs[OB], gt[OB]; };
    template<class S> void first(S& m, int c, int o, vec) const {
        m.s[o] = x.scaled ? x.s(b)[c] : vec{} + 1;
        m.t[o] = x.scaled ? x.t(b)[c] : vec{};
        m.mean[o] = vec{} + x.mean[c];
    }
    template<class S> void put(S& m, int c, int o, long j, vec g) const {
        j += c*long(x.h)*x.w + from;
        if (!x.scaled) { x.ga(b)[j] = g; return; }
        vec a = x.a(b)[j];
        if (x.relu) g = a*m.s[o] + m.t[o] > 0 ? g : vec{};
        x.ga(b)[j] = g*m.s[o];
        m.gs[o] += g*(a - m.mean[o]);
        m.gt[o] += g;
    }
    template<class S> void last(S& m, int c, int o) const {
        if (!x.scaled) return;
        x.gs(b)[c] = add ? x.gs(b)[c] + m.gs[o] : m.gs[o];
        x.gt(b)[c] = add ? x.gt(b)[c] + m.gt[o] : m.gt[o];
    }
};

// ------------------------------------------------------------------------------------------------------------- ops

struct Call { // one batch
    int n;                 // images
    int threads;
    const real* x;
    real* out;
    real* const* tensors;  // six for each convolution: weight, bias, gamma, beta, running mean and variance; null: none
    const real* const* masks; // one for each op, of what dropout keeps, times its scale; null: all
    const double* rates;   // for each op, of the running statistics; below 0: normalise with the running statistics
    const real* g_out;
    real* g_x;             // null: not wanted
    real* const* grads;    // four for each convolution
};

struct Op {
    Images *x, *y;
    int number = 0;
    Op(Images* x, Images* y): x(x), y(y) {}
    virtual ~Op() {}
    virtual bool joins_blocks(const Call&) const { return false; } // whether statistics of the whole batch are needed
    virtual void begin(const Call&, int slots) {}
    virtual void forward(const Call&, int b, int slot) = 0; // block b, whose images lie at number `slot` of the buffers
    virtual void end(const Call&) {}
    virtual void begin_backward(const Call&) {}
    virtual void backward(const Call&, int b) = 0;
    virtual void end_backward(const Call&) {}
};

static vec valid_lanes(const Call& call, int b) { // 1 for images, 0 for what fills up the last block
    vec v{};
    for (int l = 0; l < L && b*L+l < call.n; l++) v[l] = 1;
    return v;
}

static real* image(real* plain, const Images& x, int i) { return plain + i*x.size(); }

struct Load : Op { // from (N, C, H, W)
    using Op::Op;
    void forward(const Call& call, int b, int slot) override {
        for (long j = 0; j < y->size(); j++) {
            vec v{};
            for (int l = 0, i = b*L; l < L && i < call.n; l++, i++) v[l] = call.x[i*y->size() + j];
            y->a(slot)[j] = v;
        }
    }
    void backward(const Call& call, int b) override {
        if (!call.g_x) return;
        for (long j = 0; j < y->size(); j++)
            for (int l = 0, i = b*L; l < L && i < call.n; l++, i++) call.g_x[i*y->size() + j] = y->ga(b)[j][l];
    }
};

struct Store : Op { // to (N, C, H, W)
    using Op::Op;
    void forward(const Call& call, int b, int slot) override {
        long plane = long(x->h)*x->w;
        for (int c = 0; c < x->c; c++) {
            Channel ch(*x, slot, c);
            for (long j = 0; j < plane; j++) {
                vec v = ch.read(j);
                for (int l = 0, i = b*L; l < L && i < call.n; l++, i++) image(call.out, *x, i)[c*plane + j] = v[l];
            }
        }
    }
    void backward(const Call& call, int b) override {
        long plane = long(x->h)*x->w;
        for (int c = 0; c < x->c; c++) {
            Channel ch(*x, b, c);
            for (long j = 0; j < plane; j++) {
                vec g{};
                for (int l = 0, i = b*L; l < L && i < call.n; l++, i++) g[l] = call.g_out[i*x->size() + c*plane + j];
                ch.grad(j, g);
            }
            ch.done(*x, b, c);
        }
    }
};

struct MaxPool : Op { // 2 x 2 pixels
    using Op::Op;
    void forward(const Call&, int b, int slot) override {
        for (int c = 0; c < x->c; c++) {
            Channel ch(*x, slot, c);
            vec* out = y->a(slot) + long(c)*y->h*y->w;
            for (int r = 0; r < y->h; r++) for (int i = 0; i < y->w; i++) {
                long j = 2*long(r)*x->w + 2*i;
                vec v0 = ch.read(j), v1 = ch.read(j+1), v2 = ch.read(j+x->w), v3 = ch.read(j+x->w+1);
                *out++ = larger(larger(v0, v1), larger(v2, v3));
            }
        }
    }
    void backward(const Call&, int b) override {
        for (int c = 0; c < x->c; c++) {
            Channel ch(*x, b, c);
            const vec* g_out = y->ga(b) + long(c)*y->h*y->w; // a last odd row or column gets none: its gradient stays 0
            for (int r = 0; r < y->h; r++) for (int i = 0; i < y->w; i++) {
                long j = 2*long(r)*x->w + 2*i, at[4] = {j, j+1, j+x->w, j+x->w+1};
                vec g = *g_out++, v[4], best;
                for (int k = 0; k < 4; k++) v[k] = ch.read(at[k]);
                best = v[0];
                for (int k = 1; k < 4; k++) best = larger(best, v[k]);
                for (int k = 0; k < 4; k++) { // to the first of the largest
                    auto here = (v[k] == best) | (v[k] != v[k]);
                    ch.grad(at[k], here ? g : vec{});
                    g = here ? vec{} : g;
                }
            }
            ch.done(*x, b, c);
        }
    }
};

struct Mean : Op { // over all pixels
    using Op::Op;
    void forward(const Call&, int b, int slot) override {
        int plane = x->h*x->w;
        for (int c = 0; c < x->c; c++) {
            Channel ch(*x, slot, c);
            vec sum{};
            for (int j = 0; j < plane; j++) sum += ch.read(j);
            y->a(slot)[c] = sum/real(plane);
        }
    }
    void backward(const Call&, int b) override {
        int plane = x->h*x->w;
        for (int c = 0; c < x->c; c++) {
            Channel ch(*x, b, c);
            for (int j = 0; j < plane; j++) ch.grad(j, y->ga(b)[c]/real(plane));
            ch.done(*x, b, c);
        }
    }
};

struct Dropout : Op { // of pixels or channels; a mask is (N, C, H, W) or (N, C)
    bool channels;
    Dropout(Images* x, Images* y, bool channels): Op(x, y), channels(channels) {}
    vec kept(const Call& call, int b, long c, long j) const {
        const real* mask = call.masks[number];
        if (!mask) return vec{} + 1;
        vec v{};
        long plane = long(x->h)*x->w, at = channels ? c : c*plane + j, size = channels ? x->c : x->size();
        for (int l = 0, i = b*L; l < L && i < call.n; l++, i++) v[l] = mask[i*size + at];
        return v;
    }
    void forward(const Call& call, int b, int slot) override {
        long plane = long(x->h)*x->w;
        for (int c = 0; c < x->c; c++) {
            Channel ch(*x, slot, c);
            for (long j = 0; j < plane; j++) y->a(slot)[c*plane + j] = ch.read(j)*kept(call, b, c, j);
        }
    }
    void backward(const Call& call, int b) override {
        long plane = long(x->h)*x->w;
        for (int c = 0; c < x->c; c++) {
            Channel ch(*x, b, c);
            for (long j = 0; j < plane; j++) ch.grad(j, y->ga(b)[c*plane + j]*kept(call, b, c, j));
            ch.done(*x, b, c);
        }
    }
};

struct Scratch { Buffer x, g, acc; };
static Scratch& scratch() { static thread_local Scratch s; return s; }

struct Conv : Op { // with what follows it: ReLU, BatchNorm in either order, and dropout of channels
    int k, pad;
    bool norm, relu_first;
    double eps;
    int conv; // its number among the convolutions
    std::vector<real> packed, back, bias;
    std::vector<double> means, spreads; // for each block and channel: moments of a
    std::vector<real> rstd, c0, c1;             // for each channel
    std::vector<real> weight_parts, bias_parts; // for each block
    Buffer first, sum, square;

    Conv(Images* x, Images* y, int k, int pad, bool norm, bool relu_first, double eps, int conv):
        Op(x, y), k(k), pad(pad), norm(norm), relu_first(relu_first), eps(eps), conv(conv),
        rstd(y->c), c0(y->c), c1(y->c) {}

    long n_weights() const { return long(x->c)*y->c*k*k; }
    const real* tensor(const Call& call, int i) const { return call.tensors[6*conv + i]; }
    bool joins_blocks(const Call& call) const override { return norm && call.rates[number] >= 0; }

    void begin(const Call& call, int slots) override {
        pack(tensor(call, 0), y->c, x->c, k, false, packed);
        bias.assign(y->c + 8, 0); // a tile reads up to 7 more
        if (tensor(call, 1)) std::copy_n(tensor(call, 1), y->c, bias.begin());
        means.resize(long(slots)*y->c);
        spreads.resize(long(slots)*y->c);
        first.at_least(long(slots)*y->c);
        sum.at_least(long(slots)*y->c);
        square.at_least(long(slots)*y->c);
        if (joins_blocks(call) || !y->scaled) return;
        for (int c = 0; c < y->c; c++) {
            y->mean[c] = norm ? tensor(call, 4)[c] : 0;
            rstd[c] = norm ? 1/std::sqrt(tensor(call, 5)[c] + eps) : 1;
        }
        for (int b = 0; b < slots; b++) set_scale(call, b);
    }

    vec kept(const Call& call, int b, int c) const { // by dropout
        const real* mask = call.masks[number];
        if (!mask) return vec{} + 1;
        vec v{};
        for (int l = 0, i = b*L; l < L && i < call.n; l++, i++) v[l] = mask[long(i)*y->c + c];
        return v;
    }

    void set_scale(const Call& call, int b) { // s and t of a block, from mean, rstd and mask
        for (int c = 0; c < y->c; c++) {
            real s = norm ? tensor(call, 2)[c]*rstd[c] : 1, t = norm ? tensor(call, 3)[c] - y->mean[c]*s : 0;
            vec keep = kept(call, b, c);
            y->s(b)[c] = keep*s;
            y->t(b)[c] = keep*t;
        }
    }

    bool direct() const { return !pad && !x->relu; } // the input can be read where it lies
    Scale scale(int b) const { return {x->s(b), x->t(b)}; }

    // A block's input where it lies, or a copy that is scaled and has columns of zeros on both sides
    Planes input(int slot, bool may_scale) const {
        int h = x->h, w = x->w, wp = w + 2*pad;
        if (direct() && (may_scale || !x->scaled)) return {x->a(slot), long(h)*w, w};
        vec* copy = scratch().x.at_least(long(x->c)*h*wp);
        for (int c = 0; c < x->c; c++) {
            Channel ch(*x, slot, c);
            for (int r = 0; r < h; r++) {
                vec* row = copy + (long(c)*h + r)*wp;
                for (int i = 0; i < pad; i++) row[i] = row[wp-1-i] = vec{};
                for (int i = 0; i < w; i++) row[pad+i] = ch.read(long(r)*w + i);
            }
        }
        return {copy, long(h)*wp, wp};
    }

    void forward(const Call& call, int b, int slot) override {
        real low = relu_first ? 0 : -std::numeric_limits<real>::infinity();
        long c = long(slot)*y->c;
        Forward out{y->a(slot), long(y->h)*y->w, vec{} + low, first.p + c, sum.p + c, square.p + c};
        Planes in = input(slot, k == 1);
        bool affine = k == 1 && direct() && x->scaled;
        with_tile(y->c, k, [&]<int K, int OB>() {
            if constexpr (K == 1)
                if (affine)
                    return convolve<K,OB,true>(in, x->c, y->c, y->h, y->w, pad, packed.data(), bias.data(), scale(slot), out);
            convolve<K,OB,false>(in, x->c, y->c, y->h, y->w, pad, packed.data(), bias.data(), {}, out);
        });
        if (joins_blocks(call)) block_moments(call, b);
    }

    // Mean, and sum of squared distances from it, over the images of a block
    void block_moments(const Call& call, int b) {
        int n = std::min(L, call.n - b*L);
        double plane = double(y->h)*y->w;
        for (int c = 0; c < y->c; c++) {
            long i = long(b)*y->c + c;
            double mean = 0, spread = 0, lane_means[L];
            for (int l = 0; l < n; l++) {
                lane_means[l] = first.p[i][l] + double(sum.p[i][l])/plane;
                mean += lane_means[l]/n;
            }
            for (int l = 0; l < n; l++) {
                double off = lane_means[l] - mean, s = sum.p[i][l];
                spread += square.p[i][l] - s*s/plane + plane*off*off;
            }
            means[i] = mean;
            spreads[i] = spread;
        }
    }

    void end(const Call& call) override { // from the blocks' moments to the scale of the whole batch
        if (!joins_blocks(call)) return;
        int blocks = (call.n + L-1)/L;
        double count = double(call.n)*y->h*y->w;
        real* running_mean = call.tensors[6*conv + 4];
        real* running_var = call.tensors[6*conv + 5];
        real rate = call.rates[number];
        for (int c = 0; c < y->c; c++) {
            double mean = 0, var = 0;
            auto share = [&](int b) { return double(std::min(L, call.n - b*L))/call.n; };
            for (int b = 0; b < blocks; b++) mean += share(b)*means[long(b)*y->c + c];
            for (int b = 0; b < blocks; b++) {
                double off = means[long(b)*y->c + c] - mean;
                var += std::max(0., spreads[long(b)*y->c + c])/count + share(b)*off*off;
            }
            y->mean[c] = mean;
            rstd[c] = 1/std::sqrt(var + eps);
            if (!running_mean) continue;
            running_mean[c] += rate*(real(mean) - running_mean[c]);
            running_var[c] += rate*(real(var*count/(count-1)) - running_var[c]);
        }
        for (int b = 0; b < blocks; b++) set_scale(call, b);
    }

    struct ScaleGrad { double gs = 0, gt = 0; };
    ScaleGrad scale_grad(const Call& call, int c) const { // of a channel, before dropout, summed over all images
        ScaleGrad sum;
        for (int b = 0; b < (call.n + L-1)/L; b++) {
            vec keep = kept(call, b, c);
            sum.gs += sum_lanes(y->gs(b)[c]*keep);
            sum.gt += sum_lanes(y->gt(b)[c]*keep);
        }
        return sum;
    }

    void begin_backward(const Call& call) override { // how the moments depend on a
        int blocks = (call.n + L-1)/L;
        double count = double(call.n)*y->h*y->w;
        if (x->wants_grad) pack(tensor(call, 0), y->c, x->c, k, true, back);
        weight_parts.resize(blocks*n_weights());
        bias_parts.resize(long(blocks)*y->c);
        for (int c = 0; c < y->c; c++) {
            c0[c] = c1[c] = 0;
            if (!joins_blocks(call)) continue;
            auto [gs, gt] = scale_grad(call, c);
            double r = rstd[c], gamma = tensor(call, 2)[c];
            c0[c] = -gamma*r*gt/count;
            c1[c] = -gamma*r*r*r*gs/count;
        }
    }

    void backward(const Call& call, int b) override {
        bool grad_x = x->wants_grad;
        bool by_rows = k == 1 || !grad_x; // no row needs its neighbours' gradient
        int q = grad_x ? k-1-pad : 0, wq = y->w + 2*q, h = y->h;
        int rows = by_rows ? std::clamp(second_cache/int(sizeof(vec))/((x->c+y->c)*y->w), 1, h) : h;
        vec* g = scratch().g.at_least(long(y->c)*rows*wq);
        vec* acc = scratch().acc.at_least(n_weights() + y->c);
        vec* total = acc + n_weights();
        memset((void*)acc, 0, sizeof(vec)*(n_weights() + y->c));
        bool affine = direct() && x->scaled;
        Planes in = input(b, true), gz{g, long(rows)*wq, wq};
        std::vector<real> zeros(x->c + 8);
        for (int y0 = 0; y0 < h; y0 += rows) {
            int n = std::min(rows, h-y0);
            output_grad(call, b, y0, n, q, gz, total);
            with_tile(y->c, k, [&]<int K, int OB>() {
                Planes from_top{g + q - y0*gz.row, gz.plane, gz.row};
                if (affine) weight_grad<K,OB,true>(in, from_top, x->c, y->c, x->h, pad, y0, y0+n, y->w, scale(b), acc);
                else weight_grad<K,OB,false>(in, from_top, x->c, y->c, x->h, pad, y0, y0+n, y->w, {}, acc);
            });
            if (!grad_x) continue;
            Backward out{*x, b, long(y0)*x->w, y0 > 0};
            with_tile(x->c, k, [&]<int K, int OB>() {
                convolve<K,OB,false>(gz, y->c, x->c, by_rows ? n : x->h, x->w, q, back.data(), zeros.data(), {}, out); });
        }
        for (long i = 0; i < n_weights(); i++) weight_parts[b*n_weights() + i] = sum_lanes(acc[i]);
        for (int c = 0; c < y->c; c++) bias_parts[long(b)*y->c + c] = sum_lanes(total[c]);
    }

    // The gradient of the convolution's output in rows y0 to y0+n, with q columns of zeros on both sides, and its sums
    void output_grad(const Call& call, int b, int y0, int n, int q, Planes gz, vec* total) {
        vec valid = valid_lanes(call, b);
        int w = y->w;
        for (int c = 0; c < y->c; c++) for (int r = 0; r < n; r++) {
            long from = (long(c)*y->h + y0+r)*w;
            const vec *a = y->a(b) + from, *ga = y->ga(b) + from;
            vec *to = (vec*)gz.p + c*gz.plane + r*gz.row, sum{};
            vec base = valid*c0[c], slope = valid*c1[c], mean = vec{} + y->mean[c];
            for (int i = 0; i < q; i++) to[i] = to[w+2*q-1-i] = vec{};
            for (int i = 0; i < w; i++) {
                vec g = ga[i] + base + slope*(a[i] - mean);
                if (relu_first) g = a[i] > 0 ? g : vec{};
                to[q+i] = g;
                sum += g;
            }
            total[c] += sum;
        }
    }

    void end_backward(const Call& call) override {
        int blocks = (call.n + L-1)/L;
        auto add_up = [&](const std::vector<real>& parts, long n, real* to) {
            for (long i = 0; to && i < n; i++) {
                to[i] = 0;
                for (int b = 0; b < blocks; b++) to[i] += parts[b*n + i];
            }
        };
        add_up(weight_parts, n_weights(), call.grads[4*conv]);
        add_up(bias_parts, y->c, call.grads[4*conv + 1]);
        for (int c = 0; norm && c < y->c; c++) {
            auto [gs, gt] = scale_grad(call, c);
            call.grads[4*conv + 2][c] = rstd[c]*gs;
            call.grads[4*conv + 3][c] = gt;
        }
    }
};

// ------------------------------------------------------------------------------------------------ what Python calls

struct Run { // ops one after the other, and the images between them
    std::vector<std::unique_ptr<Images>> images;
    std::vector<std::unique_ptr<Op>> ops;

    Images* hand_on(int c, int h, int w) {
        images.push_back(std::make_unique<Images>(c, h, w));
        return images.back().get();
    }
    void add(Op* op) {
        op->number = ops.size();
        ops.emplace_back(op);
    }
};

struct Spec { int kind, n_out, k, pad, norm, relu, relu_first, channels; double eps; };
enum Kind { conv, max_pool, mean, dropout };

extern "C" {
    int lanes() { return L; }

    Run* run_new(const Spec* specs, int n_specs, int c, int h, int w) {
        Run* run = new Run;
        Images* x = run->hand_on(c, h, w);
        run->add(new Load(nullptr, x));
        int n_convs = 0;
        for (const Spec* s = specs; s < specs + n_specs; s++) {
            if (s->kind == conv) {
                Images* y = run->hand_on(s->n_out, x->h + 2*s->pad - s->k + 1, x->w + 2*s->pad - s->k + 1);
                y->scaled = s->norm || s->channels;
                y->relu = s->relu && !s->relu_first;
                run->add(new Conv(x, y, s->k, s->pad, s->norm, s->relu && s->relu_first, s->eps, n_convs++));
                x = y;
                continue;
            }
            int div = s->kind == max_pool ? 2 : 1;
            Images* y = s->kind == mean ? run->hand_on(x->c, 1, 1) : run->hand_on(x->c, x->h/div, x->w/div);
            if (s->kind == max_pool) run->add(new MaxPool(x, y));
            else if (s->kind == mean) run->add(new Mean(x, y));
            else run->add(new Dropout(x, y, s->channels));
            x = y;
        }
        run->add(new Store(x, nullptr));
        return run;
    }

    void run_free(Run* run) { delete run; }

    // All ops on all blocks. Where no op needs statistics of the whole batch, a block goes through all ops at once;
    // `keep`: its images are kept for the backward pass, otherwise a thread uses the same memory for all its blocks
    void run_forward(Run* run, const Call* call, int keep) {
        std::lock_guard lock(Team::get().in_use);
        int blocks = (call->n + L-1)/L, slots = keep ? blocks : Team::get().most_threads(call->threads);
        run->images[0]->wants_grad = call->g_x;
        for (auto& x : run->images) x->allocate(slots, keep);
        for (auto& op : run->ops) op->begin(*call, slots);
        for (size_t from = 0; from < run->ops.size();) {
            size_t to = from;
            while (to < run->ops.size() && !run->ops[to]->joins_blocks(*call)) to++;
            to = std::min(to+1, run->ops.size());
            Team::get().run(blocks, call->threads, [&](int b, int thread) {
                for (size_t i = from; i < to; i++) run->ops[i]->forward(*call, b, keep ? b : thread);
            });
            run->ops[to-1]->end(*call);
            from = to;
        }
    }

    void run_backward(Run* run, const Call* call) {
        std::lock_guard lock(Team::get().in_use);
        int blocks = (call->n + L-1)/L;
        for (size_t to = run->ops.size(); to > 0;) {
            size_t from = to-1;
            run->ops[from]->begin_backward(*call);
            while (from > 0 && !run->ops[from-1]->joins_blocks(*call)) run->ops[--from]->begin_backward(*call);
            Team::get().run(blocks, call->threads, [&](int b, int thread) {
                for (size_t i = to; i-- > from;) run->ops[i]->backward(*call, b);
            });
            to = from;
        }
        for (auto& op : run->ops) op->end_backward(*call);
    }
}
