// How the inner loops of the CPU kernels are compiled: one binary, the widest vectors of the machine it runs on.
#pragma once

#include <cstdint>  // which says whether this is glibc

// GCC compiles each function three times and picks at load time.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MAPSURGERY_CLONES 1
#define MAPSURGERY_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MAPSURGERY_CLONES 0
#define MAPSURGERY_SIMD
#endif

// What the functions above are made of has to be inlined to be compiled for the same machine.
#if defined(__GNUC__)
#define MAPSURGERY_INLINE inline __attribute__((always_inline))
#else
#define MAPSURGERY_INLINE inline
#endif

namespace mapsurgery {

// Whether these loops use the vectors of the machine they run on. BLAS always does: it is quicker where they do not.
#if defined(__GNUC__) && (MAPSURGERY_CLONES || !defined(__x86_64__) || defined(__AVX2__))
constexpr bool kOwnVectors = true;
#else
constexpr bool kOwnVectors = false;
#endif

// A vector of numbers that one register holds (two, of machines with narrower ones), and how it is read and written.
template <class T>
struct Simd {
#if defined(__GNUC__)
  static constexpr int kLanes = 32 / sizeof(T);
  typedef T Vector __attribute__((vector_size(32)));
  typedef T Unaligned __attribute__((vector_size(32), aligned(alignof(T)), may_alias));

  static MAPSURGERY_INLINE void load(Vector& v, const T* from) { v = *reinterpret_cast<const Unaligned*>(from); }
  static MAPSURGERY_INLINE void store(T* to, const Vector& v) { *reinterpret_cast<Unaligned*>(to) = v; }
  static MAPSURGERY_INLINE void add_lanes(T& sum, const Vector& v) {
    T lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    sum += lanes[0];
  }
#else
  static constexpr int kLanes = 1;
  using Vector = T;

  static MAPSURGERY_INLINE void load(Vector& v, const T* from) { v = *from; }
  static MAPSURGERY_INLINE void store(T* to, const Vector& v) { *to = v; }
  static MAPSURGERY_INLINE void add_lanes(T& sum, const Vector& v) { sum += v; }
#endif
};

// The same for single numbers: what is left at the end of a row.
template <class T>
struct OneLane {
  static constexpr int kLanes = 1;
  using Vector = T;

  static MAPSURGERY_INLINE void load(Vector& v, const T* from) { v = *from; }
  static MAPSURGERY_INLINE void store(T* to, const Vector& v) { *to = v; }
  static MAPSURGERY_INLINE void add_lanes(T& sum, const Vector& v) { sum += v; }
};

}  // namespace mapsurgery
