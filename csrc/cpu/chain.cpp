// flowkern/chain.py's loops over steps, which say what is computed and why: here without an interpreter between the ops,
// and in the same few buffers for all steps.
#include "chain.h"

#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace flowkern::cpu {
namespace {

using Bytes = baseline::Scratch<char>;

int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// The ops of a chain's steps, with the sizes and settings that they share.
class Ops {
  public:
    Ops(const Chain& chain, int threads)
        : c_(chain), threads_(threads), set_(active()), pixels_(chain.samples * chain.height * chain.width),
          packed_(largest([&](const Network& n) {
              return set_.network->packed_size(c_.type, n.few, n.hidden, n.out, c_.height, c_.width) * 4;
          })) {}

    int64_t state_size() const { return pixels_ * c_.channels * 4; }
    int64_t output_size() const { return pixels_ * c_.networks->out * size_of(c_.type); }
    int64_t hidden_size() const {
        return largest([&](const Network& n) { return pixels_ * n.hidden * size_of(c_.type); });
    }

    void mix(int64_t k, const float* x, float* y, bool inverse) const {
        set_.mix({x, c_.offset + k * c_.channels, inverse ? inverse_of(k) : matrix_of(k), y, pixels_, c_.channels, inverse, Type::f32},
                 threads_);
    }
    // Alone, or with the channel mix of step `mixed`, if not negative: the next step's, or in reverse this step's.
    void couple(const float* x, const void* h, float* y, float* logdet, int64_t mixed, bool inverse) const {
        const bool mixes = mixed >= 0;
        set_.couple({x, h, y, logdet, mixes ? c_.offset + mixed * c_.channels : nullptr,
                     mixes ? (inverse ? inverse_of(mixed) : matrix_of(mixed)) : Matrix{nullptr, 0, 0}, c_.samples,
                     c_.height * c_.width, c_.channels, c_.alpha, c_.scale, inverse, Type::f32, c_.type}, threads_);
    }
    void network(int64_t k, const float* state, void* h, void* h1, void* h2) const {
        const Network& n = c_.networks[k];
        fold(n);
        set_.network->trace({packed(), image(const_cast<float*>(state)), h, h1, h2, c_.samples, c_.height, c_.width, n.few, n.hidden,
                             n.out, c_.type}, threads_);
    }
    void network_vjp(int64_t k, const Network& gradient, const float* state, float* dstate, const Kept& at, const void* dh) const {
        set_.network->vjp({c_.networks[k], gradient, image(const_cast<float*>(state)), image(dstate), at.h1, at.h2, dh, c_.samples,
                           c_.height, c_.width, c_.type}, threads_);
    }
    void couple_vjp(const float* v, const float* g, const void* h, const float* glogdet, float* rebuilt, float* dv, void* dh) const {
        couple_vjp(v, g, h, glogdet, rebuilt, dv, dh, 0, c_.samples, threads_);
    }
    int64_t replay_bytes() const {
        return largest([&](const Network& n) { return set_.network->replay_bytes(replay_of(n, n, nullptr, nullptr, nullptr), threads_); });
    }
    // Both derivatives of a step's coupling, with its network evaluated again.
    void replay(int64_t k, const Network& gradient, const float* v, const float* g, const float* glogdet, float* rebuilt, float* dv,
                void* memory) const {
        const Network& n = c_.networks[k];
        fold(n);
        NetworkReplay m = replay_of(n, gradient, v, dv, memory);
        const auto between = [&](int64_t first, int64_t count, const void* h, void* dh, int threads) {
            couple_vjp(v, g, h, glogdet, rebuilt, dv, dh, first, count, threads);
        };
        m.between = [](const void* f, int64_t first, int64_t count, const void* h, void* dh, int threads) {
            (*static_cast<decltype(between)*>(f))(first, count, h, dh, threads);
        };
        m.context = &between;
        set_.network->replay(m, threads_);
    }
    void mix_vjp(int64_t k, const float* v, const float* g, float* rebuilt, float* dv, float* dmatrix, float* doffset) const {
        const int64_t n = c_.channels;
        set_.mix_vjp({v, g, c_.offset + k * n, matrix_of(k), inverse_of(k), rebuilt, dv, dmatrix + k * n * n, doffset + k * n,
                      pixels_, n, c_.reverse, rebuilt == nullptr, Type::f32}, threads_);
    }

