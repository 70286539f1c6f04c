"""Several processes train as one: every method, signals, a process that dies.

Called as a script, this file is what torchrun starts; in plain Python the same is the reference.
"""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dataset import load_dataset
from dataset.loader import DeviceLoader
from distiller_zoo import distiller_dict
from helper.build import make_loaders
from helper.checkpoint import load_network
from helper.interrupt import Interrupted, interrupt
from helper.loops import train, validate
from helper.ranks import Ranks, ranks, sync_batch_norm
from helper.run import opened
from helper.util import cli_errors
from models import create_model
from models.util import ModelError
from tests.common import as_teacher, calibrate, make_opt, make_source, make_student
from tests.test_resume import results, same

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
METHODS = [*distiller_dict, "crd+hint"]
ACROSS = [name for name, method in distiller_dict.items() if method.across_batch]
DATA = make_source(21, 5, 16)  # batches of 16 and 5: shares of 8 and 8, 3 and 2


# --- what the processes do ---


class DoubleLoader(DeviceLoader):
    def batch(self, plan):
        images, target, index = super().batch(plan)
        return images.double(), target, index


def make_loader(images, labels, batch_size, **more):
    same = {"mean": DATA.mean, "std": DATA.std, "share": (ranks.rank, ranks.world)}
    return DoubleLoader(images, labels, batch_size, **same, **more)


def state(student):
    """All that a step changes, by name."""
    parts = {"model": student.model.state_dict(), "method": student.distiller.state_dict(), "m": vars(student.meters)}
    params = student.optimizer.param_groups[0]["params"]
    parts["momentum"] = {i: student.optimizer.state[p]["momentum_buffer"] for i, p in enumerate(params)}
    return {f"{part}.{key}": value.clone() for part, values in parts.items() for key, value in values.items()}


def build_student(name, teacher, out, flags=("--sync_bn",)):
    few = ["--nce_k", "6"] if "crd" in name else []
    opt = make_opt(name, flags=["--batch_size", "16", *flags, *few])
    return opt, make_student(name, opt, DATA, teacher, out)


def train_method(name, teacher, loader, out):
    """A first stage, an epoch, and one that a signal to the last process interrupts after its first step."""
    opt, student = build_student(name, teacher, out)
    with opened([student.run]):
        if student.in_init:
            train(1, loader, teacher, [student], opt, stage="init_")
            student.run.init_epoch = opt.init_epochs
            student.start(opt)
        train(1, loader, teacher, [student], opt)
        interrupt.signal = "SIGTERM" if ranks.rank == ranks.world - 1 else ""
        with pytest.raises(Interrupted):
            train(2, loader, teacher, [student], opt)
        interrupt.signal = ""
    _, student = build_student(name, teacher, out)  # restored from what the first process has written
    assert student.run.step == 1
    train(2, loader, teacher, [student], opt)
    student.run.close()
    return state(student)


def train_once(name, teacher, loader, out):
    opt, student = build_student(name, teacher, out)
    train(1, loader, teacher, [student], opt)
    return state(student)


def close_one(teacher, loader, out):
    """A student whose loss is NaN in the last process alone -> names of those that go on, and that one's reason."""
    opt, kd = build_student("kd", teacher, out)
    _, other = build_student("none", teacher, out)
    if ranks.rank == ranks.world - 1:
        kd.loss = lambda *batch: (math.nan * kd.main_loss(*batch)[0], None)
    left = train(1, loader, teacher, [kd, other], opt)
    return [student.name for student in left], kd.run.failed, state(other)


def main():
    out, net = Path(sys.argv[1]), calibrate("resnet14", DATA).double()
    torch.set_default_dtype(torch.float64)  # so that nothing but the order of additions differs
    ranks.start(torch.device("cpu"))
    teacher, found = as_teacher(net, "resnet14", DATA), {}
    loader = make_loader(DATA.train_images, DATA.train_labels, 16, augment="crop", seed=3)
    for name in METHODS:
        found[name] = train_method(name, teacher, loader, out)
    for name in [*ACROSS, "none"]:
        found[f"once {name}"] = train_once(name, teacher, loader, out / "once")
    torch.manual_seed(0)
    net = create_model("resnet8", 5)
    found["validate"] = validate([net], make_loader(DATA.test_images[:7], DATA.test_labels[:7], 3))[0]  # 3, 3 and 1
    if ranks.world > 1:
        opt, factor = build_student("factor", teacher, out / "factor", flags=())
        train(1, loader, teacher, [factor], opt, stage="init_")
        found["frozen"] = factor.distiller.state_dict()
        found["closed"] = close_one(teacher, loader, out / "closed")
        for name in ACROSS:
            distiller_dict[name].across_batch = False
            found[f"local {name}"] = train_once(name, teacher, loader, out / "local")
        Ranks.weight = 1 / ranks.world
        found["unweighted"] = train_once("none", teacher, loader, out / "unweighted")
    torch.save(found, out / f"rank{ranks.rank}.pt")


