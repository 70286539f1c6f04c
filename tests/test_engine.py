"""The fast step equals a plain loop; recorded steps equal those that run; other precisions stay near."""

import copy
import math
import shutil
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dataset import DataSource
from dataset.loader import DeviceLoader
from distiller_zoo import distiller_dict, kd_loss
from helper import build, cuda_graph
from helper.build import Teacher, layout_of, loaders, make_track, start, train_step
from helper.interrupt import interrupt
from helper.loops import learning_rate, train, validate
from helper.options import parse_student, parse_teacher
from helper.student import Engine, TrainStep, sgd
from helper.util import RunError
from models import create_model
from tests.test_contracts import calibrated

METHODS = [name for name in distiller_dict if name != "kdsvd"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def signals():
    """start() listens to them, for the process."""
    yield
    interrupt.forget()


def source(n=18, n_cls=5):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) % n_cls
    names = tuple(map(str, range(n_cls)))
    return DataSource(images, labels, images, labels, n_cls, (0.5,) * 3, (0.25,) * 3, names)


DATA = source()


def loader(batch_size=4, dtype=torch.float32):
    same = {"mean": DATA.mean, "std": DATA.std, "dtype": dtype}
    return DeviceLoader(DATA.train_images, DATA.train_labels, batch_size, augment=True, seed=3, **same)


@pytest.fixture(scope="module")
def teacher():
    return calibrated("resnet14", DATA, loader(18)).requires_grad_(False)


def setting(name, teacher, tmp_path, *flags):
    """-> options, a track of the method that has not begun."""
    few = ["--nce_k", "6"] if name in ("crd", "rrd") else []
    opt = parse_student(["--path_t", "x", "--distill", name, "--batch_size", "4", *few, *flags])
    track = make_track(name, "resnet8", tmp_path, opt, DATA, CPU, Teacher("resnet14", teacher))
    track.run = SimpleNamespace(scalars=lambda *_: None, close=lambda: None)
    track.distiller.freeze(track.distiller.init_modules(track.model) or [])
    track.start(opt)
    return opt, track


def state(track):
    """All that a step changes, as a flat list of tensors."""
    parts = [track.model.state_dict(), track.distiller.state_dict(), track.optimizer.state_dict()["state"]]
    return [t for t in tree_flatten([*parts, vars(track.meters)])[0] if isinstance(t, torch.Tensor)]


def near(a, b, rtol=1e-4, atol=1e-6):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


# --- the fast loop and a plain one ---


def plain_loop(track, teacher, opt, batches_of, epochs):
    """As one would write it down: contiguous images, SGD tensor by tensor, a float learning rate."""
    model, method = track.model.to(memory_format=torch.contiguous_format), track.distiller
    params = [p for p in [*model.parameters(), *method.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(
        params, opt.learning_rate, opt.momentum, weight_decay=opt.weight_decay, foreach=False, fused=False
    )
    model.train()
    method.train()
    for epoch in epochs:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(opt, epoch)
        for images, target, index in batches_of(epoch):
            images = images.contiguous()
            g_s, logit_s = model(images, is_feat=True, preact=method.preact_s)
            with torch.no_grad():
                g_t, logit_t = teacher(images, is_feat=True, preact=method.preact_t)
            known = {"index": index, "target": target, "logit_s": logit_s, "logit_t": logit_t}
            own = method(g_s[method.feats], g_t[method.feats], **{key: known[key] for key in method.needs})
            loss = track.weights["gamma"] * F.cross_entropy(logit_s, target) + track.weights["beta"] * own
            loss = loss + track.weights["alpha"] * kd_loss(logit_s, logit_t, opt.kd_T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.after_step()
    momentum = [optimizer.state[p]["momentum_buffer"] for p in params]
    return [*model.state_dict().values(), *method.state_dict().values(), *momentum]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_the_fast_loop_equals_a_plain_one(name, teacher, tmp_path):
    """In float64, where nothing but the order of additions differs and ten steps do not amplify it to be seen."""
    flags = ["--lr_decay_epochs", "1"]
    opt, track = setting(name, teacher, tmp_path, *flags)
    _, other = setting(name, teacher, tmp_path, *flags)
    net = copy.deepcopy(teacher).double()
    for each in (track, other):
        each.model.double()
        each.distiller.double()
    step, data = train_step(opt, [track], net), loader(dtype=torch.float64)
    for epoch in (1, 2):
        track.set_lr(learning_rate(opt, epoch))
        train(epoch, data, step, opt)

    def batches_of(epoch):
        data.set_epoch(epoch)
        return list(data)

    plain = plain_loop(other, net, opt, batches_of, (1, 2))
    momentum = [track.optimizer.state[p]["momentum_buffer"] for p in track.optimizer.param_groups[0]["params"]]
    fast = [*track.model.state_dict().values(), *track.distiller.state_dict().values(), *momentum]
    near(fast, plain, rtol=1e-6, atol=1e-8)


def test_a_learning_rate_that_is_filled_in_equals_a_float():
    opt = parse_teacher(["--lr_decay_epochs", "2,3"])
    ends = []
    for filled in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size)) for size in ((300,), (7, 5), ())]
        optimizer = sgd(params, opt.learning_rate, opt)
        for epoch in range(1, 6):
            lr = learning_rate(opt, epoch)
            if filled:
                optimizer.param_groups[0]["lr"].fill_(lr)
            else:
                optimizer.param_groups[0]["lr"] = lr
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn_like(p)
                optimizer.step()
        ends.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_accuracy_does_not_depend_on_the_test_batch():
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (1010, 32, 32, 3), np.uint8), rng.integers(0, 5, 1010)
    model = create_model("resnet8", 5)
    found = [
        validate(model, DeviceLoader(images, labels, size, mean=DATA.mean, std=DATA.std)) for size in (1000, 32, 1010)
    ]
    assert found[0]["acc"] == found[1]["acc"] == found[2]["acc"]
    assert found[0]["acc_top5"] == found[1]["acc_top5"] == 100
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)


