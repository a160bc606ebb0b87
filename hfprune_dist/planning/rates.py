"""The rates that hours are computed from: assumptions, with their units and sources.

None of them has been measured on a GPU. ``ASSUMED`` sums them up in one sentence for readers of the hours.
"""

from __future__ import annotations

# Shares of a GPU's nominal rate in dense bfloat16 products. The share that dense transformers reach in practice:
PRODUCTS = 0.4
# Large products in float32 without TF32: 19.5 of 312 TFLOP/s on an A100, 67 of 989 on an H100, less a fifth.
FLOAT32 = 0.05
# Cholesky factors, triangular solves and their products in float64: about half of 9.7 TFLOP/s (A100) or 34 (H100).
# Consumer cards have a tenth of that or less.
FLOAT64 = 0.015

# Share of the nominal rate that a network or a link between GPUs reaches.
NETWORK = 0.8
# Nominal bytes per second, one way, between a GPU and the others of its node if the profile names none: 16 lanes of
# PCIe 4.0, the least that any node has. NVLink: 300e9 on an A100, 450e9 on an H100.
LINK = 32e9

# Modules called in a layer: seven projections and two norms; LoRA adds A, B and a dropout to each projection.
MODULES, LORA_MODULES = 9, 9 + 7 * 3
# Of those, the ones with weights that ZeRO-3 gathers.
GATHERED_MODULES, GATHERED_LORA_MODULES = 9, 9 + 7 * 2
# Seconds that the host takes to call one module, forward or backward, and in addition for a gather.
# Measured with hardly any arithmetic on a slow core: 32 layers with LoRA forward and backward took 496 ms with whole
# weights, 1,351 ms with ZeRO-3. A GPU's host is assumed to be three times as fast. Launches run ahead of the GPU, so
# calls count only where they take longer than its work.
HOST_SPEED = 3
CALL_S = 0.496 / (32 * 2 * LORA_MODULES) / HOST_SPEED
GATHER_S = (1.351 - 0.496) / (32 * 2 * GATHERED_LORA_MODULES) / HOST_SPEED

# Bytes per second: of one node's reads and writes on a shared file system;
DISK = 1e9
# of SHA-256 on one thread, measured: 1e9 to 2e9;
HASHING = 1.5e9
# of copies between a GPU and pinned main memory, where hidden states and layers wait in passes layer by layer: PCIe 4.0
# reaches 25e9. Copies overlap with computing Gram matrices and solving layers.
HOST_COPY = 2e10
# Seconds before a stage's first product: imports, CUDA, NCCL.
START_S = 60.0

ASSUMED = (
    f"assumed: {PRODUCTS:.0%} of gpu_tflops for matrix products, {FLOAT32:.0%} in float32, {FLOAT64:.1%} for solves in "
    f"float64 (data-centre GPUs), {NETWORK:.0%} of links and networks, {1e3 * CALL_S:.2f} ms a module call and "
    f"{1e3 * GATHER_S:.2f} ms a gather where that is not hidden behind products, disk {DISK / 1e9:g} GB/s a node, "
    f"SHA-256 {HASHING / 1e9:g} GB/s, host copies {HOST_COPY / 1e9:g} GB/s a rank, {START_S:g} s to start a stage"
)
