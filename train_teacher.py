"""Train one network on labels alone."""

import sys

from dataset import load_dataset
from helper.build import held_out_loader, hold_out, loaders, start, teacher_track, train_step
from helper.loops import fit, summary
from helper.options import parse_teacher
from helper.util import cli_errors


def main() -> int:
    opt = parse_teacher()
    device = start(opt)
    source = load_dataset(opt.dataset, opt.data_folder, opt.image_size, opt.download, opt.num_workers)
    source, held_out = hold_out(source, opt)
    train_loader, test_loader = loaders(source, opt, device)
    track = teacher_track(opt, source, device)
    track.open(opt)
    fit(train_step(opt, [track]), train_loader, test_loader, opt, held_out_loader(held_out, source, opt, device))
    print(summary(track))
    return 1 if track.failed else 0


if __name__ == "__main__":
    sys.exit(cli_errors(main))
