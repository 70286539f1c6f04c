"""The newer methods against golden records of the authors' code: values, gradients and statistics in float64."""

from pathlib import Path

import pytest
import torch

from distiller_zoo import create_distiller
from distiller_zoo.base import warm_up
from tests.golden import recipe, recipe_newer

GOLDEN = torch.load(Path(__file__).parent / "golden" / "golden_newer.pt", weights_only=True)
CASES = GOLDEN["cases"]
OPTIONS = {  # the records' names of options, ours
    "dkd": {"alpha": "dkd_alpha", "beta": "dkd_beta", "T": "dkd_T"},
    "rld": {"alpha": "rld_alpha", "beta": "rld_beta", "T": "rld_T", "T_alpha": "rld_T_alpha"},
    "nkd": {"T": "nkd_T", "gamma": "nkd_gamma"},
    "dist": {"tau": "dist_tau"},
    "ttm": {"power": "power"},
    "wttm": {"power": "power"},
    "itrd": {"alpha": "alpha_it", "lambda_corr": "lambda_corr", "lambda_mutual": "lambda_mutual"},
}
LATE = torch.tensor(99.0)  # an epoch after every warm-up


def of_family(*names):
    return [case for case in CASES if case.split("/")[0] in names]


def close(got, want, rtol=1e-8, scale=0.0):
    got, want = (torch.as_tensor(value, dtype=torch.float64).detach().flatten() for value in (got, want))
    torch.testing.assert_close(got, want, rtol=rtol, atol=max(1e-11, rtol * float(scale)))


def check_tensor(key, got, record):
    found = recipe_newer.summary(key, got)
    for name in ("norm", "dot", "first8", "last8"):
        close(found[name], record[name], 1e-7, record["norm"])


def double(x, grad=False):
    return [double(f, grad) for f in x] if isinstance(x, list) else x.double().requires_grad_(grad)


def options_of(name, record):
    return {ours: record["options"][theirs] for theirs, ours in OPTIONS.get(name, {}).items()}


@pytest.mark.parametrize("case", of_family("dkd", "dkd_ls", "dist", "ttm", "wttm", "rld", "rld_ls", "nkd", "kd_ls"))
def test_logits(case):
    record = CASES[case]
    name = case.split("/")[0].removesuffix("_ls")
    target, logit_s, logit_t = recipe_newer.inputs(record["inputs"])
    options = options_of(name, record) | ({"logit_stand": True} if "_ls" in case else {})
    method = create_distiller(name, options, n_cls=logit_s.size(1))
    if name == "dist":
        method.w_inter, method.w_intra = record["options"]["beta_inter"], record["options"]["gamma_intra"]
    logit_s, logit_t = logit_s.double().requires_grad_(), logit_t.double()
    known = {"logit_s": logit_s, "logit_t": logit_t, "target": target, "epoch": LATE}
    if name == "kd":
        loss = method.kl(logit_s, logit_t, record["options"]["T"])
    else:
        loss = method([], [], **{key: known[key] for key in method.needs})
    loss.backward()
    close(loss, record["loss"])
    check_tensor(case, logit_s.grad, record["grad_s"][0])


def fill(module, record):
    """Give a module the record's weights."""
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == record["state_shapes"]
    return recipe.fill_module(module).double().train()


def check_module(module, record):
    """Gradients of the parameters, and batch-norm statistics."""
    for key, p in module.named_parameters():
        if record["param_grads"][key] is not None:
            close(p.grad.norm(), record["param_grads"][key]["norm"], 1e-6, 1e-6)
    for key, value in module.named_buffers():
        if "running" in key:
            close(value.abs().sum(), record["buffers"][key]["abs_sum"])


def features(record):
    _, g_s, g_t = recipe_newer.inputs(record["inputs"])
    g_s, g_t = double(g_s, grad=True), double(g_t)
    shapes = {"s_shapes": [f.shape for f in g_s], "t_shapes": [f.shape for f in g_t]}
    return g_s, g_t, {**shapes, "s_dim": g_s[-1].size(1), "t_dim": g_t[-1].size(1)}


