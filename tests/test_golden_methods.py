"""Methods and adapters against the golden records: reference values and gradients in float64."""

from pathlib import Path

import pytest
import torch

from distiller_zoo import create_distiller, kd_loss
from distiller_zoo.AB import ABLoss
from distiller_zoo.adapters import Connector, ConvReg, Embed, LinearEmbed, Paraphraser, Translator
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


SIMPLE = {"similarity": -2, "rkd": -1, "rkd_w": -1, "pkt": -1, "nst": slice(1, -1), "fsp": slice(0, -1)}
SIMPLE |= {"factor_direct": -2, "factor_direct_p2_2": -2}


def listed(f):
    return f if isinstance(f, list) else [f]


@pytest.mark.parametrize("case", [case for family in SIMPLE for case in of_family(family)])
def test_methods_without_parameters(case):
    family, letter = case.split("/")
    name = family.split("_")[0]
    if letter == "mixed":
        g_s = [feat(f"fsp/s/{i}", s) for i, s in enumerate([(4, 16, 8, 8), (4, 32, 16, 16), (4, 24, 4, 4)])]
        g_t = [feat(f"fsp/t/{i}", s) for i, s in enumerate([(4, 16, 16, 16), (4, 32, 8, 8), (4, 24, 4, 4)])]
        f_s, f_t = doubled(g_s, grad=True), doubled(g_t)
        method = create_distiller("fsp", s_shapes=[*shapes(g_s), (4, 24)], t_shapes=[*shapes(g_t), (4, 24)])
    else:
        g_s, g_t = pair(case)
        f_s, f_t = g_s[SIMPLE[family]], g_t[SIMPLE[family]]
        method = create_distiller(name, s_shapes=shapes(g_s), t_shapes=shapes(g_t))
    if family == "rkd_w":
        method.w_distance, method.w_angle = 1.0, 2.0
    if family == "factor_direct_p2_2":
        method.p2 = 2
    loss = {"fsp": method.init_loss, "factor": getattr(method, "distance", None)}.get(name, method)(f_s, f_t)
    loss.backward()
    close(loss, CASES[case]["loss"])
    check_grads(listed(f_s), CASES[case]["grad_s"])


def check_params(method, record, rename=lambda key: key):
    for name, p in method.named_parameters():
        want = record["param_grads"][rename(name)]
        if want is None or p.grad is None:
            assert p.grad is None or not p.grad.any()
        else:
            close(p.grad.norm(), want["norm"], 1e-6, 1e-12)


def fill_as(method, rename):
    for key, value in method.state_dict().items():
        value.copy_(recipe.fill_value(rename(key), value.shape))


def test_correlation_direct():
    method = create_distiller("correlation", s_dim=128, t_dim=128).double()
    method.embed_s = method.embed_t = torch.nn.Identity()
    f_s, f_t = (feat(f"cc/{side}", (8, 128), "pre").double() for side in "st")
    f_s.requires_grad_()
    loss = method(f_s, f_t)
    loss.backward()
    close(loss, CASES["correlation_direct"]["loss"])
    check_grads([f_s], CASES["correlation_direct"]["grad_s"])


@pytest.mark.parametrize("case", of_family("correlation") + of_family("vid") + of_family("factor"))
def test_methods_with_parameters(case):
    record, name = CASES[case], case.split("/")[0]
    g_s, g_t = pair(case)
    data = dict(s_shapes=shapes(g_s), t_shapes=shapes(g_t), s_dim=g_s[-1].size(1), t_dim=g_t[-1].size(1))
    method = create_distiller(name, **data).double()

    def rename(key):
        return key.removeprefix("maps.")

    assert {rename(k): list(v.shape) for k, v in method.state_dict().items()} == record["state_shapes"]
    fill_as(method, rename)
    f_s, f_t = g_s[method.feats], g_t[method.feats]
    loss = method(f_s, f_t)
    loss.backward()
    close(loss, record["loss"])
    check_grads(listed(f_s), record["grad_s"])
    check_params(method, record, rename)


