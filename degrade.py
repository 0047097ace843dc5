"""The seven degradations of MiOIR, batched and on any device; images to degrade; training batches.

    python degrade.py --images DIR --out DIR --split both --seed 0     # write test sets

Every degradation takes and gives (N,3,H,W) in [0,1] and one parameter per image, and rounds its
result to 8 bits as the published data are: y = jpeg(x, quality=torch.tensor([30, 45, 70])).
Source: paper, Section 4.1 and the published data_script/add_MiO_train_degradation.py (OpenCV, DiffJPEG).
"""
import math

import numpy as np
import torch
from torch.nn import functional as F

from mioir import TASKS, reflect_pad

# What is drawn for each image: (lowest, highest), both included. "in" trains and tests (In-Dis), "out"
# tests only (Out-Dis). Numbers with a point are rounded to 2 decimals, the others are integers.
RANGES = {
    "in": {"blur": {"sigma": (1.0, 3.0), "kernel_size": (7, 21)},      # kernel_size: odd numbers only
           "noise": {"sigma": (15, 50)},                               # of 255 grey levels
           "jpeg": {"quality": (30, 70)},
           "rain": {"density": (50, 99), "width": (3, 11), "length": (20, 40), "angle": (-45, 44)},
           "haze": {"airlight": (0.8, 1.0), "beta": (0.5, 2.5)},
           "dark": {"gamma": (1.0, 3.0)},
           "sr": {}},                                                  # always x4
    "out": {"blur": {"sigma": (3.0, 5.0), "kernel_size": (7, 21)},
            "noise": {"sigma": (50, 70)},
            "jpeg": {"quality": (10, 30)},
            "rain": {"density": (100, 149), "width": (3, 11), "length": (20, 40), "angle": (-45, 44)},
            "haze": {"airlight": (0.8, 1.0), "beta": (2.5, 3.0)},
            "dark": {"gamma": (3.0, 4.0)}},                            # sr: not published
}


# ---------------------------------------------------------------------------------------------------
# The degradations. Parameters: a number, or an (N,) tensor with one value per image
# ---------------------------------------------------------------------------------------------------

def quantize(x):
    """Rounds (N,3,H,W) to the 256 grey levels, clipped to [0,1]."""
    return (x * 255).round().clamp(0, 255) / 255


def per_image(value, x, dtype=torch.float32):
    """A number or (N,) tensor -> (N,1,1,1) on x's device."""
    value = torch.as_tensor(value, dtype=dtype, device=x.device)
    return value.expand(x.shape[0])[:, None, None, None]


