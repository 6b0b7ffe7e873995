// Runs kernels block by block, and the threads of a block in turns from barrier to barrier.
#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#ifdef EMULATOR_THREADS
#include <condition_variable>
#include <thread>
#else
#include <link.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#endif

namespace emulated {
namespace {

constexpr size_t kMostParameterBytes = 4096;

unsigned long volume(dim3 size) { return static_cast<unsigned long>(size.x) * size.y * size.z; }

dim3 place(unsigned long i, dim3 size) {
  return dim3(static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
              static_cast<unsigned>(i / (static_cast<unsigned long>(size.x) * size.y)));
}

std::string text_of(dim3 size) {
  return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ")";
}

void check_launch(size_t parameter_bytes, dim3 grid, dim3 block) {
  if (volume(grid) == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("invalid grid " + text_of(grid));
  }
  if (volume(block) == 0 || volume(block) > 1024 || block.z > 64) {
    throw std::runtime_error("invalid block " + text_of(block));
  }
  if (parameter_bytes > kMostParameterBytes) {
    throw std::runtime_error(std::to_string(parameter_bytes) + " bytes of parameters, more than 4096");
  }
}

// Where a thread waits, or that it does not.
struct Barrier {
  const char* file = nullptr;
  int line = 0;
};

std::string text_of(const Barrier& barrier) { return std::string(barrier.file) + ":" + std::to_string(barrier.line); }

// Checked whenever all threads of a block wait or have left.
class Meeting {
 public:
  explicit Meeting(unsigned long threads) : threads_(threads) {}

  void wait(const Barrier& barrier) {
    if (waiting_ > 0 && (barrier.line != where_.line || std::strcmp(barrier.file, where_.file) != 0)) {
      throw std::runtime_error("threads wait at different barriers, " + text_of(where_) + " and " + text_of(barrier));
    }
    where_ = barrier;
    ++waiting_;
  }
  void leave() { ++left_; }

  bool is_complete() const {
    if (waiting_ + left_ < threads_) return false;
    if (waiting_ > 0 && left_ > 0) {
      throw std::runtime_error(std::to_string(waiting_) + " threads wait at " + text_of(where_) + ", but " +
                               std::to_string(left_) + " have left");
    }
    return true;
  }
  bool is_over() const { return left_ == threads_; }
  void go_on() { waiting_ = 0; }

 private:
  unsigned long threads_, waiting_ = 0, left_ = 0;
  Barrier where_;
};

}  // namespace

#ifndef EMULATOR_THREADS

const Thread* current = nullptr;

namespace {

// ---- the order of threads and blocks, by the environment variable EMULATED_ORDER

enum class Order { kForward, kBackward, kShuffled };

Order order() {
  static const Order chosen = [] {
    const char* name = std::getenv("EMULATED_ORDER");
    if (name == nullptr || std::string(name) == "forward") return Order::kForward;
    if (std::string(name) == "backward") return Order::kBackward;
    if (std::string(name) == "shuffled") return Order::kShuffled;
    std::fprintf(stderr, "EMULATED_ORDER is %s, not forward, backward or shuffled\n", name);
    std::abort();
  }();
  return chosen;
}

void rearrange(std::vector<unsigned long>& items) {
  static std::mt19937_64 random(1);
  if (order() == Order::kBackward) std::sort(items.rbegin(), items.rend());
  if (order() == Order::kShuffled) std::shuffle(items.begin(), items.end(), random);
}

std::vector<unsigned long> arranged(unsigned long count) {
  std::vector<unsigned long> items(count);
  std::iota(items.begin(), items.end(), 0);
  rearrange(items);
  return items;
}

// ---- shared memory

thread_local char in_local_memory;  // makes sure that there is some

struct Memory {
  void* data = nullptr;
  size_t bytes = 0;
};

// This library's thread-local memory: __shared__ variables, and nothing else of consequence.
Memory shared_memory() {
  volatile char* const touched = &in_local_memory;
  *touched = 0;
  Memory result;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        const auto here = reinterpret_cast<ElfW(Addr)>(&current);
        Memory memory;
        bool is_own = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr) & segment = info->dlpi_phdr[i];
          const ElfW(Addr) start = info->dlpi_addr + segment.p_vaddr;
          if (segment.p_type == PT_LOAD && here >= start && here < start + segment.p_memsz) is_own = true;
          if (segment.p_type == PT_TLS) memory = {info->dlpi_tls_data, segment.p_memsz};
        }
        if (is_own) *static_cast<Memory*>(found) = memory;
        return is_own ? 1 : 0;
      },
      &result);
  return result;
}

// ---- fibers

// An odd number of cache lines, or the stacks' tops would push one another out of the cache.
constexpr size_t kStack = 64 * 1024 + 5 * 64;

void enter();

#ifdef __x86_64__