def test_factor_init():
    g_s, g_t = pair("factor_init/A")
    method = create_distiller("factor", s_shapes=shapes(g_s), t_shapes=shapes(g_t)).double()
    fill_as(method.paraphraser, lambda key: key)
    loss = method.init_loss(None, g_t[-2])
    loss.backward()
    close(loss, CASES["factor_init/A"]["loss"])
    check_params(method.paraphraser, CASES["factor_init/A"])


def test_vid_starts_at_the_published_variance():
    method = create_distiller("vid", s_shapes=[(2, 4, 8, 8)] * 3, t_shapes=[(2, 6, 8, 8)] * 3)
    close(method.maps[0].log_scale, torch.full((6,), 4.99323), 1e-5)


def test_kdsvd():
    """The record with every right singular vector's sum positive: other values hang on the library's signs."""
    record = CASES["kdsvd/A"]
    g_s, g_t = (g[1:-1] for g in pair("kdsvd/A"))
    loss = create_distiller("kdsvd", s_shapes=[0, *shapes(g_s), 0], t_shapes=[0, *shapes(g_t), 0])(g_s, g_t)
    loss.backward()
    close(loss, record["canonical_loss"])
    check_grads(g_s, record["canonical_grad_s"])


def test_rrd():
    record = CASES["rrd/A"]
    c = record["ctor"]
    data = {key: c[key] for key in ("s_dim", "t_dim")}
    options = {key: c[key] for key in ("feat_dim", "nce_k", "nce_t_s", "nce_t_t")}
    method = create_distiller("rrd", options, **data).double()
    embeds(method)
    method.queue.copy_(recipe.step_queue(c["nce_k"]))
    for k, want in enumerate(record["steps"]):
        f_s, f_t = (feats("A", side, step=k)[-1][:8].double().requires_grad_() for side in "st")
        loss = method(f_s, f_t)
        loss.backward()
        method.after_step()
        close(loss, want["loss"])
        check_grads([f_s, f_t], [want["grad_s"], want["grad_t"]])
        assert int(method.queue_ptr) == want["queue_ptr"]
        close(method.queue.abs().sum(), want["queue_abs_sum"])
        assert not method.queue.requires_grad


def test_every_record_is_met():
    """No family of records is left out."""
    tested = {"kd", "hint", "attention", "attention_p4", "abound", "abound_direct", "abound_margin2", "icd", "crd"}
    tested |= {*SIMPLE, "correlation", "correlation_direct", "vid", "factor", "factor_init", "kdsvd", "rrd"}
    assert {case.split("/")[0] for case in CASES} - tested == {"hint_direct"}  # the loss alone is torch's


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
    if cls == "Paraphraser":
        return Paraphraser(g_t[-2].size(1)), g_t[-2]
    if cls == "Translator":
        return Translator(g_s[-2].size(1), g_t[-2].size(1)), g_s[-2]
    return {"Embed": Embed, "LinearEmbed": LinearEmbed}[cls](g_s[-1].size(1), 128), g_s[-1]


# The others of the records (MLPEmbed, Regress, ConnectorV2, LinearClassifier) serve no method.
ADAPTERS = ("ConvReg", "ConvReg_norelu", "Connector", "Embed", "LinearEmbed", "Translator", "Paraphraser")


@pytest.mark.parametrize("name", [n for n in MODULES if n.split("/")[0] in ADAPTERS and "eval" in MODULES[n]])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_adapter(name, mode):
    record = MODULES[name]
    module, f = adapter_case(name)
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == record["state_shapes"]
    recipe.fill_module(module).double().train(mode == "train")
    out = module(doubled(f) if isinstance(f, list) else f.double())
    if isinstance(module, Paraphraser):  # the record has the code, too
        out = [module.encoder(f.double()), out]
    for o, want in zip(listed(out), record[mode], strict=True):
        assert list(o.shape) == want["shape"]
        close(o.mean(), want["mean"])
        close(o.std(), want["std"])
        close(o.flatten()[:8], want["first8"])
