// Lists of operator calls, made one after the other without Python's interpreter, whose lock two threads would
// otherwise hand to and fro at every call. Made by mamlpp_fast/engine/fused/program.py.

#include "calls.h"

namespace mf {

TORCH_LIBRARY_FRAGMENT(mamlpp_fast, m) {
  m.class_<Calls>("Calls").def(torch::init<>()).def("add", &Calls::add_operator).def("run", &Calls::run);
  define_moves(m);
}

}  // namespace mf
