"""A student that predicts through the teacher's classifier (SimKD)."""

import re

from torch import Tensor, nn

from models.util import ModelError, conv, feature_shapes, global_pool

# as in resnet8x4-simkd256f2; p<ratio> follows where the last map is pooled before it is projected
NAME = re.compile(r"(?P<net>.+)-simkd(?P<t_dim>[1-9]\d{0,4})f(?P<factor>[1-9]\d{0,2})(p(?P<pool>[1-9]\d?))?")


class Reused(nn.Module):
    """The stages of a network, a projector of its last map, and the linear classifier of another network, frozen.

    What the network has behind its stages is dropped. create_model(arch) builds the same again.
    t_dim: inputs of the classifier; factor: how much narrower the projector is; pool: ratio of the last maps' heights
    """

    def __init__(
        self, net: nn.Module, t_dim: int, n_cls: int, factor: int = 2, pool: int = 1, image_size: int | None = None
    ):
        super().__init__()
        if factor > t_dim:
            raise ModelError(f"a projector to {t_dim} channels cannot be {factor} times narrower")
        self.arch = f"{net.arch}-simkd{t_dim}f{factor}" + (f"p{pool}" if pool > 1 else "")
        c_in, mid = feature_shapes(net, image_size)[-2][1], t_dim // factor
        drop_tail(net, set(net.get_feat_modules().modules()))
        net.headless = True  # a foreign network then skips its logits
        self.net = net
        self.pool = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        layers = []
        for c, c_out, kernel in ((c_in, mid, 1), (mid, mid, 3), (mid, t_dim, 1)):
            layers += [conv(c, c_out, kernel), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.transfer = nn.Sequential(*layers)
        self.fc = nn.Linear(t_dim, n_cls).requires_grad_(False)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.net, self.transfer])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        feats, _ = self.net(x, is_feat=True)
        pre = self.transfer[:-1](self.pool(feats[-2]))
        f = self.transfer[-1](pre)
        pooled = global_pool(f)
        logit = self.fc(pooled)
        if preact:  # the projector takes the last map after its ReLU, so the other maps are computed once more
            feats, _ = self.net(x, is_feat=True, preact=True)
        return ([*feats[:-2], pre if preact else f, pooled], logit) if is_feat else logit


def drop_tail(module: nn.Module, stages: set[nn.Module]) -> None:
    """Replace by identities what has parameters and belongs to no stage: it would get no gradient."""
    for name, child in module.named_children():
        if child in stages:
            continue
        if not stages.isdisjoint(child.modules()):
            drop_tail(child, stages)
        elif any(True for _ in child.parameters()):
            setattr(module, name, nn.Identity())
