// A GPU for tests, on one thread of the CPU: what csrc/*.cu uses of CUDA, and no more. Blocks run
// one by one. The threads of a block are fibers, each running until its next barrier, in an order
// shuffled anew every time: a missing barrier shows as a wrong result.
#pragma once

#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // blocks run one by one, and find there what the last one left
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kStackBytes = 1 << 17;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;
  jmp_buf here;
  bool started;
  State state;
  alignas(16) char slot[16];  // what it shows to its warp
};

inline std::vector<Fiber> fibers(kMaxThreads);
inline std::function<void()> body;
inline jmp_buf scheduler;
inline std::mt19937 random;

inline Fiber& self() { return fibers[threadIdx.x]; }

inline void wait(State state) {
  self().state = state;
  if (_setjmp(self().here) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  body();
  self().state = State::kDone;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned thread) {
  threadIdx.x = thread;
  Fiber& fiber = self();
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void start(Fiber& fiber) {
  getcontext(&fiber.start);
  fiber.start.uc_stack = {fiber.stack.get(), 0, kStackBytes};
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  fiber.started = false;
  fiber.state = State::kReady;
}

// Lets [begin, end) go on if all of them that still run are at the barrier.
inline bool release(unsigned begin, unsigned end, State barrier) {
  const auto all = [&](auto is) {
    return std::all_of(&fibers[begin], &fibers[0] + end,
                       [&](const Fiber& f) { return is(f.state); });
  };
  if (all([](State s) { return s == State::kDone; })) return false;
  if (!all([&](State s) { return s == barrier || s == State::kDone; })) return false;
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i].state == barrier) fibers[i].state = State::kReady;
  return true;
}

inline std::vector<unsigned> shuffled(unsigned begin, unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), begin);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

// Each warp goes as far as it can before the next one starts.
inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) start(fibers[i]);
  do {
    for (unsigned warp : shuffled(0, threads / kWarp)) {
      const unsigned begin = warp * kWarp;
      do {
        for (unsigned i : shuffled(begin, kWarp))
          if (fibers[i].state == State::kReady) resume(i);
      } while (release(begin, begin + kWarp, State::kAtWarpBarrier));
    }
  } while (release(0, threads, State::kAtBlockBarrier));
  for (unsigned i = 0; i < threads; ++i)
    if (fibers[i].state != State::kDone)
      throw std::logic_error("a barrier that not every thread reaches");
}

// Each lane shows x; then result(shown), where shown(i) is what lane i shows.
template <typename T, typename Result>
auto together(unsigned mask, const T& x, const Result& result) {
  if (mask != 0xffffffffu) throw std::logic_error("less than a warp together");
  memcpy(self().slot, &x, sizeof x);
  wait(State::kAtWarpBarrier);
  const auto out = result([](unsigned lane) {
    T shown;
    memcpy(&shown, fibers[threadIdx.x / kWarp * kWarp + lane].slot, sizeof shown);
    return shown;
  });
  wait(State::kAtWarpBarrier);
  return out;
}

template <typename T>
T shuffle(unsigned mask, T x, unsigned source) {
  return together(mask, x, [&](const auto& shown) { return shown(source); });
}

inline unsigned lane() { return threadIdx.x % kWarp; }

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::kAtBlockBarrier); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return cuda_on_cpu::shuffle(mask, x, lane % cuda_on_cpu::kWarp);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned by) {
  const unsigned lane = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle(mask, x, lane >= by ? lane - by : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, unsigned bits) {
  return cuda_on_cpu::shuffle(mask, x, cuda_on_cpu::lane() ^ bits);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return cuda_on_cpu::together(mask, vote, [](const auto& votes) {
    unsigned ballot = 0;
    for (unsigned i = 0; i < cuda_on_cpu::kWarp; ++i) ballot |= unsigned(votes(i)) << i;
    return ballot;
  });
}
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline unsigned atomicInc(unsigned* x, unsigned last) {
  const unsigned old = *x;
  *x = old >= last ? 0 : old + 1;
  return old;
}
template <typename T>
T __ldcg(const T* x) {
  return *x;
}

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Args&&... args) {
  blockDim = config->blockDim, gridDim = config->gridDim;
  if (blockDim.x % cuda_on_cpu::kWarp != 0 || blockDim.x > cuda_on_cpu::kMaxThreads)
    throw std::logic_error("a block that is not of 1 to 32 warps");
  cuda_on_cpu::body = [&] { kernel(args...); };
  for (unsigned block : cuda_on_cpu::shuffled(0, gridDim.x)) {
    blockIdx.x = block;
    cuda_on_cpu::run_block(blockDim.x);
  }
  return cudaSuccess;
}
