"""Picture measures against their definitions, and the sheets."""

import math

import pytest

from asyncdiff.errors import InputError

np = pytest.importorskip("numpy")
PIL = pytest.importorskip("PIL.Image")
compare = pytest.importorskip("asyncdiff.tools.compare")


def noise(seed=0, size=(32, 24, 3)):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def test_psnr_by_hand():
    black = np.zeros((8, 8, 3), np.uint8)
    assert compare.psnr(black, black) == math.inf
    assert compare.psnr(black, black + 255) == pytest.approx(0.0)
    assert compare.psnr(black, np.full((8, 8, 3), 0.1)) == pytest.approx(20.0)


def test_bytes_floats_and_images_are_the_same_picture():
    a, b = noise(0), noise(1)
    expected = compare.psnr(a, b)
    assert compare.psnr(PIL.fromarray(a), b / 255.0) == pytest.approx(expected)
    assert compare.psnr(PIL.fromarray(a).convert("RGBA"), b) == pytest.approx(expected)


def test_ssim_ends():
    pytest.importorskip("skimage")
    a = noise()
    assert compare.ssim(a, a) == pytest.approx(1.0)
    assert abs(compare.ssim(a, noise(1))) < 0.2
    brighter = np.clip(a.astype(int) + 8, 0, 255).astype(np.uint8)
    assert 0.9 < compare.ssim(a, brighter) < 1.0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="different shapes"):
        compare.psnr(noise(), noise(size=(24, 32, 3)))
    with pytest.raises(InputError, match="no picture"):
        compare.psnr(np.zeros(5), np.zeros(5))
    pytest.importorskip("skimage")
    with pytest.raises(InputError, match="7 pixels"):
        compare.ssim(noise(size=(4, 4, 3)), noise(size=(4, 4, 3)))


def test_sheet_shows_every_picture(tmp_path):
    rows = {"one": [noise(0), noise(1)], "two": [noise(2), noise(3)]}
    path = tmp_path / "sheet.png"
    out = compare.sheet(rows, ["a", "a much longer label that must be broken and then cut"], path)
    with PIL.open(path) as saved:
        assert saved.size == out.size and saved.format == "PNG"
    # whole-factor enlargement: each picture's colours appear unchanged
    colours = {c for _, c in out.getcolors(1 << 24)}
    for row in rows.values():
        for picture in row:
            assert {tuple(map(int, c)) for c in picture.reshape(-1, 3)} <= colours


def test_side_by_side_and_bad_tables():
    out = compare.side_by_side([noise(0), noise(1)], ["left", "right"])
    assert out.width > out.height
    with pytest.raises(InputError):
        compare.side_by_side([noise(0)], ["left", "right"])
    with pytest.raises(InputError):
        compare.sheet({}, [])


def test_notes_stand_below_and_rows_keep_their_places():
    rows = {"one": [noise(0)], "two": [noise(1)]}
    plain = compare.sheet(rows, ["a"])
    noted = compare.sheet(rows, ["a"], notes={"one": ["33.5 dB"]})
    more = noted.height - plain.height
    assert noted.width == plain.width and 10 < more < 40
    first = plain.height // 2  # the first row ends before this
    below = np.asarray(noted)[first + more + 8 :]
    assert (below == np.asarray(plain)[first + 8 :]).all()


def test_difference_by_hand():
    a = np.full((8, 8, 3), 0.5)
    far = np.asarray(compare.difference(a, a + 0.1, 4))
    assert (far == round(0.4 * 255)).all()
    assert not np.asarray(compare.difference(a, a)).any()
    assert (np.asarray(compare.difference(a, a - 0.4, 4)) == 255).all()
    with pytest.raises(InputError, match="different shapes"):
        compare.difference(a, a[:4])