# --- the tests ---


@pytest.mark.parametrize("name", ["timm:test_efficientnet", "torchvision:mobilenet_v3_small"])
def test_sync_bn_leaves_foreign_networks_what_they_are(name):
    """Their hooks, and the activation that is a part of timm's batch norm."""
    torch.manual_seed(0)
    net, images, found = create_model(name, 5), torch.randn(4, 3, 32, 32), []
    for each in (copy.deepcopy(net), net):
        if each is net:
            sync_batch_norm(net, torch.device("cpu"))
        torch.manual_seed(1)  # of dropout
        found.append([each.train()(images, is_feat=True), each.eval()(images, is_feat=True), each.state_dict()])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_sync_bn_refuses_what_it_does_not_know():
    with pytest.raises(ModelError, match="Whitening"):
        sync_batch_norm(torch.nn.Sequential(type("Whitening", (torch.nn.BatchNorm2d,), {})(3)), torch.device("cpu"))


def test_every_process_has_test_images(monkeypatch):
    """Also of a size of which one validates few at a time."""
    data, counts = make_source(40, 5, 400), []
    for rank in range(4):
        monkeypatch.setattr(ranks, "rank", rank)
        monkeypatch.setattr(ranks, "world", 4)
        _, test_loader, _ = make_loaders(data, make_opt("none", flags=["--batch_size", "16"]), torch.device("cpu"))
        counts.append(sum(len(target) for _, target, _ in test_loader))
    assert min(counts) > 0 and sum(counts) == 18


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """-> what two processes found, the same of the second, and what one did."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    plain = subprocess.Popen([sys.executable, __file__, one], env=env)
    subprocess.run([*TORCHRUN, __file__, two], env=env, check=True)
    assert plain.wait() == 0
    return [torch.load(path, weights_only=True) for path in (two / "rank0.pt", two / "rank1.pt", one / "rank0.pt")]


def off(a, b):
    """The largest difference, in units of each tensor's largest entry where that is above 1."""
    assert a.keys() == b.keys()
    pairs = [(a[key].double(), b[key].double()) for key in a]
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1)) for x, y in pairs if x.numel())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(name, found):
    """Weights, banks, momentum, meters; a first stage, short batches and a resumed epoch are in it."""
    first, second, one = (each[name] for each in found)
    assert same(first, second)
    assert off(first, one) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ACROSS)
def test_methods_across_the_batch_need_all_of_it(name, found):
    assert off(found[0][f"once {name}"], found[2][f"once {name}"]) < 1e-9
    assert off(found[0][f"local {name}"], found[2][f"once {name}"]) > 1e-5


@pytest.mark.slow
def test_uneven_shares_are_weighted(found):
    assert off(found[0]["unweighted"], found[2]["once none"]) > 1e-5


@pytest.mark.slow
def test_what_a_first_stage_leaves_is_the_same_everywhere(found):
    """Batch statistics that each process takes of its own share: frozen modules go on with the first one's."""
    assert same(found[0]["frozen"], found[1]["frozen"])


@pytest.mark.slow
def test_each_test_image_counts_once(found):
    first, second, one = (each["validate"] for each in found)
    assert first == second and first.keys() == one.keys()
    assert all(first[key] == pytest.approx(value, rel=1e-12) for key, value in one.items())


@pytest.mark.slow
def test_all_close_the_student_that_one_finds_not_finite(found):
    (left, reason, _), (left_2, reason_2, _) = first, second = [each["closed"] for each in found[:2]]
    assert left == left_2 == ["none"] and reason == reason_2 and "epoch 1, step 1" in reason
    assert same(first[2], second[2]) and off(first[2], found[2]["once none"]) < 1e-9


