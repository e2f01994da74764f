"""The machines that a run can be planned for: numbers of data sheets, and what of them is assumed to be reached.

Sources. V100: "NVIDIA V100 Tensor Core GPU" data sheet (2020), SXM2: 125 TFLOP/s of float16, 15.7 of float32,
900 GB/s, NVLink 300 GB/s; node: "DGX-1 with V100" data sheet, 4 InfiniBand links of 100 Gb/s. A100: "NVIDIA A100
Tensor Core GPU" data sheet (2021), SXM: 312 dense, 19.5, 1,555 GB/s (40 GB) and 2,039 GB/s (80 GB), NVLink 600;
node: "DGX A100" data sheet, 8 links of 200 Gb/s. H100: "NVIDIA H100 Tensor Core GPU" data sheet, SXM: 1,979 with
sparsity, so 989 dense, 67, 3.35 TB/s, NVLink 900; node: "DGX H100" data sheet, 8 links of 400 Gb/s. H200: "NVIDIA
H200 Tensor Core GPU" data sheet, SXM: as H100, 4.8 TB/s, 141 GB. B200: "DGX B200" data sheet, per GPU: 36 PFLOP/s
of bfloat16 with sparsity over 8 GPUs, so 2,250 dense, 75 of float32 ("HGX B200": 600 over 8), 64 TB/s over 8, 1,440 GB
over 8, NVLink 14.4 TB/s over 8; 8 links of 400 Gb/s.

`reached` is an assumption: the share of the dense rate that a large transformer's computation reaches while nothing
waits. Published: V100 24 to 31 % (Shoeybi et al. 2019, arXiv 1909.08053, section 5: 39 of 125 TFLOP/s on one GPU),
A100 44 to 52 % (Narayanan et al. 2021, arXiv 2104.04473, table 1), H100 38 to 43 % (Grattafiori et al. 2024,
arXiv 2407.21783, table 4). For H200 it is the H100's, for B200 a guess.
"""

from dataclasses import dataclass

GIB = 2**30
MEMORY_TOLERANCE = 0.1  # data sheets count some in 10^9 bytes, and a part is kept for error correction


@dataclass(frozen=True)
class Gpu:
    """A GPU in the maker's own node of eight. Rates are of dense products; links count one direction."""

    memory_gib: int
    tflops: float  # float16, and bfloat16 where there is one
    tflops_fp32: float
    memory_gb_s: float
    link_gb_s: float  # of a GPU to the others of its node
    node_gb_s: float  # of a node to the others, all its links together
    reached: float
    has_bf16: bool = True

    @property
    def usable(self) -> int:
        """Bytes that tensors may take. Assumed: the CUDA context, NCCL and cuBLAS hold 1.5 GiB, fragments 3 %."""
        return int(0.97 * self.memory_gib * GIB - 1.5 * GIB)


GPUS = {
    "v100-16g": Gpu(16, 125, 15.7, 900, 150, 50, 0.30, has_bf16=False),
    "v100-32g": Gpu(32, 125, 15.7, 900, 150, 50, 0.30, has_bf16=False),
    "a100-40g": Gpu(40, 312, 19.5, 1_555, 300, 200, 0.45),
    "a100-80g": Gpu(80, 312, 19.5, 2_039, 300, 200, 0.45),
    "h100-80g": Gpu(80, 989, 67, 3_350, 450, 400, 0.40),
    "h200-141g": Gpu(141, 989, 67, 4_800, 450, 400, 0.40),
    "b200": Gpu(180, 2_250, 75, 8_000, 900, 400, 0.35),
}


def kind_of(name: str, total: int) -> str | None:
    """The kind of a device with this name, as CUDA tells it, and so many bytes; None if there are no numbers for it.

    What has no NVLink (PCIe cards) is of no kind here: its links are other ones.
    """
    words = name.upper().replace("-", " ").split()
    for kind, gpu in GPUS.items():
        near = abs(total / (gpu.memory_gib * GIB) - 1) < MEMORY_TOLERANCE
        if kind.partition("-")[0].upper() in words and "PCIE" not in words and near:
            return kind
    return None
