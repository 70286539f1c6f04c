"""Train a linear classifier on the features of a frozen student, on another data set."""

import sys

from dataset import load_dataset
from helper.build import held_out_loader, hold_out, loaders, start, transfer_track
from helper.checkpoint import load_network
from helper.loops import fit, summary
from helper.options import parse_transfer
from helper.probe import cached
from helper.student import TrainStep
from helper.util import cli_errors


def main() -> int:
    opt = parse_transfer()
    device = start(opt)
    arch, _, student, _ = load_network(opt.path_s, opt.model_s, flag="--model_s")
    source = load_dataset(opt.dataset, opt.data_folder, opt.image_size, opt.download, opt.num_workers)
    source, held_out = hold_out(source, opt)
    train_loader, test_loader = loaders(source, opt, device)
    track = transfer_track(opt, source, device, arch, student)
    track.open(opt)

    # also of epochs that are done: a feature's last bits may depend on those that are computed with it
    epochs = range(1, opt.epochs + 1) if track.epoch < opt.epochs else range(0)
    train_loader, test_loader = cached(train_loader, test_loader, track.model, epochs, opt.cache_features)
    fit(TrainStep([track]), train_loader, test_loader, opt, held_out_loader(held_out, source, opt, device))
    print(summary(track))
    return 1 if track.failed else 0


if __name__ == "__main__":
    sys.exit(cli_errors(main))
