"""DeviceLoader against PIL, torchvision's transforms and a plain DataLoader."""

import warnings
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from dataset import DataError
from dataset.loader import DeviceLoader, crop, normalize
from dataset.torchvision_import import torchvision

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
VIEWS = [(dy, dx, flip) for dy in range(9) for dx in range(9) for flip in (0, 1)]
both = pytest.mark.parametrize("augmented", ["crop", None])


def data(n=50, h=12, w=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, h, w, 3), dtype=np.uint8), rng.integers(0, 7, n)


def loader(n=50, batch_size=8, **options):
    return DeviceLoader(*data(n), batch_size, mean=MEAN, std=STD, **options)


def epoch(number=1, step=0, **options):
    """All batches of an epoch of a new loader."""
    it = loader(**options)
    it.set_epoch(number, step)
    return list(it)


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, chain(*a), chain(*b)))


def pil_view(image, dy, dx, flip):
    """torchvision's RandomCrop(padding=4) and RandomHorizontalFlip on a PIL image, with these draws."""
    tf = torchvision.transforms.functional
    h, w = image.shape[:2]
    pil = tf.crop(tf.pad(Image.fromarray(image), 4), dy, dx, h, w)
    return tf.hflip(pil) if flip else pil


def pil_normalize(pil):
    tf = torchvision.transforms.functional
    return tf.normalize(tf.to_tensor(pil), MEAN, STD)


# --- the pixels


@pytest.mark.parametrize(("h", "w"), [(32, 32), (9, 14), (3, 1)])
def test_all_views_equal_pil_and_torchvision_bit_for_bit(h, w):
    """In one batch, so that the draws of different images must stay apart."""
    images, _ = data(4, h, w)
    images[0], images[1] = 255, 0
    views = crop(torch.from_numpy(images.repeat(162, 0)), *torch.tensor(VIEWS * 4).T)
    want = [pil_view(image, *view) for image in images for view in VIEWS]
    assert torch.equal(views, torch.from_numpy(np.stack([np.asarray(pil) for pil in want])))
    assert torch.equal(normalize(views, MEAN, STD), torch.stack([pil_normalize(pil) for pil in want]))


def test_every_grey_level_is_normalized_bit_for_bit():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
    assert torch.equal(normalize(torch.from_numpy(ramp)[None], MEAN, STD)[0], pil_normalize(Image.fromarray(ramp)))


@both
def test_memory_formats(augmented):
    for batch_size in (8, 1):
        for images, target, index in loader(batch_size=batch_size, augment=augmented):
            assert images.is_contiguous(memory_format=torch.channels_last) and images.shape[1:] == (3, 12, 12)
            assert images.stride() == (12 * 12 * 3, 1, 12 * 3, 3)
            assert target.dtype == index.dtype == torch.int64 and target.shape == index.shape == images.shape[:1]
    plain = epoch(augment=augmented, layout=torch.contiguous_format)
    assert plain[0][0].is_contiguous() and same(plain, epoch(augment=augmented))


def test_without_augmentation_it_equals_a_plain_dataloader():
    images, labels = data(50)
    x = torch.stack([pil_normalize(Image.fromarray(image)) for image in images])
    plain = DataLoader(TensorDataset(x, torch.from_numpy(labels), torch.arange(50)), batch_size=8)
    for it in (loader(), loader(seed=3)):
        assert len(it) == len(plain) == 7 and same(list(it), list(plain))
        it.set_epoch(9)
        assert same(list(it), list(plain))
    assert [len(x) for x, *_ in loader(n=5, batch_size=64)] == [5]


# --- an epoch


@pytest.mark.parametrize(("n", "batch_size", "length"), [(50, 8, 7), (48, 8, 6), (50, 50, 1), (50, 1, 50)])
@both
def test_each_index_once_and_a_short_last_batch(n, batch_size, length, augmented):
    it = loader(n, batch_size, augment=augmented)
    index = [i for *_, i in it]
    assert len(it) == len(index) == length and it.n_data == n
    assert sorted(torch.cat(index).tolist()) == list(range(n))
    assert {len(i) for i in index[:-1]} <= {batch_size} and len(index[-1]) == n - batch_size * (length - 1)


def test_target_and_image_belong_to_the_index():
    images, labels = data(50)
    views = {
        pil_normalize(pil_view(image, *view)).numpy().tobytes(): i for i, image in enumerate(images) for view in VIEWS
    }
    for x, target, index in loader(augment="crop"):
        assert np.array_equal(target, labels[index])
        assert [views[view.contiguous().numpy().tobytes()] for view in x] == index.tolist()


