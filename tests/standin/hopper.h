// The twin of every wrapper of kernels/prelude_sm90.cuh: mbarriers, bulk tensor copies, warpgroup products.
#pragma once
#include "device.h"

struct alignas(64) CUtensorMap { uint64_t opaque[16]; };

namespace standin {

// What cuTensorMapEncodeTiled writes. Bytes for strides, elements for the rest; dimension 0 is the contiguous one.
struct TensorMap {
  unsigned char* base;
  uint64_t size[5], stride[4];
  uint16_t box[5];
  uint8_t rank, element, swizzle;  // swizzle: 0 none, 1, 2, 3: within 32, 64, 128 bytes
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

struct TensorCopy {
  TensorMap map;
  unsigned char* shared;
  uint64_t* barrier;  // null for a store
  int at[5];
};

// What of the asynchronous Hopper instructions a block has under way.
struct Hopper {
  std::vector<TensorCopy> loads;
  bool fenced;
  void start() { loads.clear(); fenced = true; }
  void finish() {
    if (!loads.empty()) die("the block ends while bulk copies into its shared memory are under way");
  }
};
STANDIN_API bool finish_awaited_copy();

}  // namespace standin