@pytest.fixture(scope="module")
def command(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    same = ["--dataset", "folder", "--data_folder", image_folder, "--image_size", "16", "--device", "cpu"]
    teacher = ["--model", "resnet8", "--epochs", "1", "--batch_size", "18", "--output", out]
    subprocess.run([*TORCHRUN, ROOT / "train_teacher.py", *same, *teacher], check=True)
    path_t = next(out.rglob("resnet8_last.pth"))
    student = ["--distill", "none", "abound", "crd", "--path_t", path_t, "--nce_k", "9", "--epochs", "9"]
    flags = ["--init_epochs", "1", "--lr_decay_epochs", "5", "--batch_size", "18"]
    return [*TORCHRUN, ROOT / "train_student.py", *same, *student, *flags, "--output"]


def pid_of(torchrun, rank):
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


@pytest.mark.slow
def test_an_interrupted_run_ends_as_a_whole_one(command, image_folder, tmp_path):
    """SIGTERM to torchrun, then to one process: all save and end. SIGKILL: all end, and torchrun starts them again."""
    subprocess.run([*command, tmp_path / "whole"], check=True)
    restart = [*TORCHRUN, "--max-restarts", "1", *command[len(TORCHRUN) :]]
    for start, number, rank, lines in (
        (command, signal.SIGTERM, None, 1),
        (command, signal.SIGTERM, 1, 3),
        (restart, signal.SIGKILL, 1, 5),
    ):
        process = subprocess.Popen([*start, tmp_path / "cut"], stderr=subprocess.PIPE, text=True)
        written = 0
        while process.poll() is None and written <= lines:
            written = sum(path.read_text().count("\n") for path in tmp_path.glob("cut/*/*_crd_*/metrics.jsonl"))
            time.sleep(0.005)
        os.kill(process.pid if rank is None else pid_of(process.pid, rank), number)
        _, err = process.communicate(timeout=100)
        assert err.count("train_student.py: ") == 1 and "the same command continues the run" in err
        assert (process.returncode == 0) == (start is restart)
        assert ("exitcode  : 75" in err) == (rank == 1 and number == signal.SIGTERM)
    whole, cut = results(tmp_path / "whole"), results(tmp_path / "cut")
    assert set(whole) == {"none", "abound", "crd"}
    for name, (lines, state) in whole.items():
        assert cut[name][0] == lines and same(cut[name][1], state), name
    configs = [json.loads(path.read_text()) for path in (tmp_path / "cut").rglob("config.json")]
    assert {part["world_size"] for config in configs for part in config["parts"]} == {2}
    assert {len(config["parts"]) for config in configs} == {4}

    # all validated with the batch statistics that were saved, those of the first process
    data = load_dataset("folder", image_folder, 16)
    test_loader = DeviceLoader(data.test_images, data.test_labels, 12, mean=data.mean, std=data.std)
    net = load_network(next((tmp_path / "whole").rglob("*_crd_*/resnet8_last.pth")))[2]
    last = whole["crd"][0][-1]
    (now,) = validate([net], test_loader)
    for key in ("acc", "acc_top5", "loss", "macro_f1"):
        assert now[key] == pytest.approx(last[f"test_{key}"])

    # one process has other batches to take the statistics of
    plain = [sys.executable, *command[len(TORCHRUN) :], tmp_path / "cut"]
    done = subprocess.run(plain, capture_output=True, text=True)
    assert done.returncode == 2 and "batch_norm_shares: 2 there, 1 here" in done.stderr


@pytest.mark.slow
def test_streamed_shares_are_those_of_a_set_in_memory(command, tmp_path):
    path_t = command[command.index("--path_t") + 1]
    flags = ["--model", "resnet8", "--epochs", "1", "--num_workers", "1", "--stream", "--output", tmp_path]
    data = command[command.index("--dataset") : command.index("--distill")]
    subprocess.run([*TORCHRUN, ROOT / "train_teacher.py", *data, *flags, "--batch_size", "18"], check=True)
    (streamed,) = tmp_path.rglob("resnet8_last.pth")
    assert same(*(torch.load(path, weights_only=True)["model"] for path in (path_t, streamed)))


@pytest.mark.slow
def test_what_all_refuse_is_said_once(command, tmp_path):
    done = subprocess.run([*command, tmp_path, "--batch_size", "16"], capture_output=True, text=True)
    assert done.returncode and done.stderr.count("train_student.py: ") == 1 and "--batch_size 16: " in done.stderr
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    sys.exit(cli_errors(main))