def check_features(case, g_s, record, each):
    for i, (f, want) in enumerate(zip(g_s, record["grad_s"], strict=True)):
        if want is None:
            assert f.grad is None or not f.grad.any()
        else:
            check_tensor(f"{case}/{i}" if each else case, f.grad, want)


@pytest.mark.parametrize("case", of_family("itrd"))
def test_itrd(case):
    record = CASES[case]
    _, e_s, e_t = recipe_newer.inputs(record["inputs"])
    method = create_distiller("itrd", options_of("itrd", record), s_dim=e_s.size(1), t_dim=e_t.size(1))
    fill(method, record)
    e_s = e_s.double().requires_grad_()
    loss = method(e_s, e_t.double())
    loss.backward()
    close(loss, record["loss"])
    check_features(case, [e_s], record, each=False)
    check_module(method, record)


@pytest.mark.parametrize("case", of_family("reviewkd"))
def test_reviewkd(case):
    record = CASES[case]
    g_s, g_t, data = features(record)
    method = fill(create_distiller("reviewkd", **data), record)
    loss = method(g_s[1:], g_t[1:], epoch=LATE)
    loss.backward()
    close(loss, record["loss"])
    check_features(case, g_s, record, each=True)
    check_module(method, record)


@pytest.mark.parametrize("case", of_family("srrl"))
def test_srrl(case):
    record = CASES[case]
    g_s, g_t, data = features(record)
    method, head = fill(create_distiller("srrl", **data), record), recipe_newer.head(data["t_dim"], 100)
    loss = method(g_s[-1], g_t[-1], logit_t=head(g_t[-1]), head_t=head)
    loss.backward()
    close(loss, record["loss"])
    check_features(case, g_s, record, each=False)
    check_module(method, record)
    assert head.weight.grad is None


class Fixed(torch.nn.Module):
    """Stands for a student's stages."""

    arch = "fixed"

    def __init__(self, feats):
        super().__init__()
        self.feats, self.scale = feats, torch.nn.Parameter(torch.ones(()))

    def get_feat_modules(self):
        return torch.nn.ModuleList()

    def forward(self, x, is_feat=True, preact=False):
        return self.feats, None


@pytest.mark.parametrize("case", of_family("simkd"))
def test_simkd(case):
    """The network that predicts, and the method's comparison of its last map with the teacher's."""
    record = CASES[case]
    g_s, g_t, data = features(record)
    t_dim, ratio = record["options"]["head_dim"], g_s[-2].size(2) // g_t[-2].size(2)
    head = recipe_newer.head(t_dim, 100)
    factor = record["options"]["factor"]
    method = create_distiller("simkd", {"simkd_factor": factor}, n_cls=100, head_t=head, **data)
    model = method.predictor(Fixed(g_s)).double().train()
    assert model.arch == f"fixed-simkd{t_dim}f{factor}" + (f"p{ratio}" if ratio > 1 else "")
    state = recipe.make_state_dict(record["state_shapes"])
    assert model.state_dict().keys() - state.keys() == {"net.scale", "fc.weight", "fc.bias"}
    model.load_state_dict(state, strict=False)
    model.fc.load_state_dict(head.state_dict())  # in float64

    feats, logit = model(None, is_feat=True)
    loss = method(feats[method.feats], g_t[method.feats])
    loss.backward()
    close(loss, record["loss"])
    check_tensor(f"{case}/pred", logit, record["pred_train"])
    check_features(case, g_s, record, each=False)
    for key, p in model.named_parameters():
        if key.startswith("transfer"):
            close(p.grad.norm(), record["param_grads"][key]["norm"], 1e-6, 1e-6)
    for key, want in record["buffers"].items():
        close(model.get_buffer(key).abs().sum(), want["abs_sum"])
    model.load_state_dict(state, strict=False)
    check_tensor(f"{case}/pred", model.eval()(None), record["pred_eval"])


def test_warm_up():
    (schedule,) = (values for name, values in GOLDEN["schedules"].items() if name.startswith("warmup_linear_20"))
    for epoch, want in schedule.items():
        assert float(warm_up(torch.tensor(float(epoch)), 20)) == pytest.approx(want)
    assert float(warm_up(torch.tensor(1.0), 0)) == 1
