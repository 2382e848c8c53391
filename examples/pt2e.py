"""The export flow (PT2E) with 3-bit weights and 3-bit activations: refine, save, load.

    python examples/pt2e.py

Exported graphs hold activations to their bits, so that 3 bits are 3 bits. The digits ViT goes through torch.export,
prepare_pt2e and convert_pt2e of torchao (extra `pt2e`), is refined with the same call as an FX model, saved with
torch.export and loaded again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from workloads import digits, options, quantize_exported, shown, trained

import cptv_ao


def main() -> None:
    parser = options(__doc__, seconds=30)
    parser.add_argument("--bits", type=int, default=3, choices=range(2, 9), help="of weights and activations")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data, model = digits(), trained("digits_vit")
    calibration = data.calibration(900, seed=0).split(100)
    quantized = quantize_exported(model, calibration, weight_bits=args.bits, activation_bits=args.bits)

    config = cptv_ao.RefineConfig(max_seconds=args.seconds)
    refined = cptv_ao.refine(quantized, calibration, float_model=model, config=config, inplace=False)
    print(f"{cptv_ao.report(refined)}\n")

    # Scales of activations are numbers in the graph: a state_dict does not hold them, torch.export does.
    batch = ({0: torch.export.Dim("batch", min=1, max=1 << 16)},)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "refined.pt2"
        torch.export.save(torch.export.export(refined, (calibration[0],), dynamic_shapes=batch), path)
        loaded = torch.export.load(path).module()

    models = {"quantized": quantized, "refined": refined, "refined, loaded": loaded}
    shown(models, model, data.test, data.test_labels)
    with torch.inference_mode():
        same = torch.equal(refined(data.test), loaded(data.test))
    print("the loaded model gives " + ("the same outputs, bit for bit" if same else "OTHER outputs"))


if __name__ == "__main__":
    main()
