"""The fifteen corruptions: pure, seeded, in range, as strong as said; each against a formula or another program."""

from __future__ import annotations

import colorsys
import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from folklora.domain import CORRUPTIONS, corrupt, filters
from folklora.domain.augmentations import augmented
from folklora.domain.jpeg import jpeg

FIXED = {"defocus-blur", "zoom-blur", "brightness", "contrast", "pixelate", "jpeg"}
BENCHMARKS = ["imagenet-c", "cifar-10-c"]
# whose damage grows with the severity in the benchmarks' own numbers; elastic and glass change their kind on the way
GROWING = [name for name in CORRUPTIONS if name not in ("elastic", "glass-blur", "frost", "snow", "fog")]


def photographs(count: int = 3, channels: int = 3, size: tuple[int, int] = (32, 40)) -> Tensor:
    """Smooth images with edges, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    smooth = filters.plasma(count * channels, size, 1.7, generator).view(count, channels, *size)
    return (0.15 + 0.7 * smooth + 0.15 * (smooth > 0.5)).clamp(0, 1)


def test_there_are_fifteen_in_the_usual_order() -> None:
    assert len(CORRUPTIONS) == 15
    assert [*CORRUPTIONS][:4] == ["gaussian-noise", "shot-noise", "impulse-noise", "defocus-blur"]
    assert [*CORRUPTIONS][-3:] == ["elastic", "pixelate", "jpeg"]


@pytest.mark.parametrize("like", BENCHMARKS)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_it_is_pure_and_seeded(name: str, like: str) -> None:
    x = photographs()
    before = x.clone()
    y = corrupt(x, name, severity=5, seed=4, like=like)
    assert torch.equal(x, before)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()
    assert y.min() >= 0
    assert y.max() <= 1
    assert not torch.equal(y, x)
    assert torch.equal(y, corrupt(x, name, severity=5, seed=4, like=like))
    state = torch.get_rng_state()
    assert torch.equal(y, corrupt(x, name, severity=5, seed=5, like=like)) == (name in FIXED)
    assert torch.equal(torch.get_rng_state(), state)
    if name in FIXED:
        torch.testing.assert_close(y[1:2], corrupt(x[1:2], name, severity=5, like=like), rtol=0, atol=1e-6)
    assert corrupt(x.half(), name, like=like).dtype == torch.float16
    assert corrupt(x[:, :1], name, like=like).shape == (3, 1, 32, 40)


@pytest.mark.parametrize("like", BENCHMARKS)
@pytest.mark.parametrize("name", GROWING)
def test_damage_grows_with_the_severity(name: str, like: str) -> None:
    x = photographs(8, size=(64, 64))
    damage = [float((corrupt(x, name, severity, like=like) - x).square().mean()) for severity in (1, 5)]
    assert damage[1] > damage[0] > 0


def test_noises_have_their_moments() -> None:
    x = torch.full((2, 3, 128, 128), 0.5)
    count = x.numel()
    noise = corrupt(x, "gaussian-noise", severity=1) - x
    assert noise.mean().abs() < 5 * 0.08 / count**0.5
    assert noise.std().item() == pytest.approx(0.08, rel=5 / (2 * count) ** 0.5)
    shot = corrupt(x, "shot-noise", severity=1)
    assert (shot.mean() - 0.5).abs() < 5 * (0.5 / 60 / count) ** 0.5
    # photons are whole, and 60 of them are full brightness
    torch.testing.assert_close(shot * 60, (shot * 60).round(), rtol=0, atol=1e-4)
    impulse = corrupt(x, "impulse-noise", severity=5)
    hit = (impulse != 0.5).float().mean().item()
    assert hit == pytest.approx(0.27, abs=5 * (0.27 * 0.73 / count) ** 0.5)
    assert set(impulse.unique().tolist()) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("name", ["defocus-blur", "glass-blur", "motion-blur", "zoom-blur", "elastic", "pixelate"])
def test_what_only_moves_light_leaves_a_plain_image(name: str) -> None:
    x = torch.full((2, 3, 40, 32), 0.3)
    torch.testing.assert_close(corrupt(x, name), x, rtol=0, atol=1e-5)


def test_brightness_raises_the_value_of_hsv() -> None:
    x = photographs(1, size=(6, 5))
    x[0, :, 0, 0] = 0
    y = corrupt(x, "brightness", severity=2)
    for before, after in zip(x[0].flatten(1).T.tolist(), y[0].flatten(1).T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(h, s, min(1.0, v + 0.2)), abs=1e-5)


def test_contrast_and_pixelate_are_their_formulas() -> None:
    x = photographs()
    mean = x.double().mean((2, 3), keepdim=True)
    expected = ((x.double() - mean) * 0.4 + mean).float()
    torch.testing.assert_close(corrupt(x, "contrast", severity=1), expected, rtol=0, atol=1e-6)
    blocks = corrupt(photographs(size=(32, 32)), "pixelate", severity=5)
    cells = blocks.unfold(2, 4, 4).unfold(3, 4, 4)
    assert torch.equal(cells, cells[..., :1, :1].expand_as(cells))
    torch.testing.assert_close(cells[..., 0, 0], torch.nn.functional.avg_pool2d(photographs(size=(32, 32)), 4))


def test_gaussian_blur_is_a_convolution_inside() -> None:
    x, sigma = photographs(2, size=(41, 41)).double(), 1.3
    place = torch.arange(-12, 13, dtype=torch.float64)
    kernel = torch.exp(-place.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    expected = filters.convolved(x, kernel[:, None] * kernel)
    found = filters.gaussian_blur(x, sigma)
    # 12 pixels are 9 standard deviations
    torch.testing.assert_close(found[..., 12:-12, 12:-12], expected[..., 12:-12, 12:-12], rtol=0, atol=1e-12)
    assert torch.equal(filters.gaussian_blur(x, 0.0), x)
    each = filters.gaussian_blur(x, torch.tensor([1.3, 0.4], dtype=torch.float64))
    torch.testing.assert_close(each[1:], filters.gaussian_blur(x[1:], 0.4), rtol=0, atol=1e-12)


def test_places_are_moved_as_said() -> None:
    x = torch.zeros(2, 1, 9, 9)
    x[:, :, 4, 4] = 1
    moved = filters.shifted(x, torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
    # a pixel shows what is found at its offset
    assert moved[0, 0, 4, 3] == pytest.approx(1, abs=1e-5)
    assert moved[1, 0, 6, 4] == pytest.approx(1, abs=1e-5)
    photo = photographs(2)
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, 2, 3)
    torch.testing.assert_close(filters.affine(photo, identity), photo, rtol=0, atol=1e-4)
    right = torch.tensor([[1.0, 0, 1], [0, 1, 0]]).expand(2, 2, 3)
    torch.testing.assert_close(filters.affine(photo, right)[..., :-1], photo[..., 1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(filters.zoomed(photo, 1.0), photo, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quality", [7, 25, 50, 80, 95])
def test_jpeg_is_what_a_file_of_it_gives(quality: int) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = (photographs(1, size=(50, 60))[0] * 255).round().to(torch.uint8)
    for mode, values in (("RGB", pixels.permute(1, 2, 0)), ("L", pixels[0])):
        file = io.BytesIO()
        image.frombytes(mode, (60, 50), bytes(values.flatten().tolist())).save(file, "JPEG", quality=quality)
        decoded = torch.tensor(list(image.open(file).tobytes())).view(50, 60, -1).movedim(-1, 0).float()
        shape = pixels[:1] if mode == "L" else pixels
        found = jpeg(shape[None].float() / 255, quality)[0] * 255
        damage = float((decoded - shape.float()).square().mean())
        # decoders differ in rounding, which now and then tips a frequency over
        assert float((found - decoded).square().mean()) < 0.15 * damage + 0.5


def test_what_is_no_image_is_refused() -> None:
    x = photographs()
    for options, message in (
        ({"corruption": "rain"}, "no corruption 'rain'; there are gaussian-noise"),
        ({"severity": 0}, "from 1 to 5, not 0"),
        ({"like": "cifar"}, "one of imagenet-c, cifar-10-c"),
        ({"images": x[0]}, r"\[N, C, H, W\]"),
        ({"images": (x * 255).byte()}, "floating point"),
        ({"images": x * 255}, r"in \[0, 1\]"),
        ({"images": x * torch.nan}, r"in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            corrupt(**{"images": x, "corruption": "fog"} | options)


def test_views_are_random_near_and_in_range() -> None:
    x = photographs(16)
    generator = torch.Generator().manual_seed(1)
    one, two = (augmented(x, generator) for _ in range(2))
    assert torch.equal(one, augmented(x, torch.Generator().manual_seed(1)))
    for view in (one, two):
        assert view.shape == x.shape
        assert view.min() >= 0
        assert view.max() <= 1
    assert not torch.equal(one, two)
    assert augmented(x[:, :1], generator).shape == (16, 1, 32, 40)
    # an image is nearer to its own view than to those of most others, once mirrors are left out
    views = augmented(x, generator, mirrored=False)
    centred = [(images - images.mean((1, 2, 3), keepdim=True)).flatten(1) for images in (views, x)]
    likeness = torch.nn.functional.normalize(centred[0]) @ torch.nn.functional.normalize(centred[1]).T
    assert (likeness.argmax(1) == torch.arange(16)).float().mean() > 0.9


def test_a_mirrored_view_is_one_of_half_of_the_images() -> None:
    x = torch.zeros(200, 1, 16, 16)
    x[..., :8] = 1
    views = augmented(x, torch.Generator().manual_seed(2))
    flipped = views[..., :4].mean((1, 2, 3)) < views[..., -4:].mean((1, 2, 3))
    assert flipped.sum().item() == pytest.approx(100, abs=5 * 50**0.5)
    kept = augmented(x, torch.Generator().manual_seed(2), mirrored=False)
    assert (kept[..., :4].mean((1, 2, 3)) > kept[..., -4:].mean((1, 2, 3))).all()


def test_photographs_are_damaged_as_much_as_they_are_said_to_be(shared_data: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    with zipfile.ZipFile(shared_data / "data/domain/cifar10_sample.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith((".jpg", ".png")))[::400]
        raw = [image.open(io.BytesIO(archive.read(name))).convert("RGB").tobytes() for name in names]
    x = torch.tensor([list(pixels) for pixels in raw]).view(-1, 32, 32, 3).movedim(-1, 1).float() / 255
    for name in CORRUPTIONS:
        y = corrupt(x, name, severity=5, like="cifar-10-c")
        difference = float((y - x).abs().mean())
        # to be seen, and not all that is to be seen
        assert 0.005 < difference < 0.3, name
        likeness = torch.corrcoef(torch.stack([x.mean(1).flatten(), y.mean(1).flatten()]))[0, 1]
        assert likeness > 0.4, name
