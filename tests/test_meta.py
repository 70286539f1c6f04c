"""Every method's steps as a GPU would have to do them: nothing on two devices, nothing read, nothing made on the host.

Tensors of the meta device have no values, so that reading one raises; what else a GPU would refuse or wait for is told
by the operators that a step calls.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crd.memory import ContrastMemory
from dataset.loader import DeviceLoader
from distiller_zoo import distiller_dict
from distiller_zoo.KDSVD import say_slow
from helper import build, loops, student
from helper.student import Student, Teacher
from helper.util import RunError
from models import create_model
from tests.common import make_opt, make_source, make_student

ROOT = Path(__file__).resolve().parent.parent
META, DATA = torch.device("meta"), make_source(10, 5)
# What these return depends on values: a size, an error code. The host waits for it.
READS = {"_linalg_eigh", "_linalg_svd", "_linalg_solve_ex", "linalg_inv_ex", "linalg_cholesky_ex", "bincount", "equal"}


class Device(TorchDispatchMode):
    """Refuses what a GPU would, and lists what it would wait for: {(operator, file and function that called it)}."""

    def __init__(self):
        super().__init__()
        self.waits, self.steps = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        # a number, a tensor () of the CPU, goes with any device, but not as an index
        devices = {t.device.type for t in given if t.dim() or t.device.type != "cpu" or "index" in name}
        if len(devices) > 1 and name not in ("copy_", "_to_copy"):
            raise RuntimeError(f"{name} of tensors on {devices}")
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{name} draws from a generator of the host")
        if name == "_fused_sgd_":  # not implemented on meta
            self.steps += 1
            return None
        out = func(*args, **kwargs)
        devices |= {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        if "cpu" in devices or name in READS:
            self.waits.add((name, caller()))
        return out


class Constants(TorchFunctionMode):
    """Lists tensors made of Python's numbers, which are copied to the device: operators on meta do not show it."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        made = name in ("tensor", "new_tensor") or (name == "as_tensor" and not isinstance(args[0], torch.Tensor))
        if made or (name in ("__getitem__", "__setitem__") and isinstance(args[1], list)):
            self.waits.add((name, caller()))
        return func(*args, **(kwargs or {}))


def is_ours(file):
    return file != __file__ and Path(file).is_relative_to(ROOT) and "site-packages" not in file


def caller():
    """File and function of the project that called."""
    frame = sys._getframe(2)
    while not is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()}:{frame.f_code.co_name}"


def sgd(params, lr, opt):
    """The optimizer as it is, but for its constructor, which reads the learning rate."""
    optimizer = torch.optim.SGD(params, momentum=opt.momentum, weight_decay=opt.weight_decay)
    optimizer.param_groups[0].update(lr=torch.full((), lr, device=META), fused=True)
    optimizer._need_device_dtype_check_for_fused = False
    return optimizer


@pytest.fixture
def meta(monkeypatch):
    monkeypatch.setattr(student, "make_optimizer", sgd)
    monkeypatch.setattr(ContrastMemory, "source", lambda self: None)  # there are no generators on meta
    monkeypatch.setattr(Student, "nonfinite", lambda self: "")  # it reads the device, at the end of an epoch


def meta_student(name, out, *flags):
    opt = make_opt(name, flags=["--init_epochs", "1", *flags])
    teacher = Teacher("resnet14", create_model("resnet14", DATA.n_cls).requires_grad_(False).eval(), DATA.n_cls)
    one = make_student(name, opt, DATA, teacher, out, device=META)
    build.move_teacher(teacher, META, opt)  # last, as simkd copies the teacher's classifier
    return opt, teacher, one


def run(name, out, *flags):
    """-> what an epoch of each stage, with its short last batch, and a validation wait for."""
    opt, teacher, one = meta_student(name, out, *flags)
    loader, test_loader, _ = build.make_loaders(DATA, opt, META)
    opt.print_freq = opt.tb_freq = 100
    with Device() as mode, Constants(mode.waits):
        stages = ["init_", ""] if one.in_init else [""]
        for stage in stages:
            one.set_lr(0.1)
            loops.train(1, loader, teacher, [one], opt, stage=stage)
            if stage:
                one.run.init_epoch = opt.init_epochs
                one.start(opt)
        assert mode.steps == len(loader) * len(stages)
        with pytest.MonkeyPatch.context() as m:
            read = []
            m.setattr(torch.Tensor, "tolist", lambda self: (self.is_meta and read.append(self)) or [1.0] * len(self))
            loops.validate([one.model], test_loader)
            assert len(read) == 1
    return mode.waits


def allowed(waits):
    """The epoch's plan is drawn on the host."""
    return {(name, where) for name, where in waits if where != "dataset/loader.py:plan"}