def gaussian_blur(x, kernel_size, sigma):
    """Isotropic Gaussian; kernel_size: odd, at most 21; sigma in pixels; reflected borders."""
    kernel_size, sigma = per_image(kernel_size, x)[:, 0, 0], per_image(sigma, x)[:, 0, 0]   # (N,1)
    at = torch.arange(-10, 11, device=x.device)                                   # room for 21 taps
    taps = torch.exp(-0.5 * (at / sigma) ** 2) * (at.abs() <= kernel_size // 2)   # (N,21)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)             # one row per channel
    n, _, h, w = x.shape
    x = reflect_pad(x, 10, 10, 10, 10).flatten(0, 1)[None]                        # (1,3N,H+20,W+20)
    x = F.conv2d(x, taps[:, None, :, None], groups=3 * n)                         # the kernel is a product
    x = F.conv2d(x, taps[:, None, None, :], groups=3 * n)                         # of two 1-d ones
    return quantize(x.view(n, 3, h, w))


def add_noise(x, sigma, noise=None):
    """White Gaussian noise, independent per channel; sigma in grey levels (15 = 15/255).
    noise: (N,3,H,W) standard normal numbers, drawn from torch's own generator if not given."""
    noise = torch.randn_like(x) if noise is None else noise
    return quantize(x + noise * per_image(sigma, x) / 255)


# Luma and chroma tables of the JPEG standard (ITU T.81, Annex K), row = vertical frequency.
_LUMA = ((16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
         (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
         (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
         (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99))
_CHROMA = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))   # 99 elsewhere


def _jpeg_block(channel, table, factor):
    """Quantises the 8x8 cosine transform of (N,H,W) in grey levels, H and W multiples of 8."""
    k = torch.arange(8, device=channel.device)
    cosine = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2               # (frequency, pixel)
    cosine[0] /= math.sqrt(2)
    n, h, w = channel.shape
    blocks = channel.view(n, h // 8, 8, w // 8, 8).transpose(2, 3) - 128          # (N,H/8,W/8,8,8)
    step = table * factor[..., None]                                              # (N,1,1,8,8)
    coefficients = (cosine @ blocks @ cosine.T / step).round() * step
    blocks = cosine.T @ coefficients @ cosine + 128
    return blocks.transpose(2, 3).reshape(n, h, w)


def jpeg(x, quality):
    """JPEG's losses without its entropy coding: 4:2:0 chroma, 8x8 cosine transform, quantisation.

    quality: 1..99. As published: tables transposed (row = horizontal frequency), factor 50/q below
    50 and 2 - q/50 above, neither clipped nor rounded; sizes padded with black to multiples of 16.
    """
    n, _, h, w = x.shape
    quality = per_image(quality, x)
    factor = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    luma = torch.tensor(_LUMA, dtype=x.dtype, device=x.device).T
    chroma = torch.full((8, 8), 99.0, dtype=x.dtype, device=x.device)
    chroma[:4, :4] = torch.tensor(_CHROMA, dtype=x.dtype, device=x.device).T
    r, g, b = (F.pad(x, (0, -w % 16, 0, -h % 16)) * 255).unbind(1)                # each (N,H,W)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb = -0.168736 * r - 0.331264 * g + 0.5 * b + 128
    cr = 0.5 * r - 0.418688 * g - 0.081312 * b + 128
    y = _jpeg_block(y, luma, factor)
    cb, cr = (_jpeg_block(F.avg_pool2d(c, 2), chroma, factor) - 128 for c in (cb, cr))
    cb, cr = (c.repeat_interleave(2, 1).repeat_interleave(2, 2) for c in (cb, cr))
    rgb = torch.stack((y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb), 1)
    return quantize(rgb[:, :, :h, :w] / 255)


# OpenCV's fixed Gaussian kernels, by width; 11 follows from its rule for sigma.
_SIGMA_11 = 0.3 * ((11 - 1) / 2 - 1) + 0.8
_WIDTH_TAPS = {3: (1, 2), 5: (1, 4, 6), 7: (1, 3.5, 7, 9), 9: (1, 3.25, 7.5, 12.75, 15),
               11: tuple(math.exp(-0.5 * (k / _SIGMA_11) ** 2) for k in range(-5, 1))}


def _width_taps(device):
    """(5,11): the Gaussian kernels of widths 3, 5, 7, 9, 11, centred, each with sum one."""
    rows = [(0,) * (6 - len(left)) + left + left[-2::-1] + (0,) * (6 - len(left))
            for left in _WIDTH_TAPS.values()]
    rows = torch.tensor(rows, dtype=torch.float64, device=device)
    return rows / rows.sum(1, keepdim=True)


def streak_kernels(width, length, angle):
    """The rain streaks: a diagonal line turned by angle - 45 degrees, shrunk, thickened.

    width: 3, 5, 7, 9 or 11; length: 20..40; angle: degrees, 0 is vertical; all (N,).
    Returns (N,40,40) in float64, the kernel's anchor (length // 2) at [20,20].
    Mirrors `rain_blur` of the published script: OpenCV's getRotationMatrix2D, warpAffine (source
    coordinates in steps of 1/32, bilinear, zero outside), GaussianBlur (reflect-101 borders).
    """
    length, angle = length.double(), (angle.double() - 45) * math.pi / 180
    scale = 1 - length / 100
    # The inverse map: from a pixel of the kernel to the point of the diagonal it shows.
    a, b = (torch.cos(angle) / scale)[:, None, None], (torch.sin(angle) / scale)[:, None, None]
    centre = (length / 2)[:, None, None]
    at = torch.arange(-20, 20, device=length.device).double() + length[:, None] // 2         # (N,40)
    y, x = at[:, :, None], at[:, None, :]                  # pixel coordinates inside each kernel
    def fixed(value):                                      # OpenCV's fixed point, 10 bits
        return (value * 1024).round()
    u = ((fixed(a * x) + fixed(-b * y + (1 - a) * centre + b * centre) + 16) / 32).floor() / 32
    v = ((fixed(b * x) + fixed(a * y + (1 - a) * centre - b * centre) + 16) / 32).floor() / 32
    streak = torch.zeros_like(u)
    for i in (0, 1):                                       # bilinear: the four pixels around (u,v)
        for j in (0, 1):
            row, col = v.floor() + i, u.floor() + j
            on_diagonal = (row == col) & (row >= 0) & (row < length[:, None, None])
            weight = (1 - (v - row).abs()) * (1 - (u - col).abs())
            streak += weight * on_diagonal
    inside = (at >= 0) & (at < length[:, None])
    streak = streak * inside[:, :, None] * inside[:, None, :]
    # The blur as a matrix: row p of `blur` holds the taps that fall on each pixel, borders reflected.
    taps = _width_taps(length.device)[(width.long() - 3) // 2]                    # (N,11)
    last = length[:, None, None] - 1
    reach = at[:, :, None] + torch.arange(-5, 6, device=length.device)            # (N,40,11)
    reach = last - (last - reach.abs()).abs()
    blur = ((reach[..., None] == at[:, None, None, :]) * taps[:, None, :, None]).sum(2)      # (N,40,40)
    blur = blur * inside[:, :, None]
    return blur @ streak @ blur.mT


def rain_streaks(field, density, width, length, angle):
    """A layer of rain: (N,1,H,W) in [0,1], in steps of 1/255, 1 at each image's brightest spot.

    field: (N,1,H,W) uniform random numbers in [0,256); a drop falls where it is among the largest
    density/100 of 256. density: 50..149; width: 3..11 odd, length: 20..40, both in pixels; angle:
    -45..44 degrees. Normalised over the whole field: give the whole image's, not a small crop's.
    """
    n, _, h, w = field.shape
    density = per_image(density, field, torch.float64)
    width, length, angle = (per_image(p, field).flatten() for p in (width, length, angle))
    drops = torch.where(field.double() >= 256 - density / 100, field.double(), 0)
    spot = torch.tensor(((0, 0.1, 0), (0.1, 8, 0.1), (0, 0.1, 0)), dtype=torch.float64, device=field.device)
    drops = F.conv2d(reflect_pad(drops, 1, 1, 1, 1), spot[None, None])
    # Correlation with a 40 x 40 kernel, through the Fourier transform: its cost hardly grows with size.
    drops = reflect_pad(drops, 20, 19, 20, 19)[:, 0]                              # (N,H+39,W+39)
    size = [_fast_size(s) for s in drops.shape[1:]]
    kernel = torch.fft.rfft2(streak_kernels(width, length, angle), s=size).conj() # conj: no flip
    layer = torch.fft.irfft2(torch.fft.rfft2(drops, s=size) * kernel, s=size)[:, None, :h, :w]
    low, high = layer.amin((2, 3), keepdim=True), layer.amax((2, 3), keepdim=True)
    return ((layer - low) / (high - low).clamp_min(1e-12) * 255 + 1e-9).floor().float() / 255


def _fast_size(n):
    """The next size whose only prime factors are 2, 3 and 5, which Fourier transforms like."""
    return next(m for m in range(n, 2 * n) if 60 ** 12 % m == 0)


def add_rain(x, streaks):
    """x: (N,3,H,W), streaks: (N,1,H,W), both in [0,1]: their sum, clipped."""
    return quantize(x + streaks)


def add_haze(x, depth, airlight, beta, depth_max=None):
    """x t + airlight (1 - t) with t = exp(-beta d): the atmospheric scattering model.

    depth: (N,1,h,w), any unit, larger is farther; enlarged to x's size where it is smaller (bilinear).
    d = depth / depth_max; depth_max is the WHOLE image's maximum: give it when x is a crop.
    airlight: brightness of the haze, in [0,1]; beta: its density.
    """
    if depth.shape[2:] != x.shape[2:]:
        depth = F.interpolate(depth, x.shape[2:], mode="bilinear")
    depth_max = depth.amax((2, 3), keepdim=True) if depth_max is None else per_image(depth_max, x)
    transmission = torch.exp(-per_image(beta, x) * depth / depth_max)
    return quantize(x * transmission + per_image(airlight, x) * (1 - transmission))


def darken(x, gamma):
    """x ** gamma: low light."""
    return quantize(x ** per_image(gamma, x))


def bicubic_x4(x):
    """A quarter of the size and back, both bicubic without antialiasing (torch's own)."""
    small = F.interpolate(x, [max(s // 4, 1) for s in x.shape[2:]], mode="bicubic")
    return quantize(F.interpolate(small, x.shape[2:], mode="bicubic"))