# --- recorded steps ---


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: keeps the operations of a step and their tensors, and does the same again.

    As in a graph, whatever Python computed between them (numbers, branches, attributes) stays as it was when recorded.
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


def tensors(tree):
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]


class Recorder:
    """Stands for cuda_graph.CudaGraphs. A graph that is recorded has done nothing yet; a tape has run once."""

    made = []

    def __init__(self, device):
        self.generators, self.replays = [], 0
        Recorder.made.append(self)

    def beside(self):
        return nullcontext()

    def join(self):
        pass

    def record(self, run, generators):
        self.generators = generators
        with Tape() as tape:
            run()

        def replay():
            if self.replays:
                tape.replay()
            self.replays += 1

        return replay


@pytest.fixture
def recorders(monkeypatch):
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder.made


def epochs_of(step, opt, epochs):
    for epoch in epochs:
        for track in step.live:
            track.set_lr(learning_rate(opt, epoch))
        train(epoch, loader(), step, opt)


@pytest.mark.parametrize("name", METHODS)
def test_recorded_steps_equal_those_that_run(name, teacher, tmp_path, recorders):
    """Bit for bit: three to warm up, one of two images in each epoch as it is, the other nine from the recording."""
    opt, track = setting(name, teacher, tmp_path, "--lr_decay_epochs", "2")
    _, other = setting(name, teacher, tmp_path)
    epochs_of(TrainStep([track], teacher, engine=Engine(recorder=Recorder)), opt, (1, 2, 3))
    epochs_of(TrainStep([other], teacher), opt, (1, 2, 3))
    (recorder,) = recorders
    assert recorder.replays == 9
    assert len(recorder.generators) == (name == "crd")
    for a, b in zip(state(track), state(other), strict=True):
        assert torch.equal(a, b)


