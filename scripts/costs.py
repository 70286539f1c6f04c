"""What networks cost: parameters, multiply-accumulates (MACs) and latency on this machine's CPU.

    python scripts/costs.py resnet8x4 wrn_16_2 --image_size 32
    python scripts/costs.py save/student_model/*/*_last.pth

prints a Markdown table. Latency is the median of 30 passes of one image on one thread.
"""

import argparse
import statistics
import sys
import time
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helper import checkpoint
from helper.options import Parser, number
from helper.util import RunError, cli_errors
from models import create_model, runs_code

WARM_UP, PASSES = 5, 30


def costs(model: nn.Module, image_size: int) -> dict[str, float]:
    """Parameters, MACs for one image, and the latency of one image on one CPU thread (ms). The model is left as it was.

    Raises RunError if the network cannot take images of that size.
    """
    model = deepcopy(model).to("cpu", memory_format=torch.contiguous_format).eval().requires_grad_()
    threads = torch.get_num_threads()
    image = torch.linspace(-2, 2, 3 * image_size**2).view(1, 3, image_size, image_size)
    torch.set_num_threads(1)
    try:
        # Fused attention is invisible to the counter: torch uses it outside of autograd, and unless told otherwise.
        with FlopCounterMode(display=False) as counter, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            model(image)
        seconds = []
        with torch.inference_mode():
            for _ in range(WARM_UP + PASSES):
                start = time.perf_counter()
                model(image)
                seconds.append(time.perf_counter() - start)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RunError(f"--image_size {image_size}: the network cannot take such images ({error})") from error
    finally:
        torch.set_num_threads(threads)
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "macs": counter.get_total_flops() // 2,
        "latency_ms": 1000 * statistics.median(seconds[WARM_UP:]),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("networks", nargs="+", metavar="NETWORK", help="name of a network, or a checkpoint")
    add("--image_size", type=number(int, 8, 1024), help="height and width (a checkpoint's size in training, or 32)")
    add("--n_cls", type=number(int, 1), default=100, help="classes of the networks given by name (100)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    networks = [
        checkpoint.load_network(Path(name), flag="--model", image_size=opt.image_size)
        if Path(name).is_file() and not runs_code(name)
        else (name, opt.n_cls, create_model(name, opt.n_cls, opt.image_size or 32), {})
        for name in opt.networks
    ]
    print("| network | classes | pixels | parameters | MACs (M) | CPU latency (ms, 1 image, 1 thread) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for arch, n_cls, model, about in networks:
        size = opt.image_size or about.get("image_size", 32)
        found = costs(model, size)
        numbers = f"{found['params']:,} | {found['macs'] / 1e6:,.1f} | {found['latency_ms']:.2f}"
        print(f"| {arch} | {n_cls} | {size} | {numbers} |", flush=True)


if __name__ == "__main__":
    sys.exit(cli_errors(main))
