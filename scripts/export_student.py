"""Export a trained network for use outside of this project, with a model card.

    python scripts/export_student.py save/student_model/.../resnet8x4_last.pth
    python scripts/export_student.py CKPT --format state_dict safetensors onnx --output exported

writes the plain network under its own state names, README.md (the card) and labels.json (the class names). Each file is
run before it is written: weights must give the checkpoint's logits bit for bit, ONNX to 4 digits.
"""

import argparse
import hashlib
import io
import json
import sys
import warnings
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from helper import checkpoint
from helper.options import Parser, network, number
from helper.util import RunError, cli_errors
from models import file_name, inner_name
from models.external import External, foreign_parts, stages_of
from scripts.costs import costs

SUFFIXES = {"state_dict": "pth", "safetensors": "safetensors", "onnx": "onnx"}
MARK = "<!-- written by export_student.py, which may overwrite it -->"
INSTALL = "pip install onnx onnxscript onnxruntime"


def encode(net: nn.Module, layout: str, images: Tensor) -> bytes:
    """The content of a file with a network, which is in eval mode."""
    if layout == "onnx":
        names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the exporter's, about its own code
                # of a copy: afterwards, the hooks of a foreign network no longer reach it
                proto = torch.onnx.export(deepcopy(net), (images,), dynamo=True, verbose=False, **names).model_proto
        except torch.onnx.OnnxExporterError as error:
            raise RunError(f"--format onnx: torch cannot export this network ({str(error).splitlines()[0]})") from error
        for part in (proto.graph, *proto.graph.node, *proto.graph.value_info):
            part.ClearField("metadata_props")  # stack traces with this machine's paths
        return proto.SerializeToString()
    state = {key: value.clone(memory_format=torch.contiguous_format) for key, value in net.state_dict().items()}
    if layout == "safetensors":
        return safetensors.torch.save(state, {"format": "pt"})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@torch.inference_mode()
def check(content: bytes, layout: str, net: nn.Module, images: Tensor) -> str:
    """Run what encode() made -> how its logits compare with the network's. Raises RunError if they differ."""
    expected = net(images)
    if layout == "onnx":
        if not find_spec("onnxruntime"):
            return f"not run, as onnxruntime is not installed ({INSTALL})"
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        batches = images, images[:1]  # the size of a batch is free
        logits = [torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]) for batch in batches]
        error = max(float((logit - expected[: len(logit)]).abs().max()) for logit in logits)
        if error <= 1e-4 * float(expected.abs().max()):  # false for NaN
            return f"run by onnxruntime, logits within {error:.0e}"
    else:
        fresh = deepcopy(net)
        for value in fresh.state_dict().values():
            value.zero_()
        if layout == "safetensors":
            fresh.load_state_dict(safetensors.torch.load(content))
        else:
            fresh.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
        if torch.equal(fresh(images), expected):
            return "loaded again, logits equal bit for bit"
    raise RunError(f"--format {layout}: the logits of the exported network are not those of the checkpoint")


def loading(arch: str, n_cls: int, net: nn.Module, size: int, file: str) -> str:
    """Lines of Python that load an exported file."""
    if file.endswith(".onnx"):
        session = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{file}")'
        return f'{session}\nlogits = session.run(None, {{"images": images}})[0]'
    ours = inner_name(arch) != arch or ":" not in arch
    kind, _, name = ("", "", arch) if ours else arch.rpartition(":")
    options = f'"{name}", num_classes={n_cls}'
    if getattr(net, "pretrained_cfg", {}).get("fixed_input_size"):  # of timm
        options += f", img_size={size}"
    for key in ("image_size", "aux_logits"):  # of torchvision
        options += f", {key}={getattr(net, key)}" if hasattr(net, key) else ""
    more = f", {size}, {stages_of(net)}" if foreign_parts(net) else ""
    library, model = {
        "timm": ("import timm", f"timm.create_model({options})"),
        "torchvision": ("import torchvision", f"torchvision.models.get_model({options})"),
        "": ("from models import create_model  # of Distillers", f'create_model("{name}", {n_cls}{more})'),
    }.get(kind, (f"from {Path(kind).stem} import {name}", f"{name}()  # for {n_cls} classes"))
    module, state = "torch", f'torch.load("{file}", weights_only=True)'
    if file.endswith(".safetensors"):
        module, state = "safetensors.torch", f'safetensors.torch.load_file("{file}")'
    return f"import {module}\n{library}\n\nmodel = {model}\nmodel.load_state_dict({state})\nmodel.eval()"


