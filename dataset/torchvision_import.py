"""`from dataset.torchvision_import import torchvision`: works beside any build of torch.

torchvision's operators are compiled against one build of torch. Beside another (the CUDA torchvision of PyPI with a
CPU torch) they do not load, and the import fails where shapes are registered for two of them. Reading data sets needs
no such operator, so declaring these two is enough. Where the operators load, the first import succeeds and nothing
is declared: a second declaration would clash with theirs.
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
