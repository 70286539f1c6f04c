"""Whole training steps against the golden records: real steps and first stages, in float64."""

import json
from pathlib import Path

import pytest
import torch

from distiller_zoo import create_distiller, distiller_class, distiller_dict
from distiller_zoo.distillation import weights_of
from helper.loops import pretrain
from helper.options import plain
from helper.run import Run
from helper.student import Student
from models import create_model
from models.util import feature_shapes
from tests.common import as_teacher, make_source
from tests.golden import recipe
from train_student import parse

GOLDEN = torch.load(Path(__file__).parent / "golden" / "golden_losses.pt", weights_only=True)["train_step"]
EXTRAS = ("regress", "connector", "embed_s", "embed_t", "maps", "translator", "paraphraser")
# The record of crd was made with something of its memory in float32; its loss records agree to 1e-8.
RTOL = {"crd": 1e-7}


class Batches(list):
    """A loader of fixed batches."""

    def set_epoch(self, epoch, step=0):
        pass

    def plans(self):
        return iter(self)

    def batch(self, plan):
        return plan


def close(got, want, rtol):
    got, want = (torch.as_tensor(v, dtype=torch.float64) for v in (got, want))
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-11)


def batches(tag, n):
    batch = [recipe.step_batch(tag, k) for k in range(n)]
    return Batches((images.double(), target, index) for images, target, index, _ in batch), [b[3] for b in batch]


def network(name):
    return recipe.fill_module(create_model(name, 100), recipe.GAIN[name]).double()


def abs_sum(tensors):
    return sum(t.detach().abs().sum() for t in tensors)


def statistics(model, leaf):
    return abs_sum(b for name, b in model.named_buffers() if name.endswith(leaf))


def make(name, folder):
    record = GOLDEN[name]
    opt = parse(["--path_t", "x", "--distill", name, "-a", str(record["alpha"]), "--init_epochs", "2"])
    student, teacher = network(record["student"]), network(record["teacher"]).eval().requires_grad_(False)
    s_shapes, t_shapes = feature_shapes(student.float()), feature_shapes(teacher.float())
    student.double(), teacher.double()
    data = dict(s_shapes=s_shapes, t_shapes=t_shapes, s_dim=s_shapes[-1][1], t_dim=t_shapes[-1][1], n_cls=100)
    data |= dict(labels=torch.arange(2000) % 100, n_data=2000)
    options = {"nce_k": 256} if "nce_k" in distiller_dict[name].__init__.__annotations__ else {}
    method = create_distiller(name, options, **data).double()
    for key, value in method.state_dict().items():
        if key.split(".")[0] in EXTRAS:  # adapters of one module are filled by its own keys, embeds with their prefix
            inner = key if key.startswith("embed_") else key.split(".", 1)[1]
            value.copy_(recipe.fill_value(inner, value.shape))
    weights = weights_of(distiller_class(name), vars(opt))
    assert weights == {key: record[key] for key in ("gamma", "alpha", "beta")}
    run = Run(folder, record["student"], {"opt": plain(opt)})
    student = Student(name, student, method, weights, run)
    student.start(opt)
    return opt, student, as_teacher(teacher, record["teacher"], make_source(n_cls=100, n=100)), record


METHODS = [name for name in GOLDEN if name in distiller_dict]


def test_there_are_records():
    assert set(METHODS) == set(GOLDEN)


@pytest.mark.parametrize("name", METHODS)
def test_steps(name, tmp_path, monkeypatch):
    opt, student, teacher, record = make(name, tmp_path)
    student.run.open()
    if "contrast.memory_v1" in student.distiller.state_dict():
        for which in ("memory_v1", "memory_v2"):
            getattr(student.distiller.contrast, which).copy_(recipe.step_memory(which))
    if record["logged"]:
        pretrain([student], teacher, batches("init", 2)[0], opt)
        written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        close([line["init_train_loss"] for line in written], [value for _, value, _ in record["logged"]], 1e-6)
        close(abs_sum(student.model.parameters()), record["after_init"]["student_param_abs_sum"], 1e-10)
        close(statistics(student.model, "running_mean"), record["after_init"]["student_running_mean_abs_sum"], 1e-10)

    rtol = RTOL.get(name, 1e-9)
    assert sum(len(g["params"]) for g in student.optimizer.param_groups) == record["optimizer_param_tensors"]
    loader, drawn = batches("step", 3)
    for batch, contrast_idx, want in zip(loader, drawn, record["steps"], strict=True):
        if hasattr(student.distiller, "contrast"):
            monkeypatch.setattr(student.distiller.contrast, "draw", lambda index, idx=contrast_idx: idx)
        student.begin_epoch(1)
        student.update(*batch, teacher(batch[0], [student]))
        means = student.meters.read()
        terms = [want[key] for key in ("total", "cls", "div", "kd")]
        close([means[key] for key in ("loss", "cls", "div", "kd")], terms, rtol)

    close(abs_sum(student.model.parameters()), record["student_param_abs_sum"], rtol)
    close(statistics(student.model, "running_mean"), record["student_running_mean_abs_sum"], rtol)
    close(statistics(student.model, "running_var"), record["student_running_var_abs_sum"], rtol)
    close(student.model.conv1.weight.flatten()[:8], record["conv1_weight_first8"], 10 * rtol)
    close(student.model.fc.weight.flatten()[:8], record["fc_weight_first8"], 10 * rtol)
    tracked = {int(b) for key, b in student.model.named_buffers() if key.endswith("num_batches_tracked")}
    assert sorted(tracked) == record["student_num_batches_tracked"]
    own = {"vid": "maps"}
    for extra, want in record["extras_param_abs_sum"].items():
        if extra != "params":  # of icd, checked through the losses
            module = getattr(student.distiller, own.get(extra, extra))
            close(abs_sum(module.parameters()) if want else 0.0, want, rtol)
