"""What holds for every method of the registry: real steps on the published pairs, and what a step may not do."""

import json
import zlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_student
from distiller_zoo import Distiller, DistillError, distiller_dict
from distiller_zoo.adapters import Embed
from helper import checkpoint
from helper.loops import pretrain
from models import create_model
from tests.common import as_teacher, calibrate, call, make_loader, make_opt, make_source, make_student, skip_first_stage
from train_student import parse

PAIRS = [  # teacher, student, whether their maps have the same channels
    ("wrn_40_2", "wrn_16_2", True),
    ("wrn_40_2", "wrn_40_1", False),
    ("resnet56", "resnet20", True),
    ("resnet110", "resnet20", True),
    ("resnet110", "resnet32", True),
    ("resnet32x4", "resnet8x4", True),
    ("vgg13", "vgg8", True),
    ("vgg13", "MobileNetV2", False),
    ("ResNet50", "MobileNetV2", False),
    ("ResNet50", "vgg8", False),
    ("resnet32x4", "ShuffleV1", False),
    ("resnet32x4", "ShuffleV2", False),
    ("wrn_40_2", "ShuffleV1", False),
]
LARGE = {"resnet110", "resnet32x4", "ResNet50"}
SAME_CHANNELS = {"fsp", "kdsvd"}  # these compare channel by channel
FIRST_STAGE = {"abound", "factor", "fsp"}
FROZEN = {"abound": ("connector",), "factor": ("paraphraser",), "rrd": ("embed_t",)}  # parts still in the main stage
STILL = {"icd": {"b"}}  # cancels in every softmax: its gradient is zero but for rounding
# what else changes in a method: parts of its state by prefix
STATE = {"crd": ("contrast.",), "rrd": ("queue",)}


def test_every_method_names_its_paper():
    for name, method in distiller_dict.items():
        assert name == "none" or "https://" in method.__doc__, name


# --- one step of each stage, on every published pair ---


def setting(arch_t, arch_s, out):
    """-> options, a loader of batches of four, the teacher, make(name) for a student of a method."""
    opt, data = make_opt("crd", flags=["--model_s", arch_s, "--init_epochs", "1"]), make_source()
    opt.options["nce_k"] = 16
    net = calibrate(arch_t, data)
    teacher = as_teacher(net, arch_t, data)
    return opt, make_loader(data), teacher, lambda name: make_student(name, opt, data, teacher, out, arch_s)


class FirstBatch:
    """A loader of one batch."""

    def __init__(self, loader):
        self.set_epoch, self.batch, self._plans = loader.set_epoch, loader.batch, loader.plans

    def __len__(self):
        return 1

    def plans(self):
        return iter([next(self._plans())])


def step(students, teacher, batch):
    images, target, index = batch
    out_t = teacher(images, students)
    for student in students:
        student.update(images, target, index, out_t)


