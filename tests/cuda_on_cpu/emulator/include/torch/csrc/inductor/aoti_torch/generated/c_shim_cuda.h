// In place of torch's header: its CUDA operations, counted, run on the CPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "emulator.h"

#define aoti_torch_cuda_mm_out emulated::Counted<aoti_torch_cpu_mm_out>::call
#define aoti_torch_cuda_addmm_out emulated::Counted<aoti_torch_cpu_addmm_out>::call
#define aoti_torch_cuda_bmm_out emulated::Counted<aoti_torch_cpu_bmm_out>::call
#define aoti_torch_cuda_baddbmm_out emulated::Counted<aoti_torch_cpu_baddbmm_out>::call
#define aoti_torch_cuda_convolution emulated::Counted<aoti_torch_cpu_convolution>::call
#define aoti_torch_cuda_convolution_backward emulated::Counted<aoti_torch_cpu_convolution_backward>::call