struct Context {
  void* stack_pointer;
};

// Saves the registers that a call keeps, and the stack pointer in *from; goes on with those of `to`.
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.type emulated_switch, @function
emulated_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulated_switch, . - emulated_switch
)");

void prepare(Context& context, char* stack) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // a called function finds the stack 8 bytes from a multiple of 16
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

void go(Context& from, Context& to) { emulated_switch(&from.stack_pointer, to.stack_pointer); }

#else  // several times slower: each switch asks the system for the signal mask

using Context = ucontext_t;

void prepare(Context& context, char* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, &enter, 0);
}

void go(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

struct Fiber {
  Context context;
  Thread thread;
  Barrier barrier;
  bool has_left;
};

// One launch at a time: its state. Not thread-local, because that memory is poisoned.
struct Machine {
  std::mutex mutex;
  Context main;
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  std::unique_ptr<char, decltype(&std::free)> stacks{nullptr, &std::free};

  char* stack(size_t i) const { return stacks.get() + i * kStack; }
};

Machine& machine() {
  static auto* const one = new Machine;
  return *one;
}

void enter() {
  (*machine().body)();
  machine().running->has_left = true;
  go(machine().running->context, machine().main);
  std::abort();
}

void resume(Fiber& fiber) {
  machine().running = &fiber;
  current = &fiber.thread;
  go(machine().main, fiber.context);
}

void prepare_block(dim3 block_place, dim3 grid, dim3 block, unsigned long threads) {
  Machine& m = machine();
  for (unsigned long t = 0; t < threads; ++t) {
    Fiber& fiber = m.fibers[t];
    fiber.thread = {place(t, block), block_place, block, grid};
    fiber.has_left = false;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(m.stack(t), kStack);
#endif
    prepare(fiber.context, m.stack(t));
  }
}

void run_block(std::vector<unsigned long>& turns) {
  Machine& m = machine();
  for (Meeting meeting(turns.size()); !meeting.is_over(); meeting.go_on()) {
    for (const unsigned long t : turns) {
      Fiber& fiber = m.fibers[t];
      if (!fiber.has_left) {
        resume(fiber);
        fiber.has_left ? meeting.leave() : meeting.wait(fiber.barrier);
      }
    }
    meeting.is_complete();
    if (order() == Order::kShuffled) rearrange(turns);
  }
}

void run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  const unsigned long threads = volume(block);
  if (m.fibers.size() < threads) {
    m.fibers.resize(threads);
    m.stacks.reset(static_cast<char*>(std::aligned_alloc(64, threads * kStack)));
  }
  m.body = &body;
  const Memory shared = shared_memory();
  std::vector<unsigned long> turns = arranged(threads);
  for (const unsigned long b : arranged(volume(grid))) {
    std::memset(shared.data, 0xff, shared.bytes);
    prepare_block(place(b, grid), grid, block, threads);
    run_block(turns);
  }
}

}  // namespace

void barrier(const char* file, int line) {
  machine().running->barrier = {file, line};
  go(machine().running->context, machine().main);
}

#else  // threads of the operating system

thread_local const Thread* current = nullptr;

namespace {

// The barrier of the block that runs. A thread cannot throw to the others: what is wrong ends the program.
class Block {
 public:
  explicit Block(unsigned long threads) : meeting_(threads) {}

  void wait(const Barrier& barrier) {
    std::unique_lock<std::mutex> lock(mutex_);
    meeting_.wait(barrier);
    const unsigned long round = round_;
    if (!go_on_if_complete()) {
      released_.wait(lock, [&] { return round != round_; });
    }
  }
  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    meeting_.leave();
    go_on_if_complete();
  }

 private:
  bool go_on_if_complete() {
    if (!meeting_.is_complete()) return false;
    meeting_.go_on();
    ++round_;
    released_.notify_all();
    return true;
  }

  std::mutex mutex_;
  std::condition_variable released_;
  Meeting meeting_;
  unsigned long round_ = 0;
};

Block* running = nullptr;

void run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  for (unsigned long b = 0; b < volume(grid); ++b) {
    Block state(volume(block));
    running = &state;
    std::vector<std::thread> threads;
    for (unsigned long t = 0; t < volume(block); ++t) {
      threads.emplace_back([&, t]() noexcept {
        const Thread thread{place(t, block), place(b, grid), block, grid};
        current = &thread;
        body();
        state.leave();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace

void barrier(const char* file, int line) { running->wait({file, line}); }

#endif

void run(const std::string& kernel, size_t parameter_bytes, dim3 grid, dim3 block, const std::function<void()>& body) {
  count(kernel);
  try {
    check_launch(parameter_bytes, grid, block);
    run_grid(grid, block, body);
  } catch (const std::exception& error) {
    throw std::runtime_error("emulated " + kernel + ": " + error.what());
  }
}

}  // namespace emulated
