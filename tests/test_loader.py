"""DeviceLoader against PIL, torchvision's transforms and a plain DataLoader."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from dataset import DataError
from dataset.loader import DeviceLoader, augmented, normalised
from dataset.torchvision_import import torchvision

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
VIEWS = [(dy, dx, flip) for dy in range(9) for dx in range(9) for flip in (0, 1)]


def data(n=50, h=12, w=12, n_cls=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, h, w, 3), dtype=np.uint8), rng.integers(0, n_cls, n)


def loader(n=50, batch_size=8, seed=0, n_cls=7, **options):
    images, labels = data(n, n_cls=n_cls)
    return DeviceLoader(images, labels, batch_size, mean=MEAN, std=STD, seed=seed, **options)


def batches(it):
    return [tuple(t.clone() for t in batch) for batch in it]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def pil_view(image, dy, dx, flip):
    """torchvision's RandomCrop(padding=4) and RandomHorizontalFlip on a PIL image, with these draws."""
    tf = torchvision.transforms.functional
    h, w = image.shape[:2]
    pil = tf.crop(tf.pad(Image.fromarray(image), 4), dy, dx, h, w)
    return tf.hflip(pil) if flip else pil


def pil_normalised(pil):
    tf = torchvision.transforms.functional
    return tf.normalize(tf.to_tensor(pil), MEAN, STD)


# --- the pixels


@pytest.mark.parametrize(("h", "w"), [(32, 32), (9, 14), (3, 1)])
def test_all_views_equal_pil_and_torchvision_bit_for_bit(h, w):
    images, _ = data(4, h, w)
    images[0], images[1] = 255, 0
    dy, dx, flip = torch.tensor(VIEWS).T
    for image in images:
        views = augmented(torch.from_numpy(image).expand(162, h, w, 3), dy, dx, flip)
        want = [pil_view(image, *view) for view in VIEWS]
        assert views.dtype == torch.uint8
        assert torch.equal(views, torch.from_numpy(np.stack([np.asarray(pil) for pil in want])))
        assert torch.equal(normalised(views, MEAN, STD), torch.stack([pil_normalised(pil) for pil in want]))


def test_every_grey_level_is_normalised_bit_for_bit():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
    got = normalised(torch.from_numpy(ramp)[None], MEAN, STD)
    assert torch.equal(got[0], pil_normalised(Image.fromarray(ramp)))


def test_views_of_different_images_stay_apart():
    """Each image of a batch has its own draws; booleans do as flips; another padding works."""
    images, _ = data(162, 10, 11)
    dy, dx, flip = torch.tensor(VIEWS)[torch.randperm(162, generator=torch.Generator().manual_seed(0))].T
    views = augmented(torch.from_numpy(images), dy, dx, flip.bool())
    for view, image, *draw in zip(views, images, dy.tolist(), dx.tolist(), flip.tolist(), strict=True):
        assert np.array_equal(view.numpy(), np.asarray(pil_view(image, *draw)))
    shifted = augmented(torch.from_numpy(images), dy * 0, dx * 0 + 2, flip * 0, pad=1)
    assert torch.equal(shifted[:, 1:, :-1], torch.from_numpy(images)[:, :-1, 1:])
    assert shifted[:, 0].sum() == 0 and shifted[:, :, -1].sum() == 0


