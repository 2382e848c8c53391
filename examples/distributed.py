"""Refine with several processes: the script is that of one process, torchrun starts it several times.

    torchrun --nproc-per-node 2 examples/distributed.py

Each rank reads the same batches and scores its own; all ranks end with the same scales, those of a single process
(`python examples/distributed.py` prints the same digest). Several nodes, started on each of them:

    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/distributed.py

SLURM, one torchrun per node of a job (sbatch --nodes 8 --ntasks-per-node 1):

    srun torchrun --nnodes $SLURM_NNODES --nproc-per-node 8 --rdzv-id $SLURM_JOB_ID --rdzv-backend c10d \\
        --rdzv-endpoint $(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):29500 examples/distributed.py

With GPUs, `RefineConfig(device=f"cuda:{LOCAL_RANK}")` puts each rank on its own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time

import torch
import torch.distributed as dist
from workloads import accuracy, digits, logits, quantize, trained

import cptv_ao


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of the descent")
    parser.add_argument("--evaluations", type=int, default=20, help="candidates per block visit")
    parser.add_argument("--checkpoint", help="a file of rank 0 from which an interrupted search goes on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = 0
    if "RANK" in os.environ:  # torchrun sets it
        dist.init_process_group("gloo")
        rank = dist.get_rank()

    data, model = digits(), trained("digits_vit")
    calibration = data.calibration(900, seed=0).split(50)
    _, quantized = quantize(model, calibration, weight_bits=2)
    before = accuracy(logits(quantized, data.test), data.test_labels)
    started = time.monotonic()
    config = cptv_ao.RefineConfig(gradient_steps=args.steps, evaluations=args.evaluations, passes=1)
    cptv_ao.refine(quantized, calibration, float_model=model, config=config, checkpoint=args.checkpoint)
    seconds = time.monotonic() - started
    outputs = logits(quantized, data.test)

    digest = hashlib.sha256(outputs.numpy().tobytes()).hexdigest()[:16]
    # One write, or the ranks' lines run into one another.
    print(f"rank {rank}: outputs of the refined model {digest}\n", end="", flush=True)
    if rank == 0:
        after = accuracy(outputs, data.test_labels)
        print(f"{len(data.test)} test images: {before:.4f} -> {after:.4f} in {seconds:.0f} s")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
