"""Time and memory of the losses that are computed in another form than the reference's, beside that form.

    python scripts/benchmark.py --losses                      all of nst, fsp, crd, kdsvd, and CRD's draw
    python scripts/benchmark.py --losses nst --pairs vgg13:vgg8 --batch_size 32

Forward and backward, at the shapes of the pairs' features for 32x32 images. Both sides run in this process, by turns,
each with the features in the layout of its own training (channels_last here, contiguous there). A loss or gradients
that differ end the run. Prints a table, and writes it into the output folder (losses.md, losses.json).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from crd.memory import ContrastMemory
from distiller_zoo import Distiller, create_distiller
from distiller_zoo.base import Shapes, pool_to_smaller
from helper import checkpoint
from helper.options import Parser, number
from helper.setup import device_name
from helper.util import RunError, choose_device, code_version, one_sentence, versions
from models import create_model, model_dict
from models.util import feature_shapes, known_first

N_DATA, N_CLS = 50_000, 100  # CIFAR-100's training set
TOLERANCE = 1e-4  # in float32, relative to the largest entry
LEAST_MS = 50  # a shorter run is repeated within its round
KEPT = 2**31 - 1  # bytes of the largest buffer that --keep_buffers keeps

Side = Callable[[], list[Tensor]]  # one run: loss and gradients, or the samples drawn


def nst_broadcast(method: Distiller, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
    """The product of every two channels at every position: (B, C_b, C_a, H * W)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] * b[:, :, None]).sum(3).square().mean()

    pooled = (pool_to_smaller(*maps) for maps in zip(g_s, g_t, strict=True))
    unit = ([F.normalize(f.flatten(2), dim=2) for f in maps] for maps in pooled)
    return sum(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t) for s, t in unit)


