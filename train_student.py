"""Train students of one teacher: one for each method of --distill, side by side."""

import sys

from dataset import load_dataset
from helper import pretrain
from helper.build import (
    NO_TEACHER,
    held_out_loader,
    hold_out,
    layout_of,
    load_teacher,
    loaders,
    start,
    student_tracks,
    train_step,
)
from helper.loops import fit, summary, validate
from helper.options import parse_student
from helper.util import cli_errors


def main() -> int:
    opt = parse_student()
    device = start(opt)
    teacher = load_teacher(opt) if opt.path_t else NO_TEACHER
    source = load_dataset(opt.dataset, opt.data_folder, opt.image_size, opt.download, opt.num_workers)
    source, held_out = hold_out(source, opt)
    train_loader, test_loader = loaders(source, opt, device)
    teacher.fit_for(source, device, layout_of(opt))
    tracks = student_tracks(opt, source, device, teacher)
    for track in tracks:
        track.open(opt)
    if teacher.model is not None:
        print(f"teacher {teacher.arch}: test {validate(teacher.model, test_loader)['acc']:.2f}")

    step = train_step(opt, tracks, teacher.model)
    pretrain.init(step, train_loader, opt)
    fit(step, train_loader, test_loader, opt, held_out_loader(held_out, source, opt, device))

    for track in tracks:
        print(summary(track))
    return 1 if any(track.failed for track in tracks) else 0


if __name__ == "__main__":
    sys.exit(cli_errors(main))
