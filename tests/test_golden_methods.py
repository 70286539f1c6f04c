"""Methods and adapters against the golden records: reference values and gradients in float64."""

from pathlib import Path

import pytest
import torch

from distiller_zoo import create_distiller, kd_loss
from distiller_zoo.AB import ABLoss
from distiller_zoo.adapters import Connector, ConvReg, Embed, LinearEmbed
from tests.golden import recipe
from tests.golden.recipe import feat, feats, logits

GOLDEN = torch.load(Path(__file__).parent / "golden" / "golden_losses.pt", weights_only=True)
CASES, MODULES = GOLDEN["cases"], GOLDEN["modules"]


def close(got, want, rtol=1e-8, atol=1e-11):
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(got).detach().double().reshape(want.shape), want, rtol=rtol, atol=atol)


def doubled(g, grad=False):
    return [f.double().requires_grad_(grad) for f in g]


def check_grads(g, records):
    for f, record in zip(g, records, strict=True):
        if record is None:
            assert f.grad is None or not f.grad.any()
        else:
            close(f.grad.norm(), record["norm"], 1e-6)
            close(f.grad.flatten()[:8], record["first8"], 1e-5, 1e-6 * record["norm"])


def filled(module):
    return recipe.fill_module(module).double().train()


def shapes(g):
    return [tuple(f.shape) for f in g]


def pair(case, kind="post"):
    letter = case.split("/")[1][0]
    return doubled(feats(letter, "s", kind), grad=True), doubled(feats(letter, "t", kind))


def of_family(name):
    return [case for case in CASES if case.split("/")[0] == name]


@pytest.mark.parametrize("case", of_family("kd"))
def test_kd(case):
    logit_s, logit_t = logits("s").double().requires_grad_(), logits("t").double()
    loss = kd_loss(logit_s, logit_t, float(case.split("/T")[1]))
    loss.backward()
    close(loss, CASES[case]["loss"])
    check_grads([logit_s], CASES[case]["grad_s"])


@pytest.mark.parametrize("case", of_family("hint"))
def test_hint(case):
    record, layer = CASES[case], int(case[-1])
    g_s, g_t = pair(case)
    method = create_distiller("hint", {"hint_layer": layer}, s_shapes=shapes(g_s), t_shapes=shapes(g_t))
    filled(method.regress)
    loss = method(g_s[layer], g_t[layer])
    loss.backward()
    close(loss, record["loss"])
    check_grads([g_s[layer]], record["grad_s"])
    assert {k: list(v.shape) for k, v in method.regress.state_dict().items()} == record["state_shapes"]
    for name, p in method.regress.named_parameters():
        close(p.grad.norm(), record["param_grads"][name]["norm"], 1e-6, 1e-12)


@pytest.mark.parametrize("case", of_family("attention") + of_family("attention_p4"))
def test_attention(case):
    g_s, g_t = (g[1:-1] for g in pair(case))
    method = create_distiller("attention", s_shapes=shapes(g_s), t_shapes=shapes(g_t))
    method.p = 4 if "p4" in case else 2
    loss = method(g_s, g_t)
    loss.backward()
    close(loss, CASES[case]["loss"])
    check_grads(g_s, CASES[case]["grad_s"])


@pytest.mark.parametrize("case", of_family("abound") + of_family("abound_direct") + of_family("abound_margin2"))
def test_abound(case):
    record = CASES[case]
    g_s, g_t = pair(case, "pre")
    method = ABLoss(shapes(g_s), shapes(g_t))
    method.margin = 2.0 if "margin2" in case else 1.0
    filled(method.connector)
    loss = method.init_loss(g_s[1:-1], g_t[1:-1])
    loss.backward()
    close(loss, record["loss"])
    check_grads(g_s[1:-1], record["grad_s"])
    for name, p in method.connector.named_parameters():
        close(p.grad.norm(), record["param_grads"][name]["norm"], 1e-6, 1e-12)


def embeds(method):
    for key, p in method.named_parameters():
        if key.startswith("embed_"):
            p.data = recipe.fill_value(key, p.shape).double()


