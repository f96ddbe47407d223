#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, nvcc and a CUDA build of torch; needs no network. Builds, runs the whole test suite on the
# device, compute-sanitizer over the CUDA backend's, and the microbenchmarks; leaves logs, JSON and plots in results/gpu.
# It has not been run on a GPU yet: none was at hand.
set -euo pipefail
cd "$(dirname "$0")/.."
out=results/gpu
mkdir -p "$out"
python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name(), torch.__version__)' | tee "$out/device.txt"

FASTSOFTLOSS_CUDA=1 python setup.py build_ext --inplace 2>&1 | tee "$out/build.txt"
python -m fastsoftloss | tee "$out/report.txt"

python -m pytest 2>&1 | tee "$out/tests.txt"
FASTSOFTLOSS_TEST_BACKEND=cuda FASTSOFTLOSS_CHECK=1 python -m pytest -k "cuda or other_backends" \
  tests/test_exactness.py tests/test_kernel.py tests/test_bad_input.py tests/test_autograd.py 2>&1 | tee "$out/tests-cuda.txt"
# the allocator's own blocks would hide an access outside of a tensor
for tool in memcheck racecheck initcheck synccheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTSOFTLOSS_TEST_BACKEND=cuda FASTSOFTLOSS_CHECK=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    python -m pytest -k "cuda and not 40000 and not million" tests/test_bad_input.py tests/test_autograd.py 2>&1 | tee "$out/$tool.txt"
done

python bench/microbench.py --dtypes bfloat16 float32 --out "$out" --sizes 128x10 1024x1000 1048576x10 262144x100 32768x1000 32768x1003 \
  8192x4096 4096x32000 2048x50257 1024x128256 8x21x256x256 2>&1 | tee "$out/speed.txt"