def test_draws_depend_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    first = epoch(5, seed=3, augment="crop")
    assert torch.equal(torch.get_rng_state(), state) and np.random.rand() == np.random.RandomState(1).rand()
    torch.manual_seed(2)
    assert same(first, epoch(5, seed=3, augment="crop"))

    seeds = (0, 1, 2**32, 2**32 + 1)  # not of 32 bits alone
    orders = {tuple(loader(seed=s, augment="crop").plan(e)[0].tolist()) for e in (1, 2, 3) for s in seeds}
    assert len(orders) == 12
    whole = [torch.cat(part) for part in zip(*epoch(batch_size=50, augment="crop"), strict=True)]
    parts = [torch.cat(part) for part in zip(*epoch(batch_size=7, augment="crop"), strict=True)]
    assert all(map(torch.equal, whole, parts))
    other = DeviceLoader(*data(50, seed=1), 13, mean=MEAN, std=STD, augment="crop", flip=False)
    assert torch.equal(other.plan(1)[:3], loader(augment="crop").plan(1)[:3])


def test_draws_are_those_of_stored_runs():
    """An order that changed would silently make every stored run another one."""
    plan = loader(seed=3, augment="crop").plan(2)
    assert plan[:, :6].tolist() == [[17, 12, 34, 7, 24, 4], [2, 1, 8, 8, 0, 4], [3, 1, 3, 1, 6, 2], [0, 0, 1, 0, 1, 0]]


def test_draws_are_uniform():
    _, dy, dx, flip = loader(16_200, augment="crop").plan(1)
    counts = torch.bincount((dy * 9 + dx) * 2 + flip, minlength=162)
    chi2 = ((counts - 100) ** 2 / 100).sum().item()
    assert len(counts) == 162 and 100 < chi2 < 235  # 161 degrees of freedom, 3 standard deviations on either side
    _, dy, dx, flip = loader(1000, augment="crop", flip=False).plan(1)
    assert not flip.any() and len((dy * 9 + dx).unique()) == 81


@both
def test_an_epoch_is_entered_again_at_any_step(augmented):
    whole = epoch(4, augment=augmented)
    for step in range(len(whole) + 1):
        assert same(epoch(4, step, augment=augmented), whole[step:])
    it = loader(augment=augmented)
    it.set_epoch(4, 3)
    assert same(list(it), whole[3:]) and same(list(it), whole)  # then from the beginning


def test_an_iteration_keeps_the_epoch_it_began_with():
    it = loader(augment="crop")
    running = iter(it)
    it.set_epoch(2)
    assert same(list(running), epoch(1, augment="crop"))


def test_a_loader_is_its_plans_and_the_batches_made_of_them():
    """What a CUDA graph is captured of, and what a loader from disk implements too."""
    it = loader(augment="crop")
    it.set_epoch(2, 1)
    plans = list(it.plans())
    assert len(plans) == len(it) - 1 and same(list(map(it.batch, plans)), epoch(2, 1, augment="crop"))


# --- the device


@both
def test_iteration_never_reads_the_device(augmented):
    """Meta tensors have no values: .item(), nonzero and boolean masks fail on them."""
    batches = epoch(augment=augmented, device="meta")
    assert [len(x) for x, *_ in batches] == [8] * 6 + [2]
    assert all(t.device.type == "meta" for batch in batches for t in batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both
def test_cuda_gives_the_same_batches_without_waiting(augmented):
    it = loader(augment=augmented, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(it)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same([[t.cpu() for t in batch] for batch in got], epoch(augment=augmented))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, *_ in got)


@both
def test_arrays_are_left_as_they_are_and_batches_own_their_memory(augmented):
    images, labels = data(50)
    for array in (images, labels):
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        it = DeviceLoader(images, labels, 8, mean=MEAN, std=STD, augment=augmented)
    for x, target, _ in it:
        x.zero_()
        target.zero_()
    assert same(list(it), epoch(augment=augmented)) and np.array_equal(images, data(50)[0])
    strided = images.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1)
    assert same(list(DeviceLoader(strided, labels, 8, mean=MEAN, std=STD, augment=augmented)), list(it))


# --- what does not fit


def test_batch_larger_than_the_training_set():
    with pytest.raises(DataError, match=r"^--batch_size 4096 is larger than the training set \(1000 images\)$"):
        loader(1000, 4096, augment="crop")
    loader(1000, 1000, augment="crop")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((10, 12, 12, 3)), np.zeros(10, int)),
        (np.zeros((10, 3, 12, 12), np.uint8), np.zeros(10, int)),
        (np.zeros((10, 12, 12, 3), np.uint8), np.zeros(9, int)),
        (np.zeros((10, 12, 12, 3), np.uint8), np.arange(10) - 1),
        (np.zeros((10, 12, 12, 3), np.uint8), np.arange(10) + 1),
    ],
    ids=["float images", "channels first", "fewer labels", "negative label", "label too high"],
)
def test_arrays_that_do_not_fit(images, labels):
    with pytest.raises(DataError):
        DeviceLoader(images, labels, 2, mean=MEAN, std=STD, n_cls=10)


@pytest.mark.parametrize(("number", "step"), [(0, 0), (1, -1), (1, 8)])
def test_epochs_and_steps_that_do_not_exist(number, step):
    with pytest.raises(DataError):
        loader().set_epoch(number, step)
