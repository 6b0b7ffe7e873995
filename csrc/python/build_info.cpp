// mapsurgery._C: tells how the native libraries beside it were built. They do not need it, nor it them.

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the native libraries of mapsurgery were built.";
  m.attr("version") = MAPSURGERY_VERSION;
  m.attr("compiler") = MAPSURGERY_COMPILER;
  m.attr("build_type") = MAPSURGERY_BUILD_TYPE;
  m.attr("torch_version") = MAPSURGERY_TORCH_VERSION;
  m.attr("cuda_version") = MAPSURGERY_CUDA_VERSION;
  m.attr("cuda_architectures") = MAPSURGERY_CUDA_ARCHITECTURES;
}