def test_a_step_is_recorded_again_when_a_track_ends(teacher, tmp_path, recorders):
    opt, kd = setting("kd", teacher, tmp_path)
    _, crd = setting("crd", teacher, tmp_path)
    step = TrainStep([kd, crd], teacher, engine=Engine(recorder=Recorder))
    epochs_of(step, opt, (1, 2))
    step.live = [crd]
    before = copy.deepcopy(state(kd))
    epochs_of(step, opt, (3, 4))
    assert [r.replays for r in recorders] == [5, 5]
    assert all(torch.equal(a, b) for a, b in zip(state(kd), before, strict=True))
    _, alone = setting("crd", teacher, tmp_path)
    epochs_of(TrainStep([alone], teacher), opt, (1, 2, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(state(crd), state(alone), strict=True))


def test_what_cannot_be_recorded_is_run(teacher, tmp_path, recorders, capsys, monkeypatch):
    opt, track = setting("kdsvd", teacher, tmp_path)
    epochs_of(TrainStep([track], teacher, engine=Engine(recorder=Recorder)), opt, (1,))
    assert recorders[0].replays == 0 and track.meters.steps == 5
    assert "not recorded as a graph: KDSVD" in capsys.readouterr().out

    def waits(self, f_s, f_t):
        return (f_s[0] * float(f_t[0].mean())).mean()

    monkeypatch.setattr(distiller_dict["attention"], "forward", waits)
    opt, track = setting("attention", teacher, tmp_path)
    epochs_of(TrainStep([track], teacher, engine=Engine(recorder=Recorder)), opt, (1, 2))
    said = capsys.readouterr().out
    assert said.count("not recorded as a graph") == 1 and "waits for the device" in said
    assert recorders[1].replays == 0 and track.meters.steps == 5


def on_cuda(names, teacher, tmp_path, *flags):
    """-> the tracks' states; one fewer trains in the last epoch."""
    few = ["--nce_k", "6"] if {"crd", "rrd"} & set(names) else []
    opt = parse_student(["--path_t", "x", "--distill", *names, "--batch_size", "4", *few, *flags])
    device, net = torch.device("cuda"), copy.deepcopy(teacher).cuda()
    tracks = [make_track(name, "resnet8", tmp_path, opt, DATA, device, Teacher("resnet14", net)) for name in names]
    for track in tracks:
        track.run = SimpleNamespace(scalars=lambda *_: None, close=lambda: None)
        track.start(opt)
    step, (data, _) = train_step(opt, tracks, net), loaders(DATA, opt, device)
    for live, epochs in ((tracks, (1, 2)), (tracks[1:] or tracks, (3,))):
        step.live = live
        for epoch in epochs:
            train(epoch, data, step, opt)
        assert not opt.graph or (step.recorded.replay and not step.recorded.trouble)
    return [t.cpu() for track in tracks for t in state(track)]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("name", METHODS)
def test_cuda_graphs_equal_eager_steps(name, teacher, tmp_path):
    ends = [on_cuda([name], teacher, tmp_path, flag) for flag in ("--graph", "--no-graph")]
    near(*ends, rtol=1e-3, atol=1e-4)


# --- students on streams of their own ---


class Streams(TorchDispatchMode):
    """Watches on a CPU, whose operations never overlap, whether those on different streams wait for each other.

    A stream knows how far each one was when it last waited for it (its clock). What touches a tensor must know of
    whoever wrote it; who writes, of whoever read it; and so must the stream whose memory it was when it is freed.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.clocks = defaultdict(Counter)  # stream -> stream -> operations
        self.seen, self.faults = {}, []  # storage -> (weakly itself, stream, {stream: last read}, {stream: last write})
        self.now = self.main = self.stream(None)
        monkeypatch.setattr(cuda_graph.torch.cuda, "Stream", self.stream)
        monkeypatch.setattr(cuda_graph.torch.cuda, "stream", self.on)
        monkeypatch.setattr(cuda_graph.torch.cuda, "current_stream", lambda device: self.now)

    def stream(self, device):
        stream = SimpleNamespace()
        stream.id = id(stream)
        stream.wait_stream = lambda other: self.wait(stream, other)
        return stream

    def wait(self, stream, other):
        self.freed()
        self.clocks[stream.id] |= self.clocks[other.id]

    @contextmanager
    def on(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def knows(self, stream, times):
        return all(self.clocks[stream][other] >= time for other, time in times.items())

    def freed(self):
        for key, (weak, owner, *times) in list(self.seen.items()):
            if weak.expired():
                del self.seen[key]
                if not all(self.knows(owner, of) for of in times):
                    self.faults.append("freed while in use")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.freed()
        out = func(*args, **(kwargs or {}))
        me, schema = self.now.id, func._schema.arguments
        self.clocks[me][me] += 1
        given = dict(zip((s.name for s in schema), args, strict=False)) | (kwargs or {})
        written = [given.get(s.name) for s in schema if s.alias_info and s.alias_info.is_write]
        written = {storage_of(t) for t in tensors(written)}
        for t in tensors([args, kwargs or {}, out]):
            key = storage_of(t)
            if key not in self.seen:
                self.seen[key] = StorageWeakRef(t.untyped_storage()), me, {}, {}
                written.add(key)
            _, _, reads, writes = self.seen[key]
            if not self.knows(me, writes) or (key in written and not self.knows(me, reads)):
                self.faults.append(f"{func}: not waited for")
            (writes if key in written else reads)[me] = self.clocks[me][me]
        return out


def storage_of(t):
    return t.untyped_storage()._cdata


def on_streams(teacher, tmp_path, device, each):
    """Steps of four students, of which some end and join; -> the students."""
    names = ["kd", "hint", "crd", "rrd"]
    tracks = [setting(name, teacher, tmp_path)[1] for name in names]
    step = TrainStep(tracks, teacher, engine=Engine(each=each))
    with device:
        for step.running in (tracks, tracks[2:], tracks[:1], tracks):
            for batch in islice(loader(), 2):
                step(*batch)
            for track in tracks:
                track.meters.read()
    return tracks


def test_streams_wait_for_what_they_use(teacher, tmp_path, monkeypatch):
    watch = Streams(monkeypatch)
    tracks = on_streams(teacher, tmp_path, watch, cuda_graph.CudaStreams(CPU))
    assert not watch.faults
    assert len(watch.clocks) == 1 + len(tracks)  # each keeps its own
    others = on_streams(teacher, tmp_path, nullcontext(), cuda_graph.in_turn)
    for track, other in zip(tracks, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state(track), state(other), strict=True))


@pytest.mark.parametrize("missing", ["fork", "join"])
def test_a_stream_that_does_not_wait_is_seen(missing, teacher, tmp_path, monkeypatch):
    watch = Streams(monkeypatch)
    wait, skipped = watch.wait, {"fork": 1, "join": 0}[missing]
    monkeypatch.setattr(watch, "wait", lambda *pair: pair[skipped] is watch.main or wait(*pair))
    on_streams(teacher, tmp_path, watch, cuda_graph.CudaStreams(CPU))
    assert any("not waited for" in fault for fault in watch.faults)


@pytest.mark.parametrize("held", [True, False])
def test_memory_that_is_freed_before_the_join_is_seen(held, monkeypatch):
    """What TrainStep must not do with the batch and the teacher's features."""
    watch, kept = Streams(monkeypatch), []
    tracks = [SimpleNamespace(name=name) for name in "ab"]
    with watch:
        given = {"a": torch.ones(3), "b": torch.ones(3)}
        kept += given.values() if held else ()
        cuda_graph.CudaStreams(CPU)(tracks, lambda track: given.pop(track.name).add(1))
    assert watch.faults == ([] if held else ["freed while in use"] * 2)


def test_a_track_keeps_its_stream(monkeypatch):
    """What it made in one step and frees in the next is written to by none beside it."""
    watch, each, made = Streams(monkeypatch), cuda_graph.CudaStreams(CPU), {}

    def update(track):
        made[track.name] = made.pop(track.name, torch.ones(3)).add(1)

    with watch:
        for names in ("ab", "ba"):
            each([SimpleNamespace(name=name) for name in names], update)
    assert not watch.faults and made["a"].tolist() == [3, 3, 3]


def test_steps_on_streams_are_recorded(teacher, tmp_path, recorders, monkeypatch):
    Streams(monkeypatch)
    ends = []
    for engine in (Engine(recorder=Recorder, each=cuda_graph.CudaStreams(CPU)), Engine()):
        (opt, kd), (_, crd) = (setting(name, teacher, tmp_path) for name in ("kd", "crd"))
        epochs_of(TrainStep([kd, crd], teacher, engine=engine), opt, (1, 2))
        ends.append([*state(kd), *state(crd)])
    assert recorders[0].replays == 5 and all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_streams_are_of_a_gpu(teacher, tmp_path):
    opt, track = setting("kd", teacher, tmp_path, "--streams")
    assert train_step(opt, [track], teacher).engine.each is cuda_graph.in_turn


@on_gpu
@pytest.mark.parametrize("flag", ["--graph", "--no-graph"])
def test_cuda_streams_equal_one(flag, teacher, tmp_path):
    names = ["kd", "hint", "attention", "crd", "rrd", "icd"]
    near(*(on_cuda(names, teacher, tmp_path, flag, *more) for more in (["--streams"], [])), rtol=1e-3, atol=1e-4)


# --- layout ---


@pytest.mark.parametrize("name", METHODS)
def test_a_layout_changes_nothing_but_rounding(name, teacher, tmp_path):
    losses, less = [], ["-b", "300"] if name == "pkt" else []  # its weight of 30,000 is one of the rounding, too
    for flag in ("--channels_last", "--no-channels_last"):
        opt, track = setting(name, teacher, tmp_path, flag, "--learning_rate", "0.001", *less)
        layout = {"--channels_last": torch.channels_last, "--no-channels_last": torch.contiguous_format}[flag]
        net = Teacher("resnet14", copy.deepcopy(teacher), DATA.n_cls)
        net.fit_for(DATA, CPU, layout_of(opt))
        data, test = loaders(DATA, opt, CPU)
        step = train_step(opt, [track], net.model)
        params = [*track.model.parameters(), *net.model.parameters()]
        weights = [p for p in params if p.dim() == 4 and p.size(2) > 1]
        for images, target, index in islice(data, 3):
            step(images, target, index)
            maps = step.know(images).get(False, ([],))[0][:-1] + track.network(images, False)[0][:-1]
            for x in (images, next(iter(test))[0], *maps, *weights):
                assert x.is_contiguous(memory_format=layout)
                assert min(x.shape[1:]) == 1 or x.is_contiguous() != x.is_contiguous(memory_format=torch.channels_last)
            losses.append(track.meters.read()["loss"])
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-5, atol=0)


