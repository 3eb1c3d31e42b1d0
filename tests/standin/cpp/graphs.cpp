// CUDA graphs, captured or built node by node. Where the dependencies leave a choice, the node that was added last runs first, so that a
// missing dependency shows.
#include <algorithm>
#include "driver.h"

using namespace standin;

namespace {

std::mutex lock;
std::set<Graph*> live;

struct Executable {
  Graph* of;
  std::vector<Operation> operations;  // in the order in which they run
  std::map<Node*, size_t> places;
};

thread_local std::set<Stream*> strict_captures;

bool is_live(Graph* graph) {
  std::lock_guard<std::mutex> guard(lock);
  return live.count(graph);
}

struct KernelParams {
  Function* function;
  Dimensions dimensions;
  void** parameters;
  void** extra;
  void *kern, *context;
};
int kernel_operation(const KernelParams& p, Operation& operation) {
  if (p.extra || !p.function) return p.extra ? NOT_SUPPORTED : INVALID_VALUE;
  auto launch = std::make_shared<Launch>();
  if (const int error = prepare(p.function, p.dimensions, p.parameters, *launch)) return error;
  operation = [launch, device = p.function->module->device] { carry_out(device, *launch); };
  return SUCCESS;
}

int add(Node** node, Graph* graph, Node* const* after, size_t count, Operation operation, bool kernel) {
  for (size_t i = 0; i < count; i++) {
    const bool ours = std::any_of(graph->nodes.begin(), graph->nodes.end(), [&](auto& n) { return n.get() == after[i]; });
    if (!ours) return INVALID_VALUE;
  }
  graph->nodes.emplace_back(new Node{std::move(operation), {after, after + count}, kernel});
  return *node = graph->nodes.back().get(), SUCCESS;
}

}  // namespace

void standin::Graph::append(Operation operation) {
  std::vector<Node*> after;
  if (!nodes.empty()) after.push_back(nodes.back().get());
  nodes.emplace_back(new Node{std::move(operation), after, false});
}

bool standin::captures_strictly() { return !strict_captures.empty(); }

API cuStreamBeginCapture_v2(Stream* s, int mode) {
  constexpr int RELAXED = 2;
  if (is_default(s)) return CAPTURE_UNSUPPORTED;
  if (const int error = broken(s->device)) return error;
  if (s->capture) return INVALID_VALUE;
  if (mode != RELAXED) strict_captures.insert(s);
  return s->capture.reset(new Graph), SUCCESS;
}
API cuStreamIsCapturing(Stream* s, int* status) { return *status = !capturing(s) ? 0 : s->capture->invalid ? 2 : 1, SUCCESS; }
API cuStreamEndCapture(Stream* s, Graph** graph) {
  if (!capturing(s)) return CAPTURE_UNMATCHED;
  strict_captures.erase(s);
  *graph = s->capture.release();
  if ((*graph)->invalid) {
    delete *graph;
    return *graph = nullptr, CAPTURE_INVALIDATED;
  }
  std::lock_guard<std::mutex> guard(lock);
  return live.insert(*graph), SUCCESS;
}

API cuGraphCreate(Graph** graph, unsigned flags) {
  if (flags) return INVALID_VALUE;
  if (const int error = broken(current)) return error;
  *graph = new Graph;
  std::lock_guard<std::mutex> guard(lock);
  return live.insert(*graph), SUCCESS;
}
API cuGraphAddKernelNode_v2(Node** node, Graph* graph, Node* const* after, size_t count, const KernelParams* params) {
  if (!is_live(graph)) return INVALID_VALUE;
  Operation operation;
  if (const int error = kernel_operation(*params, operation)) return error;
  return add(node, graph, after, count, std::move(operation), true);
}
struct MemsetParams { uint64_t to; size_t pitch; unsigned value, element_bytes; size_t width, height; };
API cuGraphAddMemsetNode(Node** node, Graph* graph, Node* const* after, size_t count, const MemsetParams* params, Device* context) {
  const MemsetParams p = *params;
  if (!is_live(graph) || !context || p.height != 1 || p.width == 0) return INVALID_VALUE;
  if (p.element_bytes != 1) return NOT_SUPPORTED;
  if (!owns(context, p.to, p.width)) return INVALID_VALUE;
  const auto zero = [=] {
    if (!owns(context, p.to, p.width)) die("a graph sets memory that is not allocated");
    std::fill_n(reinterpret_cast<unsigned char*>(p.to), p.width, (unsigned char)p.value);
  };
  return add(node, graph, after, count, zero, false);
}
API cuGraphGetNodes(Graph* graph, void** nodes, size_t* count) { return nodes ? NOT_SUPPORTED : (*count = graph->nodes.size(), SUCCESS); }
API cuGraphDestroy(Graph* graph) {
  std::lock_guard<std::mutex> guard(lock);
  if (!live.erase(graph)) return INVALID_VALUE;
  return delete graph, SUCCESS;
}

API cuGraphInstantiateWithFlags(Executable** executable, Graph* graph, unsigned long long) {
  called(current, __func__);
  if (const int error = broken(current)) return error;
  if (!is_live(graph)) return INVALID_VALUE;
  *executable = new Executable{graph, {}, {}};
  auto& [of, operations, places] = **executable;
  const auto ready = [&](const std::unique_ptr<Node>& node) {
    return !places.count(node.get()) && std::all_of(node->after.begin(), node->after.end(), [&](Node* n) { return places.count(n); });
  };
  while (operations.size() < graph->nodes.size()) {
    const auto& next = *std::find_if(graph->nodes.rbegin(), graph->nodes.rend(), ready);
    places[next.get()] = operations.size();
    operations.push_back(next->operation);
  }
  return SUCCESS;
}
API cuGraphUpload(Executable*, Stream*) { return SUCCESS; }
API cuGraphLaunch(Executable* executable, Stream* s) {
  called(device_of(s), __func__);
  // As they are now: a later update of a kernel is for later launches.
  return enqueue(s, [operations = executable->operations] { for (const Operation& operation : operations) operation(); });
}
API cuGraphExecKernelNodeSetParams_v2(Executable* executable, Node* node, const KernelParams* params) {
  called(current, __func__);
  if (const int error = broken(current)) return error;
  const auto place = executable->places.find(node);
  if (!is_live(executable->of) || place == executable->places.end() || !node->kernel) return INVALID_VALUE;
  return kernel_operation(*params, executable->operations[place->second]);
}
API cuGraphExecDestroy(Executable* executable) {
  if (const int error = broken(current)) return error;
  return delete executable, SUCCESS;
}
