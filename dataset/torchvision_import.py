"""`from dataset.torchvision_import import torchvision`: works beside any build of torch.

torchvision's operators are compiled against one build of torch; beside another (the CUDA torchvision of PyPI and a CPU
torch) the import fails where shapes are registered for two of them. Reading data sets needs no operator, so declaring
these two is enough. Where the operators load, nothing is declared, as a second declaration would clash.
"""

import sys

import torch

SCHEMAS = {name: "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")}

try:
    import torchvision
except RuntimeError as error:
    if "operator torchvision::" not in str(error):
        raise
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)
    for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[module]  # half imported
    import torchvision

__all__ = ["torchvision"]
