// Rotary position embedding (Su et al., arXiv 2104.09864) in place, halves rotated as in transformers:
//   half = head_dim / 2
//   x[i] ← x[i]·cos[i] − x[i + half]·sin[i],  x[i + half] ← x[i + half]·cos[i] + x[i]·sin[i],  i < half.
// x [tokens, heads, head_dim] bf16; table [length, head_dim] f32, cosines then sines; positions [tokens]. `sign` is 1
// forward, −1 for the inverse. f32 inside, one rounding an output. A position outside the table leaves its token as
// it is.
//
//   kernel               bytes an element   FLOPs   at 8192 × 28 × 128 (queries of Qwen2.5-7B), 3.0 TB/s
//   rope_forward_*       4                  3       39 µs
// The table comes from the L2 cache: 4 bytes an element of a token, once for 4 heads.
//
// Versions: baseline, a pair a thread, any even head_dim, any alignment; vec8, 8 pairs of up to 4 heads a thread with
// the angles in registers and up to 8 16-byte loads in flight: head_dim a multiple of 16, x and table aligned to 16
// bytes.
#include "prelude.cuh"

constexpr int BLOCK = 256;
// Heads of a thread of vec8.
constexpr int HEADS = 4;

// grid: ceil(tokens · heads · head_dim / 2 / 256), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(BLOCK)
    rope_forward_baseline_bf16(bf16* __restrict__ x, const float* __restrict__ table,
                               const uint32_t* __restrict__ positions, uint64_t tokens, uint32_t length,
                               uint32_t heads, uint32_t head_dim, float sign) {
  const uint32_t half = head_dim / 2;
  const uint64_t pair = (uint64_t)blockIdx.x * BLOCK + threadIdx.x, head = pair / half;
  if (head >= tokens * heads) return;
  const uint32_t i = pair % half, position = positions[head / heads];
  if (position >= length) return;
  const float cosine = table[(uint64_t)position * head_dim + i];
  const float sine = table[(uint64_t)position * head_dim + half + i] * sign;
  bf16* low = x + head * head_dim + i;
  const float a = __bfloat162float(low[0]), b = __bfloat162float(low[half]);
  low[0] = __float2bfloat16(a * cosine - b * sine);
  low[half] = __float2bfloat16(b * cosine + a * sine);
}
EXPORT(rope_forward_baseline_bf16)

// grid: ceil(tokens · ceil(heads / 4) · head_dim / 16 / 256), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(BLOCK)
    rope_forward_vec8_bf16(bf16* __restrict__ x, const float* __restrict__ table,
                           const uint32_t* __restrict__ positions, uint64_t tokens, uint32_t length, uint32_t heads,
                           uint32_t head_dim, float sign) {
  const uint32_t chunks = head_dim / 16, groups = (heads + HEADS - 1) / HEADS;
  const uint64_t unit = (uint64_t)blockIdx.x * BLOCK + threadIdx.x, token = unit / (chunks * groups);
  if (token >= tokens) return;
  const uint32_t within = unit % (chunks * groups), chunk = within % chunks, group = within / chunks;
  const uint32_t position = positions[token];
  if (position >= length) return;
  // The heads group, group + groups, …: neighbouring threads touch neighbouring heads.
  uint4* low = reinterpret_cast<uint4*>(x) + (token * heads + group) * (head_dim / 8) + chunk;
  const uint64_t step = (uint64_t)groups * (head_dim / 8);
  uint4 a[HEADS], b[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    if (group + h * groups >= heads) break;
    a[h] = low[h * step];
    b[h] = low[h * step + chunks];
  }
  const float4* angles = reinterpret_cast<const float4*>(table + (uint64_t)position * head_dim) + chunk * 2;
  const float4 c0 = angles[0], c1 = angles[1], s0 = angles[chunks * 2], s1 = angles[chunks * 2 + 1];
  const float cosines[8] = {c0.x, c0.y, c0.z, c0.w, c1.x, c1.y, c1.z, c1.w};
  const float sines[8] = {s0.x, s0.y, s0.z, s0.w, s1.x, s1.y, s1.z, s1.w};
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    if (group + h * groups >= heads) break;
    float u[8], v[8];
    unpack8(a[h], u);
    unpack8(b[h], v);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float sine = sines[i] * sign, rotated = u[i] * cosines[i] - v[i] * sine;
      v[i] = v[i] * cosines[i] + u[i] * sine;
      u[i] = rotated;
    }
    low[h * step] = pack8(u);
    low[h * step + chunks] = pack8(v);
  }
}
EXPORT(rope_forward_vec8_bf16)