def bits(module):
    """A checksum of every parameter and buffer."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {key: zlib.crc32(t.detach().contiguous().flatten().view(torch.uint8).numpy()) for key, t in tensors}


def changed(module, before):
    return {key for key, value in bits(module).items() if value != before[key]}


def names(module):
    return {key for key, _ in module.named_parameters()}


def of_parts(module, prefixes):
    return {key for key in bits(module) if key.startswith(tuple(prefixes))}


def feature_modules(model):
    """Names of the parameters and buffers before the classifier, as get_feat_modules() lists them."""
    parts = model.get_feat_modules()
    own = {id(t) for t in [*parts.parameters(), *parts.buffers()]}
    return {key for key, t in [*model.named_parameters(), *model.named_buffers()] if id(t) in own}


def check_first_stage(student, model_before, method_before):
    assert not student.run.failed, f"{student.name}: {student.run.failed}"
    moved, own = changed(student.model, model_before), changed(student.distiller, method_before)
    if student.name in ("abound", "fsp"):
        assert moved == feature_modules(student.model), student.name
    else:
        assert not moved, student.name
    if student.name in ("abound", "factor"):
        assert own == of_parts(student.distiller, FROZEN[student.name]), student.name
    else:
        assert not own, student.name


def check_main_stage(student, model_before, method_before):
    name, method, terms = student.name, student.distiller, student.meters.read()
    assert np.isfinite(list(terms.values())).all() and not student.meters.nonfinite(), f"{name}: {terms}"
    reused = {key for key, p in student.model.named_parameters() if not p.requires_grad}  # the teacher's classifier
    assert changed(student.model, model_before) == set(model_before) - reused, name
    assert {key for key, p in student.model.named_parameters() if p.grad is None} == reused, name
    assert bool(reused) == (name == "simkd")
    counts = {int(b) for key, b in student.model.named_buffers() if key.endswith("num_batches_tracked")}
    assert len(counts) == 1 or name in ("abound", "fsp"), name  # those have run some parts in their first stage

    frozen = of_parts(method, FROZEN.get(name, ("-",)))
    moved, state = changed(method, method_before), of_parts(method, STATE.get(name, ("-",)))
    assert not moved & frozen, name
    assert (names(method) - frozen - STILL.get(name, set())) <= moved, name
    for key, p in method.named_parameters():
        assert (p.grad is None) == (not p.requires_grad) == (key in frozen), f"{name}: gradient of {key}"
    for key, part in method.named_children():
        assert not names(part) or part.training == (key not in FROZEN.get(name, ())), f"{name}: mode of {key}"
    assert not state or moved & state, f"{name}: its memory does not change"
    assert (terms["kd"] != 0) == student.has_term, name
    assert (terms["div"] != 0) == (student.weights["alpha"] != 0), name


@pytest.mark.parametrize(
    ("arch_t", "arch_s", "same_channels"),
    [pytest.param(*pair, marks=pytest.mark.slow if pair[0] in LARGE else (), id="-".join(pair[:2])) for pair in PAIRS],
)
def test_a_step_of_every_method(arch_t, arch_s, same_channels, tmp_path):
    """All methods side by side against one teacher: what trains, what stays, and the teacher bit for bit."""
    opt, loader, teacher, make = setting(arch_t, arch_s, tmp_path)
    students = []
    for name in distiller_dict:
        if name in SAME_CHANNELS and not same_channels:
            with pytest.raises(DistillError, match=f"method {name}.*channels"):
                make(name)
        else:
            students.append(make(name))
    of_teacher = bits(teacher.model)

    before = {student: (bits(student.model), bits(student.distiller)) for student in students}
    for student in students:
        if student.name in FIRST_STAGE:
            student.run.open()
    pretrain(students, teacher, FirstBatch(loader), opt)
    for student in students:
        check_first_stage(student, *before[student])
        student.model.zero_grad()
        student.distiller.zero_grad()

    before = {student: (bits(student.model), bits(student.distiller)) for student in students}
    for student in students:
        student.begin_epoch(1)
    step(students, teacher, next(iter(loader)))
    for student in students:
        check_main_stage(student, *before[student])

    net = teacher.model
    assert not changed(net, of_teacher)
    assert not any(m.training for m in net.modules()) and all(p.grad is None for p in net.parameters())


# --- a step never waits for the device ---

READS = {"_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select", "bincount"}
READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "_linalg_check_errors"}
READS |= {"_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_eigvals", "linalg_lstsq"}  # they read an error code
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
BY_METHOD = ("tolist", "numpy", "cpu", "__array__")  # no operators on a CPU
# It reads LAPACK's error code, and so does every other eigendecomposition: no CUDA graph with this method.
WAITS_FOR = {"kdsvd": {"_linalg_eigh"}}


class Waited(AssertionError):
    pass


class NoWait(TorchDispatchMode):
    """Refuses every operator that hands a value of a tensor, or a size that depends on one, to Python."""

    def __init__(self, allowed=()):
        super().__init__()
        self.allowed, self.seen = set(allowed), set()
        self.methods = pytest.MonkeyPatch()

    def __enter__(self):
        for name in BY_METHOD:
            self.methods.setattr(torch.Tensor, name, refused(name))
        return super().__enter__()

    def __exit__(self, *error):
        self.methods.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.seen.add(name)
        by_mask = name in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        by_counts = func is torch.ops.aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size")
        by_value = func._overloadname == "int_Tensor" and name.startswith("index_fill")  # of trace's gradient, for one
        if (name in READS or by_mask or by_counts or by_value) and name not in self.allowed:
            raise Waited(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def refused(name):
    def method(*args, **kwargs):
        raise Waited(f"Tensor.{name} waits for the device")

    return method


@pytest.mark.parametrize("name", list(distiller_dict))
def test_no_step_waits_for_the_device(name, tmp_path):
    opt, loader, teacher, make = setting("resnet14", "resnet8", tmp_path)
    student, allowed, batch = make(name), WAITS_FOR.get(name, set()), next(iter(loader))
    assert student.in_init == (name in FIRST_STAGE)
    stages = [set(), allowed] if student.in_init else [allowed]
    for stage in stages:
        student.begin_epoch(1)
        for _ in range(2):  # the first step makes momenta, constants and generators
            with NoWait(stage) as mode:
                step([student], teacher, batch)
            assert stage <= mode.seen
            assert {"convolution", "convolution_backward", "_fused_sgd_"} <= mode.seen  # forward, backward, update
        assert student.meters.read()["loss"] > 0
        skip_first_stage(student, opt)


class Waiting(Distiller):
    """https://example.org"""

    feats = -1
    where, what = "forward", None

    def forward(self, f_s, f_t):
        if self.where == "backward":
            f_s.register_hook(lambda grad: (type(self).what(grad), grad)[1])
        elif self.where == "forward":
            type(self).what(f_s)
        return f_s.square().mean()

    def after_step(self):
        if self.where == "after_step":
            type(self).what(torch.rand(3, 3))


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.detach().sum()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "range": lambda x: range(x.sum().long()),
    "slice": lambda x: x[: x[0, 0].long()],
    "format": lambda x: f"{x.sum():.2f}",
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "cpu": lambda x: x.cpu(),
    "in": lambda x: 1.0 in x,
    "mask": lambda x: x[x > 0],
    "set by mask": lambda x: x.detach().clone().__setitem__(x > 0, 0.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "equal": lambda x: torch.equal(x, x),
    "one_hot": lambda x: torch.nn.functional.one_hot(x.abs().long()),
    "repeat_interleave": lambda x: x.repeat_interleave(x[:, 0].abs().long(), 0),
    "index_fill": lambda x: x.index_fill(0, torch.zeros(1, dtype=torch.int64), x.sum()),
    "svd": lambda x: torch.linalg.svd(x),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(len(x))),
}


