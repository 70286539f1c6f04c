"""Training steps equal a plain loop's; captured steps equal eager ones; other precisions stay near."""

import copy
import math
import os
import shutil
from contextlib import contextmanager, nullcontext
from itertools import islice
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, recall_score
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dataset.loader import DeviceLoader
from distiller_zoo import distiller_dict
from helper import build, loops
from helper.cuda_graph import CudaGraph
from helper.loops import train, validate
from helper.options import plain
from helper.student import Teacher, forward_of, make_optimizer
from helper.util import RunError, cli_errors
from models import create_model
from models.util import head
from tests.common import CPU, as_teacher, calibrate, make_loader, make_opt, make_source, make_student, skip_first_stage

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms, before CUDA is initialised
METHODS = [name for name, method in distiller_dict.items() if method.capturable]
DATA = make_source(18, 5)


@pytest.fixture(scope="module")
def net():
    return calibrate("resnet14", DATA)


@pytest.fixture
def teacher(net):
    return as_teacher(net, "resnet14", DATA)


def setting(name, teacher, tmp_path, *flags):
    """-> options, a student of the method in its main stage."""
    opt = make_opt(name, flags=flags)
    return opt, skip_first_stage(make_student(name, opt, DATA, teacher, tmp_path), opt)


def state(student):
    """All that a step changes, as a flat list of tensors."""
    parts = [student.model.state_dict(), student.distiller.state_dict(), student.optimizer.state_dict()["state"]]
    return [t for t in tree_flatten([*parts, vars(student.meters)])[0] if isinstance(t, torch.Tensor)]


def near(a, b, rtol=1e-4, atol=1e-6):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def train_epochs(students, teacher, opt, epochs, graph=None, loader=None):
    for epoch in epochs:
        for student in students:
            student.set_lr(opt.learning_rate * 0.1 ** sum(epoch > e for e in opt.lr_decay_epochs))
        train(epoch, loader or make_loader(DATA), teacher, students, opt, graph)


# --- the loop and a plain one ---


class DoubleLoader:
    """The batches of another loader, in float64."""

    def __init__(self, loader):
        self.loader, self.set_epoch, self.plans = loader, loader.set_epoch, loader.plans

    def __len__(self):
        return len(self.loader)

    def batch(self, plan):
        images, target, index = self.loader.batch(plan)
        return images.double(), target, index

    def __iter__(self):
        return map(self.batch, self.plans())


def plain_loop(student, net, opt, loader, epochs):
    """As one would write it down: contiguous images, SGD tensor by tensor, a float learning rate."""
    model, method = student.model.to(memory_format=torch.contiguous_format), student.distiller
    params = [p for p in [*model.parameters(), *method.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(
        params, opt.learning_rate, opt.momentum, weight_decay=opt.weight_decay, foreach=False, fused=False
    )
    model.train()
    method.train()
    for epoch in epochs:
        for group in optimizer.param_groups:
            group["lr"] = opt.learning_rate * 0.1 ** (epoch - 1)
        loader.set_epoch(epoch)
        for images, target, index in loader:
            images = images.contiguous()
            g_s, logit_s = model(images, is_feat=True, preact=method.preact_s)
            with torch.no_grad():
                g_t, logit_t = net(images, is_feat=True, preact=method.preact_t)
            known = {"index": index, "target": target, "logit_s": logit_s, "logit_t": logit_t}
            known |= {"epoch": torch.tensor(float(epoch)), "head_t": head(net)}
            own = method(g_s[method.feats], g_t[method.feats], **{key: known[key] for key in method.needs})
            loss = student.weights["gamma"] * F.cross_entropy(logit_s, target) + student.weights["beta"] * own
            loss = loss + student.weights["alpha"] * method.kl(logit_s, logit_t, student.T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.after_step()
    momentum = [optimizer.state[p]["momentum_buffer"] for p in params]
    return [*model.state_dict().values(), *method.state_dict().values(), *momentum]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_the_loop_equals_a_plain_one(name, net, teacher, tmp_path):
    """In float64, where nothing but the order of additions differs and ten steps do not amplify it to be seen."""
    opt, student = setting(name, teacher, tmp_path, "--lr_decay_epochs", "1")
    _, other = setting(name, teacher, tmp_path)
    net, loader = copy.deepcopy(net).double(), DoubleLoader(make_loader(DATA))
    for each in (student, other):
        each.model.double()
        each.distiller.double()
        each.head_t = head(net)
    train_epochs([student], as_teacher(net, "resnet14", DATA), opt, (1, 2), loader=loader)
    plain = plain_loop(other, net, opt, loader, (1, 2))
    momentum = [student.optimizer.state[p]["momentum_buffer"] for p in student.optimizer.param_groups[0]["params"]]
    near([*student.model.state_dict().values(), *student.distiller.state_dict().values(), *momentum], plain, 1e-6, 1e-8)


def test_a_learning_rate_that_is_refilled_equals_a_float():
    opt, ends = make_opt("none"), []
    for refill in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size)) for size in ((300,), (7, 5), ())]
        optimizer = make_optimizer(params, opt.learning_rate, opt)
        for lr in (0.05, 0.05, 0.005, 0.0005, 0.0005):
            if refill:
                optimizer.param_groups[0]["lr"].fill_(lr)
            else:
                optimizer.param_groups[0]["lr"] = lr
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        ends.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    assert same(*ends)


