// Defines the operators, free of Python, so that a C++ program that loads this library can run an exported model.

#include <torch/csrc/stable/library.h>

#define SCHEMA(text) m.def(text);

STABLE_TORCH_LIBRARY(mapsurgery, m) {
#include "../mapsurgery/ops/schemas.inc"
}
