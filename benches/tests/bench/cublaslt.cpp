// A cuBLASLt of the calls that benches make, for the stand-in GPU, whose memory is the host's: products by plain loops, in the
// layouts of the library's manual. Of four algorithms the first takes milliseconds, the second is offered as not supported,
// and the third fails when it is run.
#include <cstdint>
#include <cstring>
#include <new>
#include <thread>

namespace {
constexpr int SUCCESS = 0, NOT_SUPPORTED = 15, F32 = 0, BF16 = 14, DESC_TRANSA = 3, DESC_TRANSB = 4;
struct Layout { int type; uint64_t rows, columns; int64_t leading; };
struct Product { int32_t transposed[2]; };
struct Algorithm { uint64_t data[8]; };
struct Heuristic { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };
int runs[4];

float at(const void* x, const Layout& layout, uint64_t row, uint64_t column) {
  const uint64_t i = row + column * layout.leading;
  if (layout.type == F32) return static_cast<const float*>(x)[i];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(x)[i]) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
void put(void* x, const Layout& layout, uint64_t row, uint64_t column, float value) {
  const uint64_t i = row + column * layout.leading;
  if (layout.type == F32) {
    static_cast<float*>(x)[i] = value;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &value, 4);
  static_cast<uint16_t*>(x)[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int
API cublasLtCreate(void** handle) { return *handle = runs, SUCCESS; }
API cublasLtDestroy(void*) { return SUCCESS; }
API cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  return *layout = new Layout{type, rows, columns, leading}, SUCCESS;
}
API cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, SUCCESS; }
API cublasLtMatmulDescCreate(Product** product, int, int) { return *product = new Product{}, SUCCESS; }
API cublasLtMatmulDescSetAttribute(Product* product, int which, const void* value, size_t size) {
  if ((which != DESC_TRANSA && which != DESC_TRANSB) || size != 4) return NOT_SUPPORTED;
  return memcpy(&product->transposed[which - DESC_TRANSA], value, 4), SUCCESS;
}
API cublasLtMatmulDescDestroy(Product* product) { return delete product, SUCCESS; }
API cublasLtMatmulPreferenceCreate(size_t** preference) { return *preference = new size_t(0), SUCCESS; }
API cublasLtMatmulPreferenceSetAttribute(size_t* preference, int, const void* value, size_t) { return memcpy(preference, value, 8), SUCCESS; }
API cublasLtMatmulPreferenceDestroy(size_t* preference) { return delete preference, SUCCESS; }
API cublasLtMatmulAlgoGetHeuristic(void*, Product*, Layout*, Layout*, Layout*, Layout*, size_t*, int asked, Heuristic* found, int* count) {
  if (asked < 4) return NOT_SUPPORTED;
  for (uint64_t i = 0; i < 4; i++) found[i] = {{{i}}, 0, i == 1 ? NOT_SUPPORTED : SUCCESS, 1.f, {}};
  return *count = 4, SUCCESS;
}
API cublasLtMatmul(void*, const Product* product, const float* alpha, const void* a, const Layout* la, const void* b, const Layout* lb, const float*,
                   const void*, const Layout*, void* d, const Layout* ld, const Algorithm* algorithm, void*, size_t, void*) {
  runs[algorithm->data[0]]++;
  if (algorithm->data[0] == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
  if (algorithm->data[0] == 2) return NOT_SUPPORTED;
  const uint64_t inner = product->transposed[0] ? la->rows : la->columns;
  for (uint64_t i = 0; i < ld->rows; i++) {
    for (uint64_t j = 0; j < ld->columns; j++) {
      float sum = 0;
      for (uint64_t l = 0; l < inner; l++) {
        const float x = product->transposed[0] ? at(a, *la, l, i) : at(a, *la, i, l);
        sum += x * (product->transposed[1] ? at(b, *lb, j, l) : at(b, *lb, l, j));
      }
      put(d, *ld, i, j, *alpha * sum);
    }
  }
  return SUCCESS;
}
// How often an algorithm was run.
API fake_runs(int algorithm) { return runs[algorithm]; }