def test_accuracy_does_not_depend_on_the_test_batch():
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (1010, 32, 32, 3), np.uint8), rng.integers(0, 5, 1010)
    model = create_model("resnet8", 5)
    found = [
        validate([model], DeviceLoader(images, labels, size, mean=DATA.mean, std=DATA.std))[0]
        for size in (1000, 32, 1010)
    ]
    assert found[0]["acc"] == found[1]["acc"] == found[2]["acc"]
    assert found[0]["acc_top5"] == found[1]["acc_top5"] == 100
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)


@pytest.mark.parametrize("size", [7, 1000])
def test_metrics_of_an_unbalanced_set(size):
    """As scikit-learn has them; class 3 has no images but is predicted."""
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (500, 8, 8, 3), np.uint8), rng.choice(5, 500, p=[0.7, 0.2, 0.08, 0, 0.02])
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    loader = DeviceLoader(images, labels, size, mean=DATA.mean, std=DATA.std)
    (found,) = validate([model], loader)
    predicted = torch.cat([model(batch).argmax(1) for batch, _, _ in loader]).numpy()
    assert found["acc"] == pytest.approx(100 * accuracy_score(labels, predicted)) and 3 in predicted
    f1 = f1_score(labels, predicted, average="macro", labels=np.unique(labels))
    assert found["macro_f1"] == pytest.approx(100 * f1)
    recall = recall_score(labels, predicted, average=None, labels=range(5), zero_division=np.nan)
    np.testing.assert_allclose(found["recall"], 100 * recall)
    assert np.isnan(found["recall"]).tolist() == [False, False, False, True, False]


# --- captured steps ---


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: keeps the operations of a step and their tensors, and does the same again.

    As in a graph, whatever Python computed between them (numbers, branches, attributes) stays as it was when captured.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise RuntimeError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                memory = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
                for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage().data_ptr() not in memory:  # neither a view nor in place
                        old.copy_(new)


