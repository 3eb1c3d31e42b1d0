// The asynchronous parts of the stand-in's Hopper instructions.
#include "hopper.h"

namespace standin {
bool finish_awaited_copy() { return false; }
}  // namespace standin