def fsp_broadcast(method: Distiller, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
    """The product of every two channels of consecutive maps at every position: (B, C_top, C_bottom, H * W)."""

    def flow(maps: tuple[Tensor, Tensor]) -> Tensor:
        top, bottom = (f.flatten(2) for f in pool_to_smaller(*maps))
        return (top[:, :, None] * bottom[:, None]).mean(3)

    return sum(F.mse_loss(flow(s), flow(t)) for s, t in zip(pairwise(g_s), pairwise(g_t), strict=True))


def crd_gather(method: Distiller, f_s: Tensor, f_t: Tensor, index: Tensor) -> Tensor:
    """The drawn rows of each bank: (B, 1 + K, feat_dim). In float32 this form's logarithms lose 5e-5 of the loss."""
    bank, idx = method.contrast, method.contrast.draw(index)
    noise = bank.K / bank.n_data

    def term(v: Tensor, rows: Tensor, Z: Tensor) -> Tensor:
        drawn = rows[idx.flatten()].unflatten(0, idx.shape)
        p = torch.exp(torch.bmm(drawn, v[:, :, None]).squeeze(2) / bank.T) / Z
        log_true = torch.log(p[:, 0] / (p[:, 0] + noise + 1e-7))
        log_noise = torch.log(noise / (p[:, 1:] + noise + 1e-7))
        return -(log_true.sum() + log_noise.sum()) / len(v)

    v_s, v_t = method.embed_s(f_s), method.embed_t(f_t)
    return term(v_s, bank.memory_v2, bank.Z_v1) + term(v_t, bank.memory_v1, bank.Z_v2)


def kdsvd_full(method: Distiller, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
    """All singular vectors of each sample's (H * W, C) matrix, of which one or four are used.

    The loss depends on the sign that the library returns them with: here, as in ours, the teacher's sum is positive.
    """

    def right_vectors(f: Tensor, k: int) -> Tensor:  # (B, k, C)
        return F.normalize(torch.linalg.svd(f.flatten(2).transpose(1, 2), full_matrices=False).Vh[:, :k], dim=2)

    def nearest(v: Tensor, v_t: Tensor) -> Tensor:  # (B, k, C), (B, C) -> (B, C)
        cos = (v * v_t[:, None]).sum(2).detach()
        chosen = torch.arange(len(v), device=v.device), cos.abs().argmax(1)
        return v[chosen] * cos[chosen].sign()[:, None]

    def relation(maps: tuple[Tensor, Tensor]) -> Tensor:
        return torch.exp(-(maps[1][:, :, None] - maps[0][:, None]).square() / 8)

    v_t = [right_vectors(f, 1)[:, 0] for f in g_t]
    v_t = [v * v.sum(1, keepdim=True).sign() for v in v_t]
    v_s = [nearest(right_vectors(f, 4), v) for f, v in zip(g_s, v_t, strict=True)]
    pairs = zip(pairwise(v_s), pairwise(v_t), strict=True)
    return sum((relation(s) - relation(t)).square().sum() / len(s[0]) for s, t in pairs)


FORMS = {"nst": nst_broadcast, "fsp": fsp_broadcast, "crd": crd_gather, "kdsvd": kdsvd_full}


def draw_on_host(bank: ContrastMemory, index: Tensor) -> Side:
    """A permutation of the samples of other classes for each sample, as a loader's worker does it."""
    labels, rng = bank.labels.cpu().numpy(), np.random.default_rng(0)
    others = [np.flatnonzero(labels != c) for c in range(N_CLS)]

    def draw() -> list[Tensor]:
        rows = [np.append(i, rng.permutation(others[labels[i]])[: bank.K]) for i in index.tolist()]
        return [torch.from_numpy(np.stack(rows)).to(index.device)]

    return draw


def draw_by_topk(bank: ContrastMemory, index: Tensor) -> Side:
    """The samples with the K smallest of as many random keys as there are samples, the own class's out of reach."""

    def draw() -> list[Tensor]:
        key = torch.rand(len(index), bank.n_data, device=index.device)
        key.masked_fill_(bank.labels == bank.labels[index, None], 2.0)
        negative = key.topk(bank.K, dim=1, largest=False, sorted=False).indices
        return [torch.cat([index[:, None], negative], dim=1)]

    return draw


DRAWS = {"permutations on the host": draw_on_host, "rand and topk": draw_by_topk}


def cases(opt: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, str, Side, Side]]:
    """-> what is computed, on or against what, our side, the other."""
    for name in opt.losses:
        for pair in opt.pairs:
            yield name, ":".join(pair), *loss_sides(name, pair, opt.batch_size, device)
    if "crd" in opt.losses:
        labels, index = torch.arange(N_DATA) % N_CLS, torch.arange(opt.batch_size, device=device)
        bank = create_distiller("crd", s_dim=1, t_dim=1, labels=labels).to(device).contrast
        for against, form in DRAWS.items():
            yield "crd's draw", f"against {against}", lambda: [bank.draw(index)], form(bank, index)


def loss_sides(name: str, pair: tuple[str, str], batch_size: int, device: torch.device) -> tuple[Side, Side]:
    """Loss and gradients of a method, ours and the other form, on equal features."""
    t_shapes, s_shapes = (feature_shapes(create_model(arch, N_CLS)) for arch in pair)
    data = {"s_shapes": s_shapes, "t_shapes": t_shapes, "s_dim": s_shapes[-1][1], "t_dim": t_shapes[-1][1]}
    torch.manual_seed(0)
    method = create_distiller(name, labels=torch.arange(N_DATA) % N_CLS, **data).to(device)
    ours = method.init_loss if name == "fsp" else method  # FSP compares maps in its first stage
    given = ()
    if name == "crd":
        given = (torch.arange(batch_size, device=device),)
        drawn = method.contrast.draw(*given)
        method.contrast.draw = lambda index: drawn  # the same for both sides; rows of its own measure it

    def side(loss_of: Callable[..., Tensor], layout: torch.memory_format) -> Side:
        g_s, g_t = (features(f, seed, batch_size, layout, device) for seed, f in enumerate((s_shapes, t_shapes)))
        f_s, f_t = g_s[method.feats], g_t[method.feats]
        leaves = [f.requires_grad_() for f in ([f_s] if isinstance(f_s, Tensor) else f_s)]

        def run() -> list[Tensor]:
            loss = loss_of(f_s, f_t, *given)
            return [loss.detach(), *torch.autograd.grad(loss, [*leaves, *method.parameters()])]

        return run

    return side(ours, torch.channels_last), side(partial(FORMS[name], method), torch.contiguous_format)


def features(
    shapes: Shapes, seed: int, batch_size: int, layout: torch.memory_format, device: torch.device
) -> list[Tensor]:
    """Random, as after a ReLU, with channels of unequal strength: of others, singular vectors hardly differ."""
    noise = torch.Generator().manual_seed(seed)
    feats = []
    for _, *dims in shapes:
        level = torch.randn(dims[0], *[1] * (len(dims) - 1), generator=noise)
        f = F.relu(torch.randn(batch_size, *dims, generator=noise) + level).to(device)
        feats.append(f.contiguous(memory_format=layout) if f.dim() == 4 else f)
    return feats


def measure(what: str, on: str, sides: tuple[Side, Side], rounds: int, device: torch.device) -> dict:
    """A row of the table, with every number behind it."""
    apart = compare(f"{what} {on}", *(side() for side in sides))  # ours first: it sets CRD's normalising constants
    memory = [extra_memory(side, device) for side in sides]
    ms = in_turn(sides, rounds, device)
    ratios = [other / ours for ours, other in zip(*ms, strict=True)]
    ratio = statistics.median(ms[1]) / statistics.median(ms[0])
    values = {"ms": ms, "bytes": memory, "ratio": ratio, "ratios": ratios, "differences": apart}
    return {"what": what, "on": on, **values}


def compare(what: str, ours: list[Tensor], other: list[Tensor]) -> tuple[float, float] | None:
    """Differences of the loss and of the gradients, relative to the largest entry; random draws have none."""
    if len(ours) == 1:
        return None
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, other, strict=True)]
    if not all(value <= TOLERANCE for value in apart):  # nan too
        found = f"loss {apart[0]:.1e}, gradients {max(apart[1:]):.1e}"
        raise RunError(f"{what}: the two forms disagree by {found} (relative; {TOLERANCE:g} is allowed)")
    return apart[0], max(apart[1:])