class Watched(TorchDispatchMode):
    """Does nothing; but where any such mode is on, autograd adds gradients up in other memory formats."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def tensors(tree):
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]


class TapeGraph:
    """torch.cuda.CUDAGraph on a CPU. One has done nothing when it is captured; a tape has run once."""

    def __init__(self):
        self.tape, self.replays, self.generators = Tape(), 0, []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        if self.replays:
            self.tape.replay()
        self.replays += 1


@contextmanager
def tape_graph(graph, stream, capture_error_mode):
    """torch.cuda.graph on a CPU, of torch 2.11: a failed capture fails again at its end, and spoils the generators."""
    assert capture_error_mode == "thread_local"  # else a pinned batch, made beside it by a DataLoader, would end both
    try:
        with graph.tape:
            yield
    except RuntimeError:
        for generator in (*graph.generators, *torch.cuda.default_generators):
            generator.set_state("capturing")
        raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904


class CpuGraph(CudaGraph):
    """Captures as the real one, on a CPU."""

    def __init__(self, generators=()):
        super().__init__(CPU, batch_size=4)
        self.made, self.generators = [], generators

    def on_stream(self):
        return nullcontext()

    def new(self):
        self.made.append(TapeGraph())
        return self.made[-1]

    def capture(self, step):
        with patch.multiple(torch.cuda, CUDAGraph=self.new, graph=tape_graph, default_generators=self.generators):
            return super().capture(step)


@pytest.mark.parametrize("name", METHODS)
def test_captured_steps_equal_eager_ones(name, teacher, tmp_path):
    """Bit for bit: three to warm up, one of two images in each epoch run eagerly, the other nine from the capture."""
    opt, student = setting(name, teacher, tmp_path, "--lr_decay_epochs", "2")
    _, other = setting(name, teacher, tmp_path)
    graph = CpuGraph()
    with Watched():
        train_epochs([student], teacher, opt, (1, 2, 3), graph)
        train_epochs([other], teacher, opt, (1, 2, 3))
    assert [made.replays for made in graph.made] == [9] and same(state(student), state(other))


class TupleLoader(DeviceLoader):
    """Plans as tuples of tensors, as of a loader that reads from disk."""

    def plans(self):
        return map(tuple, super().plans())


def test_a_plan_may_be_a_tuple(teacher, tmp_path):
    (opt, student), (_, other), graph = setting("kd", teacher, tmp_path), setting("kd", teacher, tmp_path), CpuGraph()
    same_as = {"mean": DATA.mean, "std": DATA.std, "augment": "crop", "seed": 3}
    loader = TupleLoader(DATA.train_images, DATA.train_labels, 4, **same_as)
    with Watched():
        train_epochs([student], teacher, opt, (1, 2), graph, loader)
        train_epochs([other], teacher, opt, (1, 2))
    assert [made.replays for made in graph.made] == [5] and same(state(student), state(other))


def test_adamw_is_captured(teacher, tmp_path):
    """Its count of steps, too; without the flag it refuses to be captured on CUDA."""
    flags = ["--optimizer", "adamw"]
    (opt, student), (_, other) = (setting("kd", teacher, tmp_path, *flags) for _ in range(2))
    graph = CpuGraph()
    with Watched():
        train_epochs([student], teacher, opt, (1, 2), graph)
        train_epochs([other], teacher, opt, (1, 2))
    assert [made.replays for made in graph.made] == [5] and same(state(student), state(other))
    assert student.optimizer.param_groups[0]["capturable"]


def test_a_step_is_captured_again_when_a_student_ends(teacher, tmp_path):
    opt, kd = setting("kd", teacher, tmp_path)
    _, crd = setting("crd", teacher, tmp_path)
    graph = CpuGraph()
    train_epochs([kd, crd], teacher, opt, (1, 2), graph)
    before = copy.deepcopy(state(kd))
    train_epochs([crd], teacher, opt, (3, 4), graph)
    assert [made.replays for made in graph.made] == [5, 5] and same(state(kd), before)
    _, alone = setting("crd", teacher, tmp_path)
    train_epochs([alone], teacher, opt, (1, 2, 3, 4))
    assert same(state(crd), state(alone))


def waits(self, f_s, f_t):
    """A method that waits for the device, and does not say so."""
    return (f_s[0] * float(f_t[0].mean())).mean()


@pytest.mark.parametrize("name", ["kdsvd", "attention"])
def test_what_cannot_be_captured_runs_eagerly(name, teacher, tmp_path, capsys, monkeypatch):
    if name == "attention":
        monkeypatch.setattr(distiller_dict[name], "forward", waits)
    opt, student = setting(name, teacher, tmp_path)
    graph = CpuGraph()
    train_epochs([student], teacher, opt, (1, 2), graph)
    out = capsys.readouterr().out
    assert out.count("not captured as a CUDA graph") == 1 and "waits for the device" in out
    assert not graph.replay and student.meters.steps == 5


class CudaGenerator:
    """What is asked of a torch.Generator of CUDA."""

    def __init__(self):
        self.set_state("usable")

    def set_state(self, state):
        self.state = state

    def clone_state(self):
        return self.state

    graphsafe_set_state = set_state


@pytest.mark.parametrize(("version", "registered"), [("2.11.0", 1), ("2.14.0", 0)])
def test_after_a_failed_capture(version, registered, teacher, tmp_path, capsys, monkeypatch):
    """The generators can be drawn from, and another step is captured. Later versions warn of what they need no more."""
    opt, kd = setting("kd", teacher, tmp_path)
    _, failing = setting("attention", teacher, tmp_path)
    monkeypatch.setattr(distiller_dict["attention"], "forward", waits)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    own, others = CudaGenerator(), [CudaGenerator(), CudaGenerator()]
    failing.distiller.generators = lambda: [own]
    graph = CpuGraph(others)
    train_epochs([failing], teacher, opt, (1,), graph)
    assert not graph.replay and {each.state for each in (own, *others)} == {"usable"}
    assert graph.made[0].generators == [own] * registered
    train_epochs([kd], teacher, opt, (1, 2), graph)
    assert [made.replays for made in graph.made] == [0, 5] and kd.meters.steps == 5
    assert capsys.readouterr().out.count("not captured as a CUDA graph") == 1


FULL = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 15.00 MiB is "
    "free. Including non-PyTorch memory, this process has 79.08 GiB memory in use. Of the allocated memory 1 GiB is .."
)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    ("message", "said"), [(FULL, "20.00 MiB were asked for, 15.00 MiB of 79.10 GiB are free"), ("odd", "odd")]
)
def test_out_of_memory_is_one_sentence(captured, message, said, teacher, tmp_path, capsys, monkeypatch):
    """Raised in a step, eager or while it is captured."""
    opt, student = setting("attention", teacher, tmp_path)
    graph, real = CpuGraph(), distiller_dict["attention"].forward

    def forward(self, f_s, f_t):
        if graph.made or not captured:
            raise torch.OutOfMemoryError(f"{message}\nsee the manual")
        return real(self, f_s, f_t)

    monkeypatch.setattr(distiller_dict["attention"], "forward", forward)
    assert cli_errors(lambda: train_epochs([student], teacher, opt, (1,), graph if captured else None)) == 2
    out, err = capsys.readouterr()
    assert said in err and "--batch_size" in err and "manual" not in err and err.count("\n") == 1 and not out
    assert bool(graph.made) == captured


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@on_gpu
@pytest.mark.parametrize("name", METHODS)
def test_cuda_graphs_equal_eager_steps(name, net, tmp_path, deterministic):
    """Bit for bit. Of two students, one ends an epoch before the other."""
    ends, device = [], torch.device("cuda")
    for flag in ("--graph", "--no-graph"):
        opt = make_opt(name, "none", flags=["--device", "cuda", flag])
        teacher = as_teacher(copy.deepcopy(net).cuda(), "resnet14", DATA)
        students = [make_student(n, opt, DATA, teacher, tmp_path, device=device) for n in (name, "none")]
        students = [skip_first_stage(student, opt) for student in students]
        graph, (loader, *_) = loops.graph_of(students, opt), build.make_loaders(DATA, opt, device)
        train_epochs(students, teacher, opt, (1, 2), graph, loader)
        train_epochs(students[:1], teacher, opt, (3,), graph, loader)
        assert not graph or (graph.replay and not graph.trouble)
        ends.append([t.cpu() for student in students for t in state(student)])
    assert same(*ends)


@on_gpu
def test_a_graph_is_captured_after_a_failed_one(net, tmp_path, monkeypatch):
    """As with the stand-in above, and the default generator draws again."""
    device, opt = torch.device("cuda"), make_opt("attention", "crd", flags=["--device", "cuda"])
    teacher = as_teacher(copy.deepcopy(net).cuda(), "resnet14", DATA)
    loader, *_ = build.make_loaders(DATA, opt, device)
    failing, crd = (make_student(n, opt, DATA, teacher, tmp_path, device=device) for n in ("attention", "crd"))
    monkeypatch.setattr(distiller_dict["attention"], "forward", waits)
    graph = loops.graph_of([failing, crd], opt)
    train_epochs([failing, crd], teacher, opt, (1,), graph, loader)
    assert graph.trouble and torch.randn(2, device=device).shape == (2,)
    train_epochs([crd], teacher, opt, (2,), graph, loader)
    assert graph.replay and not graph.trouble


# --- memory format and precision ---


@pytest.mark.parametrize("name", METHODS)
def test_a_memory_format_changes_nothing_but_rounding(name, net, tmp_path):
    losses, less = [], ["-b", "300"] if name == "pkt" else []  # its weight of 30,000 amplifies rounding, too
    for flag in ("--channels_last", "--no-channels_last"):
        layout = {"--channels_last": torch.channels_last, "--no-channels_last": torch.contiguous_format}[flag]
        teacher = Teacher("resnet14", copy.deepcopy(net), DATA.n_cls)
        opt, student = setting(name, teacher, tmp_path, flag, "--learning_rate", "0.001", *less)
        build.move_teacher(teacher, CPU, opt)
        loader, test, _ = build.make_loaders(DATA, opt, CPU)
        student.begin_epoch(1)
        params = [*student.model.parameters(), *teacher.model.parameters()]
        weights = [p for p in params if p.dim() == 4 and p.size(2) > 1]
        for images, target, index in islice(loader, 3):
            out_t = teacher(images, [student])
            student.update(images, target, index, out_t)
            maps = out_t.get(False, ([],))[0][:-1] + student.forward(images, False)[0][:-1]
            for x in (images, next(iter(test))[0], *maps, *weights):
                assert x.is_contiguous(memory_format=layout)
                assert min(x.shape[1:]) == 1 or x.is_contiguous() != x.is_contiguous(memory_format=torch.channels_last)
            losses.append(student.meters.read()["loss"])
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("flags", "exact"), [([], True), (["--precision", "bf16"], False), (["--precision_t", "bf16"], False)]
)
@pytest.mark.parametrize("name", ["kd", "hint", "crd"])
def test_bf16_is_near_and_leaves_float32(name, flags, exact, net, tmp_path):
    terms = []
    for given in (flags, []):
        teacher = Teacher("resnet14", net, DATA.n_cls)
        opt, student = setting(name, teacher, tmp_path, *given)
        build.move_teacher(teacher, CPU, opt)
        images, target, index = next(iter(make_loader(DATA)))
        student.update(images, target, index, teacher(images, [student]))
        terms.append(student.meters.sums[:4] / 4)
        assert all(t.dtype in (torch.float32, torch.float64, torch.int64, torch.uint8) for t in state(student))
        assert all(math.isfinite(float(t.double().sum())) for t in state(student))
    assert torch.equal(*terms) == exact
    torch.testing.assert_close(*terms, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("arch", ["resnet8x4", "wrn_16_1", "vgg8", "ShuffleV2", "MobileNetV2", "ResNet50"])
def test_a_bf16_teacher_is_cast_once(arch):
    """To what autocast makes of it in every step, bit for bit; the network itself stays as it was."""
    net, images = calibrate(arch, DATA), next(iter(make_loader(DATA)))[0]
    teacher, before = Teacher(arch, net, DATA.n_cls), net(images)
    build.move_teacher(teacher, CPU, make_opt("kd", flags=["--precision_t", "bf16"]))
    with torch.no_grad():
        (g, logit), (g_cast, logit_cast) = (f(images, False) for f in (forward_of(net, "bf16"), teacher.forward))
    assert same([*g, logit], [*g_cast, logit_cast]) and torch.equal(net(images), before)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_compiled_networks_are_near(net):
    images = next(iter(make_loader(DATA)))[0]
    (g, logit), (g_c, logit_c) = (forward_of(net, compiled=compiled)(images, False) for compiled in (False, True))
    near([*g, logit], [*g_c, logit_c], rtol=1e-3, atol=1e-3)


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RunError, match="--compile: needs a C"):
        build.set_up(make_opt("kd", flags=["--compile"]))


@pytest.mark.parametrize("flag", ["--no-tf32", "--tf32"])  # torch's default last
def test_tf32_is_set_and_recorded(flag):
    """And torch.compile, which reads the older of torch's two settings, can still do so."""
    opt = make_opt("kd", flags=[flag])
    build.set_up(opt)
    assert torch.backends.cudnn.allow_tf32 == opt.tf32 == (torch.backends.cudnn.conv.fp32_precision == "tf32")
    assert not torch.backends.cuda.matmul.allow_tf32  # matrix products are in float32 either way
    assert plain(opt)["tf32"] == opt.tf32


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_settled_before_the_run(native, precision, monkeypatch):
    monkeypatch.setattr(build, "has_native_bf16", lambda device: native)
    opt = make_opt("kd", flags=["--precision", "auto"])
    assert build.set_up(opt) == CPU
    assert opt.precision == precision and opt.precision_t is None
