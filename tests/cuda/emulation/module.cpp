// The extension's part for GPUs as a module of its own, over the emulated runtime.
#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_ module);

PYBIND11_MODULE(emulated, module) { bind_cuda(module); }