  private:
    float* packed() const { return reinterpret_cast<float*>(packed_.data()); }
    void fold(const Network& n) const { set_.network->fold({n, packed(), c_.height, c_.width, c_.type}, threads_); }
    NetworkReplay replay_of(const Network& n, const Network& gradient, const float* v, float* dv, void* memory) const {
        return {{n, gradient, image(const_cast<float*>(v)), image(dv), nullptr, nullptr, nullptr, c_.samples, c_.height, c_.width,
                 c_.type}, packed(), memory, nullptr, nullptr};
    }
    // Of `count` samples from `first` on, whose h and dh these are.
    void couple_vjp(const float* v, const float* g, const void* h, const float* glogdet, float* rebuilt, float* dv, void* dh,
                    int64_t first, int64_t count, int threads) const {
        const int64_t at = first * c_.height * c_.width * c_.channels;
        set_.couple_vjp({v + at, g + at, h, glogdet + first, rebuilt ? rebuilt + at : nullptr, dv + at, dh, count,
                         c_.height * c_.width, c_.channels, c_.alpha, c_.scale, c_.reverse, rebuilt == nullptr, Type::f32,
                         c_.type}, threads);
    }
    // The half that the network reads.
    Image image(float* state) const {
        return {state, c_.height * c_.width * c_.channels, c_.width * c_.channels, c_.channels};
    }
    Matrix matrix_of(int64_t k) const { return {c_.matrix + k * c_.channels * c_.channels, c_.channels, 1}; }
    Matrix inverse_of(int64_t k) const { return {c_.inverse + k * c_.channels * c_.channels, c_.channels, 1}; }
    template <class F>
    int64_t largest(const F& of) const {
        int64_t most = 0;
        for (int64_t k = 0; k < c_.steps; k++) most = of(c_.networks[k]) > most ? of(c_.networks[k]) : most;
        return most;
    }

    const Chain& c_;
    int threads_;
    const InstructionSet& set_;
    int64_t pixels_;
    Bytes packed_;
};

float* numbers(const Bytes& bytes) { return reinterpret_cast<float*>(bytes.data()); }

}  // namespace

void chain(const ChainRun& m, int threads) {
    const Chain& c = m.chain;
    const Ops ops(c, threads);
    const bool keeps_h = m.kept[0].h;
    const Bytes h_scratch(keeps_h ? 0 : ops.output_size());
    std::vector<double> total(c.samples);
    std::vector<float> logdet(c.samples);
    const auto network = [&](int64_t position, const float* state) {
        const Kept& kept = m.kept[position];
        void* h = kept.h ? kept.h : h_scratch.data();
        ops.network(c.reverse ? c.steps - 1 - position : position, state, h, kept.h1, kept.h2);
        return h;
    };
    const auto couple = [&](const float* x, const void* h, float* y, int64_t mixed) {
        ops.couple(x, h, y, logdet.data(), mixed, c.reverse);
        for (int64_t n = 0; n < c.samples; n++) total[n] += logdet[n];
    };
    const int64_t last = c.steps - 1;
    // States alternate between the result and one more buffer, such that the last step reads the latter.
    if (!c.reverse) {
        const Bytes other(ops.state_size());
        int64_t turns = 0;
        for (int64_t k = 0; k < last; k++) turns += !m.kept[k + 1].state;
        float *y = turns % 2 ? m.out : numbers(other), *next = turns % 2 ? numbers(other) : m.out;
        ops.mix(0, m.x, y, false);
        for (int64_t k = 0; k < last; k++) {
            const void* h = network(k, y);
            if (float* state = static_cast<float*>(m.kept[k + 1].state)) {
                couple(y, h, state, -1);
                ops.mix(k + 1, state, y, false);
            } else {
                couple(y, h, next, k + 1);
                float* done = y;
                y = next;
                next = done;
            }
        }
        couple(y, network(last, y), m.out, -1);
    } else {
        const Bytes other(c.stored || c.steps == 1 ? 0 : ops.state_size());
        const float* v = m.x;
        for (int64_t position = 0; position <= last; position++) {
            const int64_t k = last - position;
            float* to = k % 2 ? numbers(other) : m.out;
            if (c.stored && k > 0) to = static_cast<float*>(m.kept[position + 1].state);
            const void* h = network(position, v);
            if (float* uncoupled = c.stored ? nullptr : static_cast<float*>(m.kept[position].state)) {
                couple(v, h, uncoupled, -1);
                ops.mix(k, uncoupled, to, true);
            } else {
                couple(v, h, to, k);
            }
            v = to;
        }
    }
    for (int64_t n = 0; n < c.samples; n++) m.logdet[n] = float(total[n]);
}