def test_images_are_channels_last():
    for batch_size in (8, 1):
        for images, target, index in loader(batch_size=batch_size, augment=True):
            assert images.is_contiguous(memory_format=torch.channels_last) and images.shape[1:] == (3, 12, 12)
            assert images.stride() == (12 * 12 * 3, 1, 12 * 3, 3)
            assert target.dtype == index.dtype == torch.int64 and target.shape == index.shape == images.shape[:1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_float32_rounded(dtype):
    for (x, *_), (y, *_) in zip(loader(augment=True, dtype=dtype), loader(augment=True), strict=True):
        assert x.dtype == dtype and torch.equal(x, y.to(dtype))
        assert x.is_contiguous(memory_format=torch.channels_last)


# --- without augmentation


def test_equals_a_plain_dataloader():
    images, labels = data(50)
    x = torch.stack([pil_normalised(Image.fromarray(image)) for image in images])
    plain = DataLoader(TensorDataset(x, torch.from_numpy(labels), torch.arange(50)), batch_size=8)
    ours = loader()
    assert len(ours) == len(plain) == 7 and same(batches(ours), batches(plain))


def test_file_order_whatever_the_epoch_and_seed():
    first = batches(loader())
    other = loader(seed=3)
    other.set_epoch(9)
    assert same(first, batches(other))


def test_evaluation_batch_may_exceed_the_set():
    it = loader(n=5, batch_size=64)
    assert len(it) == 1 and [len(x) for x, *_ in it] == [5]


# --- an epoch


@pytest.mark.parametrize(("n", "batch_size", "length"), [(50, 8, 7), (48, 8, 6), (50, 50, 1), (50, 1, 50)])
@pytest.mark.parametrize("augment", [True, False])
def test_each_index_once_and_a_short_last_batch(n, batch_size, length, augment):
    it = loader(n, batch_size, augment=augment)
    index = [i for *_, i in it]
    assert len(it) == len(index) == length and it.n_data == n
    assert sorted(torch.cat(index).tolist()) == list(range(n))
    assert {len(i) for i in index[:-1]} <= {batch_size} and len(index[-1]) == n - batch_size * (length - 1)


def test_length_of_a_cifar_epoch():
    images, labels = np.zeros((50_000, 1, 1, 3), np.uint8), np.zeros(50_000, np.int64)
    assert len(DeviceLoader(images, labels, 64, mean=MEAN, std=STD, augment=True)) == 782


def test_target_and_image_belong_to_the_index():
    images, labels = data(50)
    views = {
        pil_normalised(pil_view(image, *view)).numpy().tobytes(): i for i, image in enumerate(images) for view in VIEWS
    }
    for x, target, index in loader(augment=True):
        assert np.array_equal(target, labels[index])
        assert [views[view.contiguous().numpy().tobytes()] for view in x] == index.tolist()


def test_same_seed_same_batches_and_others_differ():
    def epoch(number, **options):
        it = loader(augment=True, **options)
        it.set_epoch(number)
        return batches(it)

    assert same(epoch(1), batches(loader(augment=True)))
    assert same(epoch(5, seed=3), epoch(5, seed=3))
    orders = [
        torch.cat([i for *_, i in epoch(e, seed=s)]).tolist() for e in (1, 2, 3) for s in (0, 1, 2**32, 2**32 + 1)
    ]
    assert len({tuple(order) for order in orders}) == 12


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(1)
    np.random.seed(1)
    state, before = torch.get_rng_state(), batches(loader(augment=True))
    assert torch.equal(torch.get_rng_state(), state) and np.random.rand() == np.random.RandomState(1).rand()
    torch.manual_seed(2)
    assert same(before, batches(loader(augment=True)))


def test_order_does_not_depend_on_content_or_batch_size():
    images, labels = data(50, seed=1)
    other = DeviceLoader(images, labels, 13, mean=MEAN, std=STD, augment=True, flip=False)
    assert torch.equal(torch.cat([i for *_, i in other]), torch.cat([i for *_, i in loader(augment=True)]))


def test_batch_size_does_not_change_the_views():
    whole = batches(loader(batch_size=50, augment=True))[0]
    parts = [torch.cat(part) for part in zip(*batches(loader(batch_size=7, augment=True)), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("augment", [True, False])
def test_an_epoch_is_entered_again_at_any_step(augment):
    it = loader(augment=augment)
    it.set_epoch(4)
    whole = batches(it)
    for step in range(len(it) + 1):
        fresh = loader(augment=augment)
        fresh.set_epoch(4, step)
        assert same(batches(fresh), whole[step:])


def test_iterating_again_repeats_the_whole_epoch():
    it = loader(augment=True)
    it.set_epoch(2, 3)
    rest, whole = batches(it), batches(it)
    assert len(rest) == 4 and len(whole) == 7 and same(whole[3:], rest) and same(whole, batches(it))


def test_an_iteration_keeps_the_epoch_it_began_with():
    it = loader(augment=True)
    want = batches(it)
    running = iter(it)
    it.set_epoch(2)
    first = next(running)
    it.set_epoch(3)
    assert same([first, *running], want)


def coordinates(n, flip=True):
    """Draws of one epoch, read from images whose pixels tell their own row and column."""
    image = np.zeros((10, 10, 3), np.uint8)
    image[..., 0], image[..., 1] = np.indices((10, 10))
    images, labels = np.broadcast_to(image, (n, 10, 10, 3)), np.zeros(n, np.int64)
    it = DeviceLoader(images, labels, n, mean=(0, 0, 0), std=(1 / 255,) * 3, augment=True, flip=flip)
    x = next(iter(it))[0].round().long()
    mirrored = x[:, 1, 5, 5] < x[:, 1, 5, 4]
    column = torch.where(mirrored, x[:, 1, 5, 4], x[:, 1, 5, 5])
    return x[:, 0, 5, 5] - 1, column - 1, mirrored


def test_draws_are_uniform():
    dy, dx, mirrored = coordinates(16_200)
    counts = torch.bincount((dy * 9 + dx) * 2 + mirrored, minlength=162)
    assert len(counts) == 162
    chi2 = ((counts - 100) ** 2 / 100).sum().item()
    assert 100 < chi2 < 235  # 161 degrees of freedom, beyond three standard deviations on either side


def test_flip_off_leaves_crops():
    dy, dx, mirrored = coordinates(1000, flip=False)
    assert not mirrored.any() and len(set(zip(dy.tolist(), dx.tolist(), strict=True))) == 81


# --- the device


@pytest.mark.parametrize("augment", [True, False])
def test_iteration_never_reads_the_device(augment):
    """Meta tensors have no values: .item(), nonzero and boolean masks fail on them."""
    it = loader(augment=augment, device="meta")
    assert [x.shape[0] for x, *_ in it] == [8] * 6 + [2]
    assert all(t.device.type == "meta" for batch in it for t in batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augment", [True, False])
def test_cuda_gives_the_same_batches_without_waiting(augment):
    want, it = batches(loader(augment=augment)), loader(augment=augment, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(it)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same([tuple(t.cpu() for t in batch) for batch in got], want)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, *_ in got)


@pytest.mark.parametrize("augment", [True, False])
def test_arrays_are_left_as_they_are(augment):
    images, labels = data(50)
    before = images.copy(), labels.copy()
    for array in (images, labels):
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, target, _ in DeviceLoader(images, labels, 8, mean=MEAN, std=STD, augment=augment):
            x.zero_()
            target.zero_()
    assert np.array_equal(images, before[0]) and np.array_equal(labels, before[1])


def test_batches_own_their_memory():
    it = loader()
    before = batches(it)
    for x, target, _ in it:
        x.zero_()
        target.zero_()
    assert same(before, batches(it))


def test_tensors_and_strided_arrays_are_taken():
    images, labels = data(50)
    want = batches(DeviceLoader(images, labels, 8, mean=MEAN, std=STD))
    for x in (torch.from_numpy(images), images.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1)):
        assert same(batches(DeviceLoader(x, torch.from_numpy(labels), 8, mean=MEAN, std=STD)), want)


# --- what cannot be


def test_batch_larger_than_the_training_set():
    with pytest.raises(DataError, match=r"^--batch_size 4096 is larger than the training set \(1000 images\)$"):
        loader(1000, 4096, augment=True)
    loader(1000, 1000, augment=True)


@pytest.mark.parametrize("batch_size", [0, -1])
@pytest.mark.parametrize("augment", [True, False])
def test_batch_size_below_one(batch_size, augment):
    with pytest.raises(DataError, match=f"--batch_size must be at least 1, got {batch_size}"):
        loader(batch_size=batch_size, augment=augment)


IMAGES, LABELS = data(10)
WRONG = {
    "float images": (IMAGES / 255, LABELS, "float64"),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), LABELS, r"\(10, 3, 12, 12\)"),
    "grey images": (IMAGES[..., 0], LABELS, r"\(10, 12, 12\)"),
    "no images": (IMAGES[:0], LABELS[:0], r"\(0, 12, 12, 3\)"),
    "fewer labels": (IMAGES, LABELS[:9], r"labels must be int64 \(10,\).*\(9,\)"),
    "label column": (IMAGES, LABELS[:, None], r"\(10, 1\)"),
    "short labels": (IMAGES, LABELS.astype(np.int32), "int32"),
    "float labels": (IMAGES, LABELS.astype(np.float32), "float32"),
    "negative label": (IMAGES, np.arange(10) - 1, r"0\.\.9, got -1\.\.8"),
    "label too high": (IMAGES, np.arange(10) + 1, r"0\.\.9, got 1\.\.10"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arrays_that_do_not_fit(case):
    images, labels, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        DeviceLoader(images, labels, 2, mean=MEAN, std=STD, n_cls=10)


def test_negative_label_without_the_number_of_classes():
    with pytest.raises(DataError, match="labels"):
        DeviceLoader(IMAGES, np.arange(10) - 1, 2, mean=MEAN, std=STD)


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (1, -1), (1, 8)])
def test_epochs_and_steps_that_do_not_exist(epoch, step):
    with pytest.raises(DataError):
        loader().set_epoch(epoch, step)
