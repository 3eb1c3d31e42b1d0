// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011), word for word the stream of src/backend/philox.rs, which
// documents the mapping from counters to elements: key = seed, counter = (block, stream), four words a block. About 60
// instructions a block: the round keys do not depend on the thread.
#pragma once
#include "prelude.cuh"

__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t stream, uint64_t block) {
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// −2·ln u of the uniform u in (0, 1] of a word: the square of Box and Muller's radius. The approximate logarithm may
// come out above 0 next to u = 1.
__device__ __forceinline__ float squared_radius(uint32_t word) {
  const float u = fmaf((float)word, 0x1p-32f, 0x1p-33f);
  return fmaxf(-1.38629436112f * log2_approx(u), 0.f);
}

// The pair of normals of two words. A turn is periodic: the signed word keeps the angle within [−π, π].
__device__ __forceinline__ void normal_pair(uint32_t radius, uint32_t angle, float& n0, float& n1) {
  const float r = sqrt_approx(squared_radius(radius)), x = (float)(int32_t)angle * (6.28318530718f * 0x1p-32f);
  n0 = r * cos_approx(x);
  n1 = r * sin_approx(x);
}

// Normals of the four elements of a block.
__device__ __forceinline__ void normals4(uint64_t seed, uint64_t stream, uint64_t block, float* n) {
  const uint4 words = philox(seed, stream, block);
  normal_pair(words.x, words.y, n[0], n[1]);
  normal_pair(words.z, words.w, n[2], n[3]);
}