def training(folder: Path, arch: str, n_cls: int, about: dict) -> dict[str, str]:
    """What a checkpoint, and config.json and metrics.jsonl beside it, say of a network's training and accuracy."""
    path, metrics, epoch = folder / "config.json", folder / "metrics.jsonl", about.get("epoch")
    config = json.loads(checkpoint.read_text(path)) if path.exists() else {}
    config = config if (config.get("arch"), config.get("n_cls")) == (arch, n_cls) else {}  # of another run
    text = checkpoint.read_text(metrics) if config and metrics.exists() else b""
    lines = {line["epoch"]: line for line in map(json.loads, text.splitlines()) if "epoch" in line}
    part, distilled = config.get("parts", [{}])[-1], config.get("distilled")
    terms = {"gamma": "cross-entropy", "alpha": f"KL at T = {config.get('kd_T')}", "beta": "its own term"}
    weights = [f"{weight:g} * {terms[key]}" for key, weight in config.get("weights", {}).items() if weight]
    facts = {
        "Data set": about.get("dataset"),
        "Teacher": config["teacher"] if distilled else "",
        "Method": f"{config['method']}: {' + '.join(weights)}" if distilled else "labels alone" if config else "",
        "Epoch": epoch,
        "Test accuracy (%)": about.get("accuracy"),
        "Test macro-F1 (%)": lines.get(epoch, {}).get("test_macro_f1"),
    }
    if lines:
        ends = {"last": list(lines.values())[-1], "best": max(lines.values(), key=lambda line: line["test_acc"])}
        found = [f"{name} {line['test_acc']:.2f} (epoch {line['epoch']})" for name, line in ends.items()]
        facts["Test accuracy in training (%)"] = ", ".join(found)
    facts |= {
        "Trained with": f"Distillers, commit {part['code']}" if part else "",
        "Versions": ", ".join(f"{name} {version}" for name, version in part.get("versions", {}).items()),
        "SHA-256 of the configuration": about.get("config_sha256"),
    }
    known = {name: fact for name, fact in facts.items() if fact not in (None, "")}
    return {name: f"{fact:.2f}" if isinstance(fact, float) else f"{fact}" for name, fact in known.items()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT", help="a checkpoint of ours or of another program")
    add("--format", nargs="+", choices=SUFFIXES, default=["state_dict"], help="formats to write (state_dict)")
    add("--output", type=Path, metavar="DIR", help="folder for the files (CKPT's name and _export, beside it)")
    add("--model", type=network, metavar="NAME", help="the network (the one that the weights fit)")
    add("--part", help="key or prefix of the weights in CKPT, where it holds several networks")
    add("--image_size", type=number(int, 8, 1024), help="height and width of the images (as in training, or 32)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    if "onnx" in opt.format and (missing := [name for name in ("onnx", "onnxscript") if not find_spec(name)]):
        raise RunError(f"--format onnx: needs {' and '.join(missing)} ({INSTALL})")
    found = checkpoint.load_network(opt.checkpoint, opt.model, "--model", opt.part, image_size=opt.image_size)
    arch, n_cls, net, about = found
    mean, std = about.get("mean"), about.get("std")
    for part in foreign_parts(net):
        mean, std = part.mean or mean, part.std or std
    net = net.net if isinstance(net, External) else net
    folder, size = opt.checkpoint.parent, opt.image_size or about.get("image_size", 32)
    cost = costs(net, size)
    facts = {
        "Network": f"{arch}, {cost['params']:,} parameters, {cost['macs'] / 1e6:,.1f} million MACs per image",
        "Input": f"images, float32 (N, 3, {size}, {size}), RGB",
        "Output": f"logits, float32 (N, {n_cls})",
    }
    if mean and std:
        minus, by = (", ".join(f"{value:.6g}" for value in values) for values in (mean, std))
        facts["Input"] += f", from 0 to 1, minus mean ({minus}), divided by std ({by})"
    try:
        facts |= training(folder, arch, n_cls, about)
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise RunError(f"{folder}: config.json or metrics.jsonl in it is damaged ({error!r})") from error

    files, rows, code, name = {}, [], [], file_name(arch)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    for layout in dict.fromkeys(opt.format):
        file, content = f"{name}.{SUFFIXES[layout]}", encode(net, layout, images)
        rows.append(f"| {file} | {check(content, layout, net, images)} | {hashlib.sha256(content).hexdigest()} |")
        code.append(f"```python\n{loading(arch, n_cls, net, size, file)}\n```")
        files[file] = content
    if "class_names" in about:
        files["labels.json"] = (json.dumps(about["class_names"], indent=0) + "\n").encode()
        facts["Output"] += ", classes in the order of labels.json"
    card = [MARK, f"# {arch}", ""]
    card += [f"- {name}: {''.join(c if c.isprintable() else ' ' for c in fact):.1000}" for name, fact in facts.items()]
    card += ["", "| file | checked | SHA-256 |", "| --- | --- | --- |", *rows, "", "\n\n".join(code), ""]
    output = opt.output or opt.checkpoint.with_name(f"{opt.checkpoint.stem}_export")
    path = output / "README.md"
    if path.exists() and not path.read_bytes().startswith(MARK.encode()):
        raise RunError(f"{path}: exists and is no model card; choose another --output")
    if opt.checkpoint.resolve() in {(output / file).resolve() for file in files}:
        raise RunError(f"--output {output}: would overwrite {opt.checkpoint}")
    output.mkdir(parents=True, exist_ok=True)
    for file, content in (files | {"README.md": "\n".join(card).encode()}).items():
        checkpoint.write(output / file, content)
    print(*card[3:], f"written to {output}", sep="\n")


if __name__ == "__main__":
    sys.exit(cli_errors(main))