def extra_memory(side: Side, device: torch.device) -> int | None:
    """Bytes beyond those held before, at the highest point of a run; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        side()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed buffers that the process has kept would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # the highest point is from now on
    except (OSError, AttributeError, TypeError):
        return None
    before = resident("VmRSS")
    side()
    return max(0, resident("VmHWM") - before)


def resident(key: str) -> int:
    """Bytes of this process in memory: now (VmRSS), at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def in_turn(sides: tuple[Side, Side], rounds: int, device: torch.device) -> list[list[float]]:
    """Milliseconds of each round, of both sides; what began one round ends the next."""
    repeats = [max(1, round(LEAST_MS / timed(side, 1, device))) for side in sides]
    ms = [[], []]
    for i in range(rounds):
        for which in (i % 2, 1 - i % 2):
            ms[which].append(timed(sides[which], repeats[which], device))
    return ms


def timed(side: Side, repeats: int, device: torch.device) -> float:
    """Milliseconds of one run, the mean of some."""
    start = clock(device)
    for _ in range(repeats):
        side()
    return (clock(device) - start) * 1000 / repeats


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(about: dict, rows: list[dict]) -> str:
    """Markdown, below what the numbers depend on."""
    columns = ("loss", "on", "ours, ms", "other form, ms", "times", "ours, MB", "other form, MB", "differences")
    lines = [columns, ["---"] * 2 + ["---:"] * (len(columns) - 2), *map(cells, rows)]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"`{about['command']}`, {about['date']}, commit {about['code']}, {about['device']}, {about['buffers']}, "
        f"{versions}.\nMedian (least..most) of {about['rounds']} rounds; times: ratio of the medians (least..most of a "
        "round's); MB: memory beyond what was held before, at its highest; differences of loss and gradients, "
        "relative to the largest entry.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    )


def cells(row: dict) -> list[str]:
    """A row's numbers as text."""
    ms = [spread(statistics.median(times), times) for times in row["ms"]]
    memory = ["-" if size is None else f"{size / 1e6:.0f}" for size in row["bytes"]]
    apart = ", ".join(f"{value:.0e}" for value in row["differences"] or ()) or "-"
    return [row["what"], row["on"], *ms, spread(row["ratio"], row["ratios"]), *memory, apart]


def spread(middle: float, values: list[float]) -> str:
    few = [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in (middle, min(values), max(values))]
    return f"{few[0]} ({few[1]}..{few[2]})"


def keep_buffers() -> None:
    """Let the C library keep freed buffers of any size, as it does with small ones."""
    mallopt = getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "mallopt", None)
    if mallopt is None or not all(mallopt(option, KEPT) for option in (-3, -1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        raise RunError("--keep_buffers: needs Linux with glibc")


def network_pair(text: str) -> tuple[str, str]:
    """'wrn_40_2:wrn_16_2' -> teacher, student"""
    pair = tuple(text.split(":"))
    if len(pair) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a teacher and a student like wrn_40_2:wrn_16_2")
    for name in pair:
        if name not in model_dict:
            known = ", ".join(known_first(name, model_dict))
            raise argparse.ArgumentTypeError(f"unknown network {name!r}; known: {known}")
    return pair


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, known, pairs = parser.add_argument, ", ".join(FORMS), ["wrn_40_2:wrn_16_2", "resnet32x4:resnet8x4"]
    add("--losses", nargs="*", choices=FORMS, metavar="METHOD", required=True, help=f"some of {known} (all)")
    add(
        "--pairs",
        nargs="+",
        type=network_pair,
        metavar="TEACHER:STUDENT",
        default=[network_pair(pair) for pair in pairs],
        help=f"({' '.join(pairs)})",
    )
    add("--batch_size", type=number(int, 1), default=64, help="(64)")
    add("--rounds", type=number(int, 1), default=7, help="(7)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--keep_buffers", action="store_true", help="freed buffers stay with the process (Linux with glibc)")
    add("--output", type=Path, default=Path("save/benchmark"), help="folder of the results (save/benchmark)")
    opt = parser.parse_args(argv)
    opt.losses = list(dict.fromkeys(opt.losses or FORMS))
    return opt


@one_sentence
def main() -> None:
    opt = parse()
    device = choose_device(opt.device)
    if opt.keep_buffers:
        keep_buffers()
    about = {
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "code": code_version(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "buffers": "freed buffers kept" if opt.keep_buffers else "the C library's default allocation",
        "versions": versions(),
        "batch_size": opt.batch_size,
        "rounds": opt.rounds,
    }
    try:
        opt.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--output {opt.output}: cannot be made ({error.strerror})") from error
    rows = []
    for what, on, *sides in cases(opt, device):
        print(f"{what} {on} ...", file=sys.stderr)
        rows.append(measure(what, on, sides, opt.rounds, device))
    text = table(about, rows)
    print(text, end="")
    checkpoint.write(opt.output / "losses.md", text.encode())
    checkpoint.write(opt.output / "losses.json", (json.dumps({**about, "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
