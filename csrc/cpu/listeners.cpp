// Whether somebody sees, or may change, what passes through nodes of autograd's graph: hooks of a node and of the
// tensors that it makes, which Python cannot ask for. Used by mamlpp_fast/engine/fused/inner_step.py.

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

namespace mf {
namespace {

using torch::autograd::Node;

bool is_heard(Node& node) {
  return !node.pre_hooks().empty() || !node.post_hooks().empty() || !node.tensor_pre_hooks().empty() ||
         !node.retains_grad_hooks().empty();
}

/// Of the node that made a tensor, and of as many in all, each the one behind the first input of the last.
bool heard(const at::Tensor& t, int64_t nodes) {
  TORCH_CHECK_VALUE(nodes > 0, "nodes: expected at least 1, got ", nodes);
  Node* node = t.grad_fn().get();  // whoever has the tensor holds all of them
  for (int64_t i = 0; i < nodes; ++i) {
    TORCH_CHECK_VALUE(node != nullptr, "t: expected ", nodes, " nodes behind it, there are ", i);
    if (is_heard(*node)) return true;
    node = node->num_outputs() > 0 ? node->next_edge(0).function.get() : nullptr;
  }
  return false;
}

/// Whether a backward pass is under way that goes to all leaves, so that no gradient is taken out on the way there.
bool to_leaves() {
  const auto* wanted = torch::autograd::get_current_graph_task_exec_info();
  return wanted != nullptr && wanted->empty();
}

}  // namespace

// Of any tensor, by way of whatever dispatch: nothing is computed.
TORCH_LIBRARY_FRAGMENT(mamlpp_fast, m) {
  m.def("heard(Tensor t, int nodes) -> bool", &heard);
  m.def("to_leaves() -> bool", &to_leaves);
}

}  // namespace mf