@pytest.mark.parametrize("case", of_family("icd"))
def test_icd(case):
    record = CASES[case]
    if case == "icd/batch64":
        f_s, f_t = feat("q/s/64/0", (64, 256)), feat("q/t/64/0", (64, 256))
    else:
        f_s, f_t = feats("A", "s")[-1], feats("A", "t")[-1]
    f_s, f_t = f_s.double().requires_grad_(), f_t.double().requires_grad_()
    method = create_distiller("icd", s_dim=256, t_dim=256).double()
    embeds(method)
    method.log_tau.data.fill_(record["ctor"]["tau"])
    method.b.data.fill_(record["ctor"]["b"])
    loss = method(f_s, f_t)
    loss.backward()
    close(loss, record["loss"])
    check_grads([f_s], record["grad_s"])
    check_grads([f_t], [record["grad_t"]])
    renamed = {"log_tau": "params.tau", "b": "params.b"}
    for name, p in method.named_parameters():
        close(p.grad.norm(), record["param_grads"][renamed.get(name, name)]["norm"], 1e-6, 1e-12)


@pytest.mark.parametrize("case", of_family("crd"))
def test_crd(case):
    record, tag = CASES[case], case.split("/")[1]
    c = record["ctor"]
    n_data, nce_k = c["n_data"], c["nce_k"]
    labels = torch.arange(n_data) % 10
    options = {key: c[key] for key in ("feat_dim", "nce_k", "nce_t", "nce_m")}
    method = create_distiller("crd", options, s_dim=c["s_dim"], t_dim=c["t_dim"], labels=labels).double()
    embeds(method)
    for name in ("memory_v1", "memory_v2"):
        bank = (recipe.u01(f"crd/{tag}/{name}", (n_data, c["feat_dim"])) * 2 - 1) * (1 / (c["feat_dim"] / 3) ** 0.5)
        getattr(method.contrast, name).copy_(bank)
    for k, want in enumerate(record["steps"]):
        f_s, f_t = (feats("A", side, step=k)[-1][:8].double().requires_grad_() for side in "st")
        idx = recipe.distinct(f"crd/{tag}/idx/{k}", 8, n_data)
        negative = recipe.ints(f"crd/{tag}/neg/{k}", (8, nce_k), n_data)
        positive = recipe.ints(f"crd/relax/pos/{k}", (8,), n_data) if tag == "relax" else idx
        drawn = torch.cat([positive[:, None], negative], 1)
        method.contrast.draw = lambda index, drawn=drawn: drawn  # the recorded draw instead of our own
        loss = method(f_s, f_t, idx)
        loss.backward()
        method.after_step()
        close(loss, want["loss"])
        check_grads([f_s, f_t], [want["grad_s"], want["grad_t"]])
        for v in ("v1", "v2"):
            bank = getattr(method.contrast, f"memory_{v}")
            close(getattr(method.contrast, f"Z_{v}"), want[f"Z_{v}"])
            close(bank[idx][:, :8], want[f"rows_{v}_first8"])
            close(bank.abs().sum(), want[f"memory_{v}_abs_sum"])


def adapter_case(name):
    cls, tag = name.split("/")
    if tag == "9x9_to_4x4":
        return ConvReg((2, 6, 9, 9), (2, 5, 4, 4)), feat("convreg/odd", (2, 6, 9, 9))
    g_s, g_t = (feats(tag[0], side, "pre" if cls == "Connector" else "post") for side in "st")
    if cls.startswith("ConvReg"):
        f_s, f_t = g_s[int(tag[1])], g_t[int(tag[1])]
        return ConvReg(f_s.shape, f_t.shape, use_relu="norelu" not in cls), f_s
    if cls == "Connector":
        return Connector(shapes(g_s)[1:-1], shapes(g_t)[1:-1]), g_s[1:-1]
    return {"Embed": Embed, "LinearEmbed": LinearEmbed}[cls](g_s[-1].size(1), 128), g_s[-1]


ADAPTERS = ("ConvReg", "ConvReg_norelu", "Connector", "Embed", "LinearEmbed")


@pytest.mark.parametrize("name", [n for n in MODULES if n.split("/")[0] in ADAPTERS and "eval" in MODULES[n]])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_adapter(name, mode):
    record = MODULES[name]
    module, f = adapter_case(name)
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == record["state_shapes"]
    recipe.fill_module(module).double().train(mode == "train")
    out = module(doubled(f) if isinstance(f, list) else f.double())
    for o, want in zip(out if isinstance(out, list) else [out], record[mode], strict=True):
        assert list(o.shape) == want["shape"]
        close(o.mean(), want["mean"])
        close(o.std(), want["std"])
        close(o.flatten()[:8], want["first8"])