void chain_vjp(const ChainVjp& m, int threads) {
    const Chain& c = m.chain;
    const Ops ops(c, threads);
    const bool traces = !m.kept[0].h;
    // Where the coupling's and the network's derivatives follow the network at once, they take a few images at a time.
    const bool replays = traces && !(c.stored && c.reverse), retraces = traces && !replays;
    const Bytes h(retraces ? ops.output_size() : 0), h1(retraces ? ops.hidden_size() : 0), h2(retraces ? ops.hidden_size() : 0);
    const Bytes dh(replays ? 0 : ops.output_size()), memory(replays ? ops.replay_bytes() : 0);
    const Bytes middle(ops.state_size()), between(ops.state_size());
    std::vector<float> unused(c.samples);
    // The states before and after a step's two halves, and the gradients there, alternate between results and scratch.
    float *y = numbers(middle), *gy = numbers(between);
    const float *v = m.boundary, *g = m.g;
    for (int64_t position = c.steps - 1; position >= 0; position--, g = m.dx) {
        const int64_t k = c.reverse ? c.steps - 1 - position : position;
        Kept at = m.kept[position];
        const float* state = static_cast<const float*>(at.state);  // a stored step's input, or an exact state
        const auto through_network = [&](const float* from, const float* g, float* rebuilt, float* dv) {
            if (replays) return ops.replay(k, m.gradients[k], from, g, m.glogdet, rebuilt, dv, memory.data());
            ops.couple_vjp(from, g, at.h, m.glogdet, rebuilt, dv, dh.data());
            ops.network_vjp(k, m.gradients[k], from, dv, at, dh.data());
        };
        const auto through_mix = [&](const float* from, const float* g, float* rebuilt, float* dv) {
            ops.mix_vjp(k, from, g, rebuilt, dv, m.dmatrix, m.doffset);
        };
        if (c.stored) {
            if (!state) state = m.boundary;
            if (c.reverse) {
                if (retraces) {
                    at = {at.state, h.data(), h1.data(), h2.data()};
                    ops.network(k, state, at.h, at.h1, at.h2);
                }
                ops.couple(state, at.h, y, unused.data(), -1, true);
                through_mix(y, g, nullptr, gy);
                through_network(state, gy, nullptr, m.dx);
            } else {
                ops.mix(k, state, y, false);
                through_network(y, g, nullptr, gy);
                through_mix(state, gy, nullptr, m.dx);
            }
        } else if (c.reverse) {
            through_mix(state ? state : v, g, state ? nullptr : y, gy);
            through_network(state ? state : y, gy, m.rebuilt, m.dx);
            v = m.rebuilt;
        } else {
            through_network(v, g, y, gy);
            through_mix(state ? state : y, gy, state ? nullptr : m.rebuilt, m.dx);
            v = state ? state : m.rebuilt;
        }
    }
}

}  // namespace flowkern::cpu