@pytest.mark.parametrize("where", ["forward", "backward", "after_step"])
@pytest.mark.parametrize("what", list(WAITS))
def test_a_method_that_waits_is_caught(what, where, tmp_path, monkeypatch):
    """So that the test above means something."""
    monkeypatch.setitem(distiller_dict, "waiting", Waiting)
    monkeypatch.setattr(Waiting, "where", where)
    monkeypatch.setattr(Waiting, "what", staticmethod(WAITS[what]))
    _, loader, teacher, make = setting("resnet8", "resnet8", tmp_path)
    student, batch = make("waiting"), next(iter(loader))
    student.begin_epoch(1)
    with pytest.raises(Waited), NoWait():
        step([student], teacher, batch)


# --- a method added at run time ---


class Mean(Distiller):
    """Mean Matching, made up. https://example.org

    width: of the space in which the means are compared
    """

    feats = -1
    needs = ("target", "logit_t")
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 3.0}

    def __init__(self, s_dim: int, t_dim: int, n_cls: int, width: int = 7, sharpness: float = 0.5):
        super().__init__()
        self.embed_s, self.embed_t = Embed(s_dim, width), Embed(t_dim, width)
        self.of_class = nn.Embedding(n_cls, width)
        self.sharpness = sharpness

    def forward(self, f_s, f_t, target, logit_t):
        to_t = (self.embed_s(f_s) - self.embed_t(f_t)).square().sum(1)
        to_class = (self.embed_s(f_s) - self.of_class(target)).square().sum(1)
        return (to_t + logit_t.softmax(1).amax(1) * to_class).mean() * self.sharpness