@pytest.mark.parametrize("flag", ["--channels_last", "--no-channels_last"])
@pytest.mark.parametrize("name", distiller_dict)
def test_steps_of_a_device(name, flag, meta, tmp_path):
    waits = run(name, tmp_path, flag)
    assert {where for _, where in waits} >= {"dataset/loader.py:plan"}
    assert {operator for operator, _ in allowed(waits)} == ({"_linalg_eigh"} if name == "kdsvd" else set())


# --- what the test sees ---

ATTENTION, CRD, FSP = (distiller_dict[name] for name in ("attention", "crd", "fsp"))


def plus(term):
    """attention's loss with something added that is computed of a map of the student."""
    real = ATTENTION.forward
    return "attention", ATTENTION, "forward", lambda self, f_s, f_t: real(self, f_s, f_t) + term(f_s[0]).mean()


def instead(name, owner, attribute, fault):
    """What a run of a method calls instead; it is given what it replaces."""
    real = getattr(owner, attribute)
    return name, owner, attribute, lambda *args: fault(real, *args)


FAULTS = {
    "a number read": plus(lambda f: f * f.detach().mean().item()),
    "numbers read": plus(lambda f: f * f.detach().flatten()[:2].tolist()[0]),
    "a branch": plus(lambda f: f if f.mean() > 0 else -f),
    "a tensor of the CPU": plus(lambda f: f.mean((0, 2, 3)) + torch.ones(f.size(1))),
    "a matrix of the CPU": plus(lambda f: f.mean((2, 3)) @ torch.ones(f.size(1), 2)),
    "an index of the CPU": plus(lambda f: f[torch.arange(2)]),
    "a list as index": plus(lambda f: f[[0, 1]]),
    "a mask": plus(lambda f: f[f > 0]),
    "masked_select": plus(lambda f: f.masked_select(f > 0)),
    "nonzero": plus(lambda f: f.flatten()[(f > 0).flatten().nonzero()[:, 0]]),
    "unique": plus(lambda f: f.unique()),
    "repeat_interleave": plus(lambda f: f.repeat_interleave(f.new_ones(len(f)).long(), 0)),
    "a copy to the CPU": plus(lambda f: f.cpu()),
    "a copy from the CPU": plus(lambda f: f.mean() * torch.ones(2).to(f.device)),
    "a constant of each step": plus(lambda f: f.mean() * torch.tensor([1.0, 2.0], device=f.device)),
    "a number drawn on the CPU": plus(lambda f: f * torch.rand(()).item()),
    "a generator of the CPU": plus(lambda f: f * torch.rand(f.shape, device=f.device, generator=torch.Generator())),
    "an eigendecomposition": plus(lambda f: torch.linalg.eigh(f[0, :2, :2, 0].detach())[0]),
    "after a step": instead("crd", CRD, "after_step", lambda real, self: real(self) or int(self.last[0][0])),
    "in a first stage": instead("fsp", FSP, "init_loss", lambda real, self, s, t: s[0].sum() * float(t[0].mean())),
    "in the loader": instead("none", DeviceLoader, "batch", lambda real, self, plan: real(self, plan.cpu())),
    "before the optimizer": instead(
        "none", student, "gradients", lambda real, optimizer: [g.cpu() for g in real(optimizer)]
    ),
    "in a validation": instead("none", loops, "tally", lambda real, *args: real(*args) * args[0].max().item()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, meta, monkeypatch, tmp_path):
    name, owner, attribute, faulty = FAULTS[fault]
    monkeypatch.setattr(owner, attribute, faulty)
    try:
        waits = allowed(run(name, tmp_path))
    except (RuntimeError, NotImplementedError) as error:
        assert "meta" in str(error).lower() or "host" in str(error), error
    else:
        assert waits


# --- what depends on the GPU, or on torch ---


def test_kdsvd_says_that_old_torch_is_slow(meta, monkeypatch, tmp_path, capsys):
    for version, said in (("2.11.0+cu130", 1), ("2.12.0", 0)):
        say_slow.cache_clear()
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        run("kdsvd", tmp_path / version)
        assert capsys.readouterr().out.count("2.12") == said


@pytest.mark.parametrize(("name", "refused"), [("crd", True), ("kd", False)])
def test_another_gpu_cannot_continue_what_draws_on_it(name, refused, meta, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "device_name", lambda device: "NVIDIA A100")
    *_, one = meta_student(name, tmp_path)
    one.run.open()
    one.run.close()
    meta_student(name, tmp_path)[2].run.close()  # the same model goes on
    monkeypatch.setattr(build, "device_name", lambda device: "NVIDIA H100")
    with pytest.raises(RunError, match="gpu: NVIDIA A100 there, NVIDIA H100 here") if refused else nullcontext():
        meta_student(name, tmp_path)[2].run.close()