# --- precision ---


@pytest.mark.parametrize(
    ("flags", "exact"), [([], True), (["--precision", "bf16"], False), (["--precision_t", "bf16"], False)]
)
@pytest.mark.parametrize("name", ["kd", "hint", "crd"])
def test_bf16_is_near_and_leaves_float32(name, flags, exact, teacher, tmp_path):
    opt, track = setting(name, teacher, tmp_path, *flags)
    _, other = setting(name, teacher, tmp_path)
    batch = next(iter(loader()))
    terms = []
    for t, o in ((track, opt), (other, parse_student(["--path_t", "x"]))):
        step = train_step(o, [t], teacher)
        step(*batch)
        terms.append(t.meters.sums[:4] / 4)
    assert torch.equal(*terms) == exact
    torch.testing.assert_close(*terms, rtol=0.05, atol=0.05)
    assert all(t.dtype in (torch.float32, torch.float64, torch.int64, torch.uint8) for t in state(track))
    assert all(math.isfinite(float(t.double().sum())) for t in state(track))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_compiled_networks_are_near(teacher, tmp_path):
    opt, track = setting("hint", teacher, tmp_path, "--compile")
    _, other = setting("hint", teacher, tmp_path)
    for t, o in ((track, opt), (other, parse_student(["--path_t", "x"]))):
        epochs_of(train_step(o, [t], teacher), o, (1,))
    assert track.meters.steps == 5
    torch.testing.assert_close(track.meters.sums[:4], other.meters.sums[:4], rtol=1e-2, atol=1e-2)


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RunError, match="--compile: needs a C"):
        start(parse_student(["--path_t", "x", "--compile", "--device", "cpu"]))


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_settled_before_the_run(native, precision, monkeypatch):
    monkeypatch.setattr(build, "native_bf16", lambda device: native)
    opt = parse_student(["--path_t", "x", "--precision", "auto", "--device", "cpu"])
    assert start(opt) == CPU
    assert opt.precision == precision and opt.precision_t is None


def test_the_last_shape_is_not_taken_for_the_batch(recorders):
    """An epoch that is entered at its short last batch: recorded are those of --batch_size."""
    seen = []
    step = cuda_graph.RecordedStep(lambda plan: seen.append(plan.shape[1]), 4, [], Recorder(CPU))
    for width in (2, 4, 4, 4, 4, 4, 2):
        step(torch.zeros(1, width, dtype=torch.int64))
    assert recorders[0].replays == 2 and seen == [2, 4, 4, 4, 4, 2]