@pytest.fixture
def mean(monkeypatch):
    monkeypatch.setitem(distiller_dict, "mean", Mean)


def test_a_new_method_has_its_flags(mean, capsys):
    opt = parse(["--path_t", "x", "--distill", "Mean", "kd", "--width", "5"])
    assert opt.distill == ["mean", "kd"] and opt.options == {"width": 5} and type(opt.options["width"]) is int
    assert parse(["--path_t", "x", "--distill", "mean", "--sharpness", "2"]).options == {"sharpness": 2.0}
    for flags, *said in (
        (["--distill", "kd", "--width", "5"], "--width: ", "kd", "mean"),
        (["--distill", "mean", "--width", "5.5"], "--width: ", "'5.5' is not an integer"),
        (["--distill", "mean", "--nce_k", "5"], "--nce_k: ", "mean", "crd"),
    ):
        with pytest.raises(SystemExit):
            parse(["--path_t", "x", *flags])
        err = capsys.readouterr().err
        assert all(word in err for word in said) and err.count("\n") == 1
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--width WIDTH of the space in which the means are compared (mean 7)" in out


def test_an_option_may_not_be_named_like_a_flag(monkeypatch):
    class Clash(Distiller):
        def __init__(self, trial: int = 3):
            super().__init__()

    monkeypatch.setitem(distiller_dict, "clash", Clash)
    with pytest.raises(DistillError, match="method clash: its option trial is a flag of the script's own"):
        parse(["--path_t", "x"])


def test_without_it_there_is_no_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--path_t", "x", "--distill", "kd", "--width", "5"])
    assert "unrecognized arguments: --width 5" in capsys.readouterr().err


def test_a_new_method_trains_through_the_script(mean, image_folder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    path_t = tmp_path / "resnet8_vanilla" / "x.pth"
    path_t.parent.mkdir()
    torch.save(create_model("resnet8", 3).state_dict(), path_t)
    args = ["--dataset", "folder", "--data_folder", image_folder, "--path_t", path_t, "--output", tmp_path / "out"]
    args += ["--distill", "none", "mean", "--width", "5", "--epochs", "1", "--batch_size", "16", "--device", "cpu"]
    code, out, _ = call(train_student, args, monkeypatch, capsys)
    assert code == 0 and "mean: last " in out
    found = {json.loads(path.read_text())["method"]: path.parent for path in (tmp_path / "out").rglob("config.json")}
    config = json.loads((found["mean"] / "config.json").read_text())
    assert config["options"] == {"width": 5} and config["weights"] == {"gamma": 1.0, "alpha": 0.0, "beta": 3.0}
    (line,) = map(json.loads, (found["mean"] / "metrics.jsonl").read_text().splitlines())
    assert line["train_kd"] > 0
    assert line["train_loss"] == pytest.approx(line["train_cls"] + 3 * line["train_kd"], rel=1e-4)
    state = checkpoint.load(found["mean"] / "resume.pth")
    assert state["distiller"]["embed_s.linear.weight"].shape == (5, 64)
    assert len(state["optimizer"]["state"]) == len(list(create_model("resnet8", 3).parameters())) + 5
    students = [checkpoint.load(next(found[name].glob("*_last.pth")))["model"] for name in ("none", "mean")]
    assert any(not torch.equal(students[0][key], students[1][key]) for key in students[0])
