"""MiOIR in one file: five restoration backbones, their common prompt path, the task classifier.

One network restores seven kinds of degraded image. Two ideas make that work:
  * sequential learning: add the tasks one after another, keeping the earlier ones  (see train.py)
  * prompt learning: tell the network which task it faces                      (PromptPath, below)

    model = build_model("restormer", prompt="ep")          # 26.5 M parameters, the paper's size
    y = model(x, task=torch.tensor([TASKS.index("rain")])) # x, y: (1,3,H,W) in [0,1], H and W / 64
    y = restore(model, x, task)                            # the same for any height and width
    model, info = load_model("run/last.pt")                # a checkpoint rebuilds its own model

Papers: MiOIR (Kong et al., arXiv 2401.03379); SRResNet (Ledig et al. 2017), SwinIR (Liang et al.
2021), Restormer (Zamir et al. 2022), Uformer (Wang et al. 2022), PromptIR (Potlapalli et al. 2023).

Glossary: the paper's symbol -> our name
    I_LQ, I_GT      x (or lq), gt     degraded and true image                   (N,3,H,W) in [0,1]
    I_SR            y                 restored image                        (N,3,H,W), not clamped
    P_exp           prompts           seven fixed random images, one per task   (7,128,128)
    P_ada           x                 the degraded image as its own prompt
    F_ext           Extractor         prompt image -> 64 numbers                (N,64)
    gamma, beta     scale, shift      f -> f * scale + shift + f at each site   (N,C,1,1)
    -M, -S          mixed, --seq      all tasks at once, or one after another
    -EP, -AP        "ep", "ap"        explicit or adaptive prompt
Shapes: N images, C channels, H x W pixels; feature maps are (N,C,H,W) between modules and
(N,H,W,C) inside window attention, where the linear layers want channels last.
"""
import functools
import re

import torch
from torch import nn
from torch.nn import functional as F

TASKS = ("blur", "noise", "jpeg", "rain", "haze", "dark", "sr")     # rows of prompts and of logits
ARCHS = ("srresnet", "swinir", "restormer", "uformer", "promptir")


# ---- The prompt path (paper, Section 3.3): one module for every backbone -------------------------
class Extractor(nn.Module):
    """F_ext: what a prompt image has to say, in 64 numbers. Mirrors `F_ext`, as published."""
    def __init__(self, in_channels, width):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=1)  # 1, not 3: as published
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, p):
        """p: (N,1 or 3,H,W) -> (N,64)."""
        if p.shape[2] * p.shape[3] > 2 ** 22 and not torch.is_grad_enabled():
            return self.mean_by_strips(p)          # a photo as its own prompt: memory stays bounded
        f = F.relu(self.conv1(p))                       # (N,64,~H/2,~W/2)
        f = F.relu(self.conv2(f))                       # (N,64,~H/4,~W/4)
        f = F.relu(self.conv3(f))                       # (N,64,~H/8,~W/8)
        return f.mean((2, 3))                           # (N,64): the global mean makes any size fit

    def mean_by_strips(self, p, rows=32):
        """The same, with no more than `rows` rows of the last map in memory at a time."""
        def strip(convs, first, last):                # rows first..last-1 of the last conv's output
            *before, conv = convs
            low, high = 2 * first - 1, 2 * (last - 1) - 1 + conv.kernel_size[0]
            size = height(before)
            low_in, high_in = max(low, 0), min(high, size)
            f = strip(before, low_in, high_in) if before else p[:, :, low_in:high_in]
            f = F.pad(f, (1, 1, low_in - low, high - high_in))
            return F.relu(F.conv2d(f, conv.weight, conv.bias, stride=2))

        def height(convs):                              # of the output of these convs
            size = p.shape[2]
            for conv in convs:
                size = (size + 2 - conv.kernel_size[0]) // 2 + 1
            return size
        convs = (self.conv1, self.conv2, self.conv3)
        size = height(convs)
        tops = range(0, size, rows)
        means = [strip(convs, top, min(top + rows, size)).mean(3).sum(2) for top in tops]
        return sum(means) / size


class PromptPath(nn.Module):
    """Turns a prompt image into a scale and a shift for each site of a backbone.
    sites: {name: (extractor number, channels)}. A backbone may share one extractor among all its
    sites (SRResNet, SwinIR) or give each depth its own (Restormer, Uformer)."""
    def __init__(self, in_channels, sites, width):
        super().__init__()
        self.extractor_of = {site: number for site, (number, _) in sites.items()}
        self.extract = nn.ModuleList(Extractor(in_channels, width)
                                     for _ in range(1 + max(self.extractor_of.values())))
        self.scale = nn.ModuleDict({site: nn.Linear(width, c) for site, (_, c) in sites.items()})
        self.shift = nn.ModuleDict({site: nn.Linear(width, c) for site, (_, c) in sites.items()})

    def forward(self, p, rows=slice(None)):
        """p: (M,1 or 3,H,W) prompt images -> a function modulate(site, f), (N,C,H,W) -> (N,C,H,W).
        rows: which prompt image belongs to each of the N images; by default the same, in order."""
        features = [extract(p)[rows] for extract in self.extract]                 # each (N,64)

        def modulate(site, f):
            z = features[self.extractor_of[site]]
            scale, shift = self.scale[site](z), self.shift[site](z)               # (N,C)
            return f * (1 + scale[:, :, None, None]) + shift[:, :, None, None]    # = f*s + b + f
        return modulate


def unmodulated(site, f):
    """What a backbone without a prompt applies at each site: nothing."""
    return f


def random_prompts(seed=0):
    """Seven fixed prompt images, uniform in [0,1): (7,128,128). That they differ is enough for a
    long run. The published ones: a file, type7.npy."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(TASKS), 128, 128, generator=generator, device="cpu")


class Backbone(nn.Module):
    """What the five backbones share: y = body(x, modulate), where the prompt decides modulate.
    `multiple`: height and width must be multiples of it (`restore` pads). `square`: the published
    test protocol also pads to a square. `overlap`: what neighbouring tiles share in `restore`;
    `context`: how far the border of a tile is wrong, so that `restore` throws it away."""
    multiple, square, overlap, context = 1, False, 64, 16

    def __init__(self, prompt, sites, prompt_width):
        super().__init__()
        if prompt not in (None, "ep", "ap"):
            raise ValueError(f"unknown prompt {prompt!r}: choose None, 'ep' (explicit) or 'ap'")
        self.prompt = prompt
        if prompt is not None:
            self.path = PromptPath({"ep": 1, "ap": 3}[prompt], sites, prompt_width)
        if prompt == "ep":
            self.register_buffer("prompts", random_prompts().to(torch.get_default_device()))

    def modulation(self, x, task=None):
        """The function modulate(site, f) for these images; computed once, it serves every tile.
        x: (N,3,H,W), needed by "ap". task: needed by "ep"; LongTensor (N,) of rows of TASKS, or
        FloatTensor (N,7) of weights: the prompt is then that weighted sum of the seven images."""
        if self.prompt is None:
            return unmodulated
        if self.prompt == "ap":                          # F_ext needs 5 pixels; fewer are reflected
            return self.path(reflect_pad(x, 0, max(5 - x.shape[3], 0), 0, max(5 - x.shape[2], 0)))
        if task is None:
            raise ValueError("an 'ep' model needs task: a LongTensor (N,) of rows of TASKS, "
                             "or weights (N,7)")
        if task.is_floating_point():
            mixed = torch.einsum("nt,thw->nhw", task.to(self.prompts), self.prompts)
            return self.path(mixed[:, None])                                      # (N,1,128,128) in
        if task.device.type == "cpu":                   # read each prompt once, however many images
            present, task = task.unique(return_inverse=True)
            return self.path(self.prompts[present][:, None], task)
        if len(task) > len(self.prompts):                 # a GPU would wait for what unique() finds
            return self.path(self.prompts[:, None], task)
        return self.path(self.prompts[task][:, None])

    def forward(self, x, task=None, modulate=None):
        """x: (N,3,H,W) in [0,1], H and W multiples of self.multiple -> y: (N,3,H,W), not clamped.
        task as in `modulation`; modulate, if given, replaces what `modulation` would return."""
        return self.body(x, modulate or self.modulation(x, task))


# ---- SRResNet: 16 residual blocks without batch norm ("MSRResNet" of BasicSR, at scale 1) --------
def conv3x3(in_channels, out_channels, bias=True):
    """A 3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


class ResidualBlock(nn.Module):
    """EDSR's block, without batch norm: f + conv(relu(conv(f))), (N,width,H,W), then modulated."""
    def __init__(self, width):
        super().__init__()
        self.conv1 = conv3x3(width, width)
        self.conv2 = conv3x3(width, width)

    def forward(self, f, modulate):
        return modulate(f + self.conv2(F.relu(self.conv1(f))))


class SRResNet(Backbone):
    """Sites (18): the blocks' outputs, activated conv_hr, conv_last before the input is added."""
    context = 35                   # receptive field: 1 + 16 x 2 + 1 + 1 convolutions of radius 1
    overlap = 80                   # two contexts and some room to blend: tiled equals whole

    def __init__(self, prompt=None, width=64, blocks=16, prompt_width=64):
        sites = {site: (0, width) for site in (*(f"block{i + 1}" for i in range(blocks)), "hr")}
        super().__init__(prompt, sites | {"last": (0, 3)}, prompt_width)
        self.conv_first = conv3x3(3, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.conv_hr = conv3x3(width, width)
        self.conv_last = conv3x3(width, 3)
        scaled = [module for module in self.blocks.modules() if isinstance(module, nn.Conv2d)]
        if prompt is None:             # as published: with a prompt, these three start as torch does
            scaled += [self.conv_first, self.conv_hr, self.conv_last]
        for conv in scaled:
            nn.init.kaiming_normal_(conv.weight)
            conv.weight.data.mul_(0.1)                  # small residuals: training starts at y = x
            nn.init.zeros_(conv.bias)

    def body(self, x, modulate):
        f = F.leaky_relu(self.conv_first(x), 0.1)                                 # (N,64,H,W)
        for first in range(0, len(self.blocks), 4):
            f = self.four_blocks(f, first, modulate)
        f = modulate("hr", F.leaky_relu(self.conv_hr(f), 0.1))
        return modulate("last", self.conv_last(f)) + x                            # (N,3,H,W)

    def four_blocks(self, f, first, modulate):        # apart, so that recompute_blocks can wrap it
        for i, block in enumerate(self.blocks[first:first + 4], first):
            f = block(f, functools.partial(modulate, f"block{i + 1}"))
        return f


# ---- Window attention, shared by SwinIR and Uformer ----------------------------------------------
def to_windows(f, window):
    """(N,H,W,C) -> (N, windows, window*window, C), windows in reading order."""
    n, h, w, c = f.shape
    f = f.view(n, h // window, window, w // window, window, c)
    return f.transpose(2, 3).reshape(n, -1, window * window, c)


def from_windows(t, window, h, w):
    """(N, windows, window*window, C) -> (N,H,W,C)."""
    n, _, _, c = t.shape
    t = t.view(n, h // window, w // window, window, window, c)
    return t.transpose(2, 3).reshape(n, h, w, c)


def relative_position_index(window):
    """For each two pixels of a window, the row of the bias table: (window^2, window^2) of int64."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy = y[:, None] - y[None] + window - 1                                       # 0 .. 2*window - 2
    dx = x[:, None] - x[None] + window - 1
    return dy * (2 * window - 1) + dx


def shift_mask(h, w, window, shift, device):
    """After the cyclic shift, the last windows hold pixels that were no neighbours: -100 there,
    and not minus infinity, as published: the softmax leaves such pairs about e^-100.
    Returns (windows, window^2, window^2)."""
    def band(size):                # 0: untouched windows; 1 and 2: the two parts of the last one
        at = torch.arange(size, device=device)
        return (at >= size - window).long() + (at >= size - shift).long()
    region = 3 * band(h)[:, None] + band(w)[None]                                 # (H,W) in 0..8
    region = to_windows(region[None, :, :, None], window)[0, :, :, 0]          # (windows, window^2)
    return -100.0 * (region[:, :, None] != region[:, None, :])


def attend(q, k, v, bias, mask, fused):
    """softmax(q k^T / sqrt(c) + bias + mask) v. q, k, v: (N,windows,heads,T,c); bias: (heads,T,T);
    mask: (windows,T,T) or None -> (N,windows,heads,T,c). fused: in one kernel, best on a GPU;
    CPUs are faster without."""
    if not fused:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT                           # (N,windows,heads,T,T)
        scores += bias
        if mask is not None:
            scores += mask[:, None]
        return scores.softmax(-1) @ v
    windows, heads = q.shape[1:3]
    bias = bias[None] if mask is None else bias + mask[:, None]        # (1 or windows,heads,T,T)
    bias = bias.to(q.dtype).expand(windows, -1, -1, -1).flatten(0, 1)[None]       # (1,w*heads,T,T)
    out = F.scaled_dot_product_attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), bias)
    return out.unflatten(1, (windows, heads))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window, with a learned bias per relative position."""
    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.register_buffer("index", relative_position_index(window), persistent=False)

    def forward(self, t, mask=None):
        """t: (N,windows,T,C), T = window^2; mask: (windows,T,T) or None -> (N,windows,T,C)."""
        bias = self.bias_table[self.index].permute(2, 0, 1)                       # (heads,T,T)
        if t.device.type != "cpu":
            return self.windows(t, bias, mask, fused=True)
        few = max(32 // len(t), 1)                 # what a few windows need stays in a CPU's cache
        masks = [None] * t.shape[1] if mask is None else mask.split(few)
        return torch.cat([self.windows(part, bias, part_mask, fused=False)
                          for part, part_mask in zip(t.split(few, 1), masks)], 1)

    def windows(self, t, bias, mask, fused):
        """The same for these windows together; bias: (heads,T,T), fused: as in `attend`."""
        qkv = self.qkv(t).unflatten(-1, (3, self.heads, -1))              # (N,windows,T,3,heads,c)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)                    # each (N,windows,heads,T,c)
        out = attend(q, k, v, bias, mask, fused)
        return self.project(out.transpose(2, 3).flatten(3))                       # (N,windows,T,C)


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the whole branch of an image with this probability."""
    def __init__(self, probability):
        super().__init__()
        self.probability = probability

    def forward(self, f):
        if not self.training or self.probability == 0:
            return f
        keep = 1 - self.probability
        return f * (f.new_empty(f.shape[0], *[1] * (f.ndim - 1)).bernoulli_(keep) / keep)


class WindowBlock(nn.Module):
    """One transformer block on (N,H,W,C). Swin's, with an MLP; or Uformer's LeWin, with LeFF and,
    in the decoder, a modulator: learned numbers added to every window."""
    def __init__(self, dim, heads, window, shift, drop_path, mlp, modulator=False):
        super().__init__()
        self.window, self.shift = window, shift
        self.modulator = nn.Parameter(torch.randn(window ** 2, dim)) if modulator else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, f, mask):
        """f: (N,H,W,C); mask: the shift mask of this size, used by shifted blocks."""
        _, h, w, _ = f.shape
        t = self.norm1(f)
        if self.shift:
            t = t.roll((-self.shift, -self.shift), (1, 2))
        t = to_windows(t, self.window)
        if self.modulator is not None:
            t = t + self.modulator
        t = from_windows(self.attn(t, mask if self.shift else None), self.window, h, w)
        if self.shift:
            t = t.roll((self.shift, self.shift), (1, 2))
        f = f + self.drop_path(t)
        return f + self.drop_path(self.mlp(self.norm2(f)))


class WindowStage(nn.Module):
    """A run of blocks at one resolution, (N,C,H,W) -> (N,C,H,W); every second block is shifted."""
    def __init__(self, dim, heads, window, drop_paths, make_mlp, modulator=False):
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(
            WindowBlock(dim, heads, window, (i % 2) * (window // 2), drop, make_mlp(dim), modulator)
            for i, drop in enumerate(drop_paths))

    def forward(self, f):
        f = f.permute(0, 2, 3, 1).contiguous()                                    # (N,H,W,C)
        mask = shift_mask(*f.shape[1:3], self.window, self.window // 2, f.device).to(f.dtype)
        for block in self.blocks:
            f = block(f, mask)
        return f.permute(0, 3, 1, 2)


def init_linears(model):
    """SwinIR and Uformer start their linear layers, prompts' too, at a truncated normal of 0.02."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


# ---- SwinIR: groups of Swin blocks at full resolution, between two convolutions ------------------
class Mlp(nn.Sequential):
    """The feed-forward half of a Swin block, on channels-last (...,dim); hidden: ratio * dim."""
    def __init__(self, dim, ratio):
        hidden = int(dim * ratio)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class SwinGroup(nn.Module):
    """RSTB (SwinIR, Section 3.2): Swin blocks, a convolution, a skip around both."""
    def __init__(self, dim, heads, window, drop_paths, mlp_ratio):
        super().__init__()
        self.stage = WindowStage(dim, heads, window, drop_paths, lambda d: Mlp(d, mlp_ratio))
        self.conv = conv3x3(dim, dim)

    def forward(self, f):
        return f + self.conv(self.stage(f))


class SwinIR(Backbone):
    """Sites (9): the six groups' outputs, conv_after_body after its skip, the last two convs.
    Mirrors the published SwinIR with upsampler "pixelshuffle" at scale 1: nothing is enlarged, and
    the input is not added to the output."""
    multiple = 8

    def __init__(self, prompt=None, dim=180, depths=(6,) * 6, heads=6, window=8, mlp_ratio=2,
                 drop_path=0.1, width=64, prompt_width=64):
        groups = [f"group{i + 1}" for i in range(len(depths))]
        sites = {site: (0, dim) for site in (*groups, "after_body")}
        sites |= {"before_upsample": (0, width), "last": (0, 3)}
        super().__init__(prompt, sites, prompt_width)
        drops = torch.linspace(0, drop_path, sum(depths), device="cpu").split(depths)
        self.conv_first = conv3x3(3, dim)
        self.norm_first = LayerNorm2d(dim)
        self.groups = nn.ModuleList(SwinGroup(dim, heads, window, d.tolist(), mlp_ratio)
                                    for d in drops)
        self.norm_last = LayerNorm2d(dim)
        self.conv_after_body = conv3x3(dim, dim)
        self.conv_before_upsample = conv3x3(dim, width)
        self.conv_last = conv3x3(width, 3)
        self.register_buffer("mean", torch.tensor((0.4488, 0.4371, 0.4040)).view(1, 3, 1, 1),
                             persistent=False)
        init_linears(self)

    def body(self, x, modulate):
        shallow = self.conv_first(x - self.mean)                                  # (N,180,H,W)
        f = self.norm_first(shallow)
        for i, group in enumerate(self.groups):
            f = modulate(f"group{i + 1}", group(f))
        f = modulate("after_body", self.conv_after_body(self.norm_last(f)) + shallow)
        f = F.leaky_relu(self.conv_before_upsample(f), 0.01)
        f = modulate("before_upsample", f)                                        # (N,64,H,W)
        return modulate("last", self.conv_last(f)) + self.mean                    # (N,3,H,W)


# ---- Restormer: a U-shape whose attention runs over channels, so its cost is linear in the pixels
class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (N,C,H,W), through torch's own kernel."""
    def forward(self, f):
        return super().forward(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelAttention(nn.Module):
    """MDTA (Restormer, Section 3.1): heads of c channels attend to each other over all pixels."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=False)
        self.project = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, f):
        n, c, h, w = f.shape
        qkv = self.dwconv(self.qkv(f))                                            # (N,3C,H,W)
        q, k, v = qkv.reshape(n, 3, self.heads, c // self.heads, h * w).unbind(1) # (N,heads,c,HW)
        # The paper normalises q and k along the pixels; dividing the small c x c product by the
        # two lengths is the same and spares two maps of full size.
        length_q = q.norm(dim=-1, keepdim=True).clamp_min(1e-12)                  # (N,heads,c,1)
        length_k = k.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        attention = (q @ k.mT) / (length_q * length_k.mT) * self.temperature      # (N,heads,c,c)
        out = attention.softmax(-1) @ v                                           # (N,heads,c,HW)
        return self.project(out.reshape(n, c, h, w))


class GatedFeedForward(nn.Module):
    """GDFN (Restormer, Section 3.2): gelu(one half) gates the other half."""
    def __init__(self, dim, expansion):
        super().__init__()
        hidden = int(dim * expansion)
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, f):
        gate, value = self.dwconv(self.project_in(f)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class RestormerBlock(nn.Module):
    """Attention over channels, then the gated feed-forward, each around a skip; (N,dim,H,W)."""
    def __init__(self, dim, heads, expansion):
        super().__init__()
        self.norm1 = LayerNorm2d(dim)
        self.attn = ChannelAttention(dim, heads)
        self.norm2 = LayerNorm2d(dim)
        self.ffn = GatedFeedForward(dim, expansion)

    def forward(self, f):
        f = f + self.attn(self.norm1(f))
        return f + self.ffn(self.norm2(f))


def half(dim):
    """(N,dim,H,W) -> (N,2*dim,H/2,W/2)."""
    return nn.Sequential(conv3x3(dim, dim // 2, bias=False), nn.PixelUnshuffle(2))


def double(dim):
    """(N,dim,H,W) -> (N,dim/2,2H,2W)."""
    return nn.Sequential(conv3x3(dim, 2 * dim, bias=False), nn.PixelShuffle(2))


class Restormer(Backbone):
    """Sites (6): latent, decoder 3, 2, 1 and refinement outputs, output conv before the residual.
    Encoder and decoder levels are listed from the finest (1) to the coarsest (3)."""
    multiple = 64                  # the U-shape needs 8; the published test protocol pads to 64

    def __init__(self, prompt=None, dim=48, blocks=(4, 6, 6, 8), refinement=4, heads=(1, 2, 4, 8),
                 expansion=2.66, prompt_width=64):
        d1, d2, d3, d4 = (dim * 2 ** i for i in range(4))                         # 48, 96, 192, 384
        super().__init__(prompt, {"latent": (0, d4), "decoder3": (1, d3), "decoder2": (2, d2),
                                  "decoder1": (2, d2), "refinement": (2, d2), "output": (3, 3)},
                         prompt_width)

        def level(i, width):
            return nn.Sequential(*(RestormerBlock(width, heads[i], expansion)
                                   for _ in range(blocks[i])))
        self.embed = conv3x3(3, d1, bias=False)
        self.encoder = nn.ModuleList((level(0, d1), level(1, d2), level(2, d3)))
        self.down = nn.ModuleList((half(d1), half(d2), half(d3)))
        self.latent = level(3, d4)
        self.up = nn.ModuleList((double(d2), double(d3), double(d4)))
        # Level 1 has no 1x1 convolution after its skip: it decodes at twice the encoder's width.
        self.reduce = nn.ModuleList((nn.Identity(), nn.Conv2d(d3, d2, 1, bias=False),
                                     nn.Conv2d(d4, d3, 1, bias=False)))
        self.decoder = nn.ModuleList((level(0, d2), level(1, d2), level(2, d3)))
        self.refinement = nn.Sequential(*(RestormerBlock(d2, heads[0], expansion)
                                          for _ in range(refinement)))
        self.output = conv3x3(d2, 3, bias=False)

    def before_up(self, i, f):
        """A place between decoder levels, used by PromptIR; Restormer leaves f as it is."""
        return f

    def body(self, x, modulate):
        f, skips = self.embed(x), []                                              # (N,48,H,W)
        for level, down in zip(self.encoder, self.down):
            f = level(f)
            skips.append(f)
            f = down(f)                                                        # ... (N,384,H/8,W/8)
        f = modulate("latent", self.latent(f))
        for i in (2, 1, 0):
            f = self.up[i](self.before_up(i, f))                                  # ... (N,48,H,W)
            f = self.reduce[i](torch.cat((f, skips[i]), 1))
            f = modulate(f"decoder{i + 1}", self.decoder[i](f))
        f = modulate("refinement", self.refinement(f))                            # (N,96,H,W)
        return modulate("output", self.output(f)) + x


# ---- Uformer-B: a U-shape of window attention ----------------------------------------------------
class LeFF(nn.Module):
    """Locally-enhanced feed-forward (Uformer, Section 3.2): an MLP with a depthwise convolution."""
    def __init__(self, dim, ratio=4):
        super().__init__()
        self.linear1 = nn.Linear(dim, ratio * dim)
        self.dwconv = nn.Conv2d(ratio * dim, ratio * dim, 3, padding=1, groups=ratio * dim)
        self.linear2 = nn.Linear(ratio * dim, dim)

    def forward(self, f):
        """(N,H,W,C) -> (N,H,W,C)."""
        f = F.gelu(self.linear1(f)).permute(0, 3, 1, 2)                           # (N,4C,H,W)
        return self.linear2(F.gelu(self.dwconv(f)).permute(0, 2, 3, 1))


class Uformer(Backbone):
    """Sites (6): bottleneck, decoder 0 to 3, output projection before the input is added.
    Levels run encoder 0..3, bottleneck, decoder 0..3. The published code takes the square root of
    the number of tokens for the height, so it runs on squares alone; ours keeps both sides."""
    multiple, square = 128, True   # four halvings and a window of 8 at the bottom

    def __init__(self, prompt=None, dim=32, depths=(1, 2, 8, 8, 2, 8, 8, 2, 1),
                 heads=(1, 2, 4, 8, 16, 16, 8, 4, 2), window=8, drop_path=0.1, prompt_width=64):
        c = [dim * 2 ** i for i in range(5)]                                      # 32 .. 512
        sites = {"bottleneck": (0, c[4]), "decoder0": (0, c[4]), "decoder1": (1, c[3]),
                 "decoder2": (2, c[2]), "decoder3": (3, c[1]), "output": (4, 3)}
        super().__init__(prompt, sites, prompt_width)
        # Drop path grows along the encoder, holds at the bottom, and shrinks along the decoder.
        rise = torch.linspace(0, drop_path, sum(depths[:4]), device="cpu").tolist()
        drops = iter(rise + [drop_path] * depths[4] + (rise[::-1] + [0.0] * sum(depths[5:])))

        def stage(i, width):
            drop_paths = [next(drops) for _ in range(depths[i])]
            return WindowStage(width, heads[i], window, drop_paths, LeFF, modulator=i > 4)
        self.input = conv3x3(3, c[0])
        self.encoder = nn.ModuleList(stage(i, c[i]) for i in range(4))
        self.down = nn.ModuleList(nn.Conv2d(c[i], c[i + 1], 4, stride=2, padding=1)
                                  for i in range(4))
        self.bottleneck = stage(4, c[4])
        # A decoder level works at twice its encoder's width: the skip is joined, never reduced.
        widths = [c[4], c[4], c[3], c[2], c[1]]                                # coming into each up
        self.up = nn.ModuleList(nn.ConvTranspose2d(widths[i], c[3 - i], 2, stride=2)
                                for i in range(4))
        self.decoder = nn.ModuleList(stage(5 + i, widths[i + 1]) for i in range(4))
        self.output = conv3x3(c[1], 3)
        init_linears(self)

    def body(self, x, modulate):
        f, skips = F.leaky_relu(self.input(x), 0.01), []                          # (N,32,H,W)
        for level, down in zip(self.encoder, self.down):
            f = level(f)
            skips.append(f)
            f = down(f)                                                      # ... (N,512,H/16,W/16)
        f = modulate("bottleneck", self.bottleneck(f))
        for i, (up, level) in enumerate(zip(self.up, self.decoder)):
            f = torch.cat((up(f), skips.pop()), 1)                                # ... (N,64,H,W)
            f = modulate(f"decoder{i}", level(f))
        return modulate("output", self.output(f)) + x


# ---- PromptIR: Restormer that makes its own prompts ----------------------------------------------
class PromptGenerator(nn.Module):
    """PGM (PromptIR, Section 3.1): mixes five learned maps by what the features look like."""
    def __init__(self, dim, prompt_dim, size, length=5):
        super().__init__()
        self.components = nn.Parameter(torch.rand(1, length, prompt_dim, size, size))
        self.linear = nn.Linear(dim, length)
        self.conv = conv3x3(prompt_dim, prompt_dim, bias=False)

    def forward(self, f):
        """(N,dim,H,W) -> (N,prompt_dim,H,W)."""
        weights = self.linear(f.mean((2, 3))).softmax(1)                          # (N,5)
        prompt = torch.einsum("nl,lchw->nchw", weights, self.components[0])
        return self.conv(F.interpolate(prompt, f.shape[2:], mode="bilinear"))


class PromptInteraction(nn.Module):
    """PIM (PromptIR, Section 3.1): one transformer block over features and prompt together."""
    def __init__(self, dim, prompt_dim, out_dim, size, heads, expansion):
        super().__init__()
        self.generate = PromptGenerator(dim, prompt_dim, size)
        self.block = RestormerBlock(dim + prompt_dim, heads, expansion)
        self.reduce = nn.Conv2d(dim + prompt_dim, out_dim, 1, bias=False)

    def forward(self, f):
        return self.reduce(self.block(torch.cat((f, self.generate(f)), 1)))


class PromptIR(Restormer):
    """Restormer with a prompt before each way up; it takes no other prompt.
    Two oddities are the published code's: all three interaction blocks have level 3's number of
    heads, and the first comes down to 4*dim channels, so that the first way up gives 2*dim where
    Restormer's gives 4*dim. Its prompt maps have fixed sizes and are stretched to the features."""
    def __init__(self, prompt=None, dim=48, blocks=(4, 6, 6, 8), refinement=4, heads=(1, 2, 4, 8),
                 expansion=2.66, prompt_dims=(64, 128, 320), prompt_sizes=(64, 32, 16)):
        if prompt is not None:
            raise ValueError("promptir has prompts of its own: build it without a prompt")
        super().__init__(None, dim, blocks, refinement, heads, expansion)
        d2, d3, d4 = 2 * dim, 4 * dim, 8 * dim
        self.interact = nn.ModuleList(
            PromptInteraction(d_in, p, d_out, size, heads[2], expansion)
            for d_in, d_out, p, size in zip((d2, d3, d4), (d2, d3, d3), prompt_dims, prompt_sizes))
        self.up[2] = double(d3)                                                   # 4*dim -> 2*dim
        self.reduce[2] = nn.Conv2d(d2 + d3, d3, 1, bias=False)

    def before_up(self, i, f):
        return self.interact[i](f)


# ---- The task classifier: names the degradation when the user does not ---------------------------
class TaskClassifier(nn.Module):
    """(N,3,H,W) -> logits (N,7) in the order of TASKS; H and W at least 9.
    The published one ends in a softmax and is trained with a cross-entropy that applies another,
    which flattens the gradients; ours returns logits; their softmax equals the published output."""
    def __init__(self, width=128, high_pass=False):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=3), nn.LeakyReLU(0.1),                  # (N,128,H/3,W/3)
            nn.Conv2d(width, width, 3, stride=3), nn.LeakyReLU(0.1),              # (N,128,H/9,W/9)
            nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1), nn.Conv2d(width, 32, 1))
        self.head = nn.Linear(32, len(TASKS))
        if high_pass:       # a start for short runs: the first filters see texture, not brightness
            first = self.features[0].weight.data
            first.sub_(first.mean((2, 3), keepdim=True)).mul_(3)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


# ---- Building, saving, loading -------------------------------------------------------------------
MODELS = {"srresnet": SRResNet, "swinir": SwinIR, "restormer": Restormer, "uformer": Uformer,
          "promptir": PromptIR}


def build_model(arch, prompt=None, **overrides):
    """A backbone with fresh weights. arch: one of ARCHS; prompt: None, "ep" (explicit) or "ap"
    (adaptive). Defaults are the paper's sizes; overrides shrink them: dim=16, blocks=(1,1,1,1).
    Raises ValueError for an unknown arch, prompt or override, and for promptir with a prompt."""
    if arch not in MODELS:
        raise ValueError(f"unknown arch {arch!r}: choose one of {', '.join(MODELS)}")
    try:
        return MODELS[arch](prompt, **overrides)
    except TypeError as error:
        raise ValueError(f"{arch}: {error}") from None


def load_model(path, weights="raw", device="cpu", prompts=None):
    """A model from a file: one of ours, or one published with the paper. Returns (model, info).
    weights: "raw" (what the paper evaluates) or "ema". prompts: (7,128,128), for published "ep".
    info: {"arch", "prompt", "sizes", "published", ...}; ours adds what train.py stored beside it.
    Read with weights_only=True, so that a file can hold numbers but can't run code.
    Raises ValueError with one line that names the file and what is wrong with it."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:              # torch raises a dozen kinds for torn, foreign and hostile files
        raise ValueError(f"{path}: not a checkpoint (torn, not written by torch.save, or holding "
                         "more than plain weights)") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: not a checkpoint: it holds a {type(saved).__name__}")
    try:
        if "mioir" in saved:
            return _load_own(saved, weights, device)
        return _load_published(saved, weights, device, prompts)
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        reason = f"key {reason} is missing" if isinstance(error, KeyError) else reason
        raise ValueError(f"{path}: {reason}") from None


def _load_own(saved, weights, device):
    info = {key: value for key, value in saved.items() if key not in ("raw", "ema", "optimizer")}
    info["published"] = False
    if saved["arch"] == "classifier":
        model = TaskClassifier(**saved["sizes"])
    else:
        model = build_model(saved["arch"], saved["prompt"], **saved["sizes"])
    state = saved[weights]
    _check_names({name: value.shape for name, value in model.state_dict().items()},
                 {name: value.shape for name, value in state.items()})
    model.load_state_dict(state)
    return model.to(device).eval(), info


def _load_published(saved, weights, device, prompts):
    state = _unwrap(saved, weights)
    arch, prompt = identify_official(state)
    if prompt == "ep" and prompts is None:
        raise ValueError("a published 'ep' model needs the prompt images it was trained with, and "
                         "they are not in the file: give the published --prompts type7.npy")
    model = TaskClassifier() if arch == "classifier" else build_model(arch, prompt)
    load_official(model, state, prompts)
    return model.to(device).eval(), {"arch": arch, "prompt": prompt, "sizes": {}, "published": True}


# ---- The published checkpoints: their parameter names and ours -----------------------------------
# For each arch, (pattern in our name, text in the published name), applied from top to bottom.
# "a+b" in a published name: our tensor is the two published tensors, joined along axis 0.
_U_SHAPE = [*((rf"^encoder\.{i}\.", f"encoder_level{i + 1}.") for i in range(3)),
            *((rf"^decoder\.{i}\.", f"decoder_level{i + 1}.") for i in range(3)),
            *((rf"^down\.{i}\.", f"down{i + 1}_{i + 2}.body.") for i in range(3)),
            *((rf"^up\.{i}\.", f"up{i + 2}_{i + 1}.body.") for i in range(3)),
            *((rf"^reduce\.{i}\.", f"reduce_chan_level{i + 1}.") for i in (1, 2)),
            *((rf"^interact\.{i}\.generate\.", f"prompt{i + 1}.") for i in range(3)),
            *((rf"^interact\.{i}\.block\.", f"noise_level{i + 1}.") for i in range(3)),
            *((rf"^interact\.{i}\.reduce\.", f"reduce_noise_level{i + 1}.") for i in range(3)),
            (r"^embed\.", "patch_embed.proj."), (r"\.(norm\d)\.", r".\1.body."),
            (r"\.attn\.dwconv\.", ".attn.qkv_dwconv."),
            (r"\.attn\.project\.", ".attn.project_out."), (r"\.components$", ".prompt_param"),
            (r"(prompt\d)\.linear\.", r"\1.linear_layer."), (r"(prompt\d)\.conv\.", r"\1.conv3x3.")]
_WINDOWS = [(r"\.bias_table$", ".relative_position_bias_table"),
            (r"\.attn\.project\.", ".attn.proj.")]
_SITES = {  # published suffixes of prompt_scale and prompt_shift
    "srresnet": {**{f"block{i}": f"{i}" for i in range(1, 17)}, "hr": "hr", "last": "out"},
    "swinir": {"after_body": "_after_body", "before_upsample": "_before_upsample", "last": "_last"},
    "restormer": {"latent": "1", "decoder3": "2", "decoder2": "3", "decoder1": "4",
                  "refinement": "5", "output": "out"},
    "uformer": {"bottleneck": "0", **{f"decoder{i}": f"{i + 1}" for i in range(4)}, "output": "5"},
    "promptir": {}, "classifier": {}}
_NAMES = {
    "srresnet": [(r"^path\.extract\.0\.", "F_ext_net."), (r"^blocks\.", "body.")],
    "swinir": [(r"^path\.extract\.0\.", "F_ext_net."),
               *((rf"^path\.(scale|shift)\.group{i + 1}\.", rf"layers.{i}.prompt_\g<1>.")
                 for i in range(6)),
               (r"^norm_first\.", "patch_embed.norm."), (r"^norm_last\.", "norm."),
               (r"^conv_before_upsample\.", "conv_before_upsample.0."),
               (r"^groups\.(\d)\.stage\.", r"layers.\1.residual_group."),
               (r"^groups\.(\d)\.conv\.", r"layers.\1.conv."),
               (r"\.mlp\.0\.", ".mlp.fc1."), (r"\.mlp\.2\.", ".mlp.fc2."), *_WINDOWS],
    "restormer": _U_SHAPE,
    "uformer": [(r"^input\.", "input_proj.proj.0."), (r"^output\.", "output_proj.proj.0."),
                (r"^encoder\.(\d)\.", r"encoderlayer_\1."),
                (r"^decoder\.(\d)\.", r"decoderlayer_\1."),
                (r"^down\.(\d)\.", r"dowsample_\1.conv.0."),
                (r"^up\.(\d)\.", r"upsample_\1.deconv.0."),
                (r"^bottleneck\.", "conv."), (r"\.modulator$", ".modulator.weight"),
                (r"\.(linear\d|dwconv)\.", r".\1.0."), (r"\.qkv\.", ".qkv.to_q+to_kv."), *_WINDOWS],
    "promptir": _U_SHAPE,
    "classifier": [(r"^features\.", "CondNet."), (r"^head\.", "lastOut.")]}


def _official_names(arch, prompt, name):
    """Our parameter name -> the published names it is made of (one, or two to join)."""
    for site, suffix in _SITES[arch].items():
        name = re.sub(rf"^path\.(scale|shift)\.{site}\.", rf"prompt_\g<1>{suffix}.", name)
    if arch == "srresnet" and prompt:   # with a prompt, each block got a name and a list of its own
        name = re.sub(r"^blocks\.(\d+)\.", lambda m: f"body{int(m[1]) + 1}.0.", name)
    for pattern, published in _NAMES[arch]:
        name = re.sub(pattern, published, name)
    name = re.sub(r"^path\.extract\.(\d)\.", lambda m: f"F_ext_net{int(m[1]) + 1}.", name)
    if "to_q+to_kv" in name:
        return [name.replace("to_q+to_kv", part) for part in ("to_q", "to_kv")]
    return [name]


def _unwrap(saved, weights="raw"):
    """Out of {"params", "params_ema"}, the "module." prefix, and buffers that the sizes imply."""
    saved = saved.get("params" if weights == "raw" else "params_ema", saved)
    state = {key.removeprefix("module."): value for key, value in saved.items()}
    return {key: value for key, value in state.items()
            if not key.endswith(("relative_position_index", "attn_mask"))}


def identify_official(state_dict):
    """(arch, prompt) of a published state dict, from its keys alone; ValueError if it is none."""
    state = _unwrap(state_dict)
    marks = {"promptir": "prompt1.prompt_param", "restormer": "latent.0.attn.temperature",
             "uformer": "input_proj.proj.0.weight", "swinir": "conv_after_body.weight",
             "srresnet": "conv_hr.weight", "classifier": "CondNet.0.weight"}
    for arch, mark in marks.items():
        if mark in state:
            extractor = state.get("F_ext_net.conv1.weight", state.get("F_ext_net1.conv1.weight"))
            channels = None if extractor is None else extractor.shape[1]
            return arch, {None: None, 1: "ep", 3: "ap"}[channels]
    first = ", ".join(map(str, list(state)[:3])) or "nothing"
    raise ValueError(f"none of the published models: its keys begin with {first}")


def _check_names(ours, theirs):
    """Raises ValueError that names the keys that are missing, unexpected or of another shape."""
    faults = {"missing": [k for k in ours if k not in theirs],
              "unexpected": [k for k in theirs if k not in ours],
              "mis-shaped": [f"{k} {tuple(theirs[k])}, not {tuple(ours[k])}" for k in ours
                             if k in theirs and tuple(ours[k]) != tuple(theirs[k])]}
    said = [f"{fault}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
            for fault, keys in faults.items() if keys]
    if said:
        raise ValueError("weights do not fit the model; " + "; ".join(said))


def load_official(model, state_dict, prompts=None):
    """Loads published weights into one of our models (backbone or TaskClassifier), strictly.
    state_dict: {published name: tensor}, bare or wrapped in {"params", "params_ema"} or with a
    "module." prefix. prompts: (7,128,128) array, the images of a published "ep" model (type7.npy).
    Raises ValueError that names every missing, unexpected or mis-shaped key. Returns the model."""
    arch = {cls: name for name, cls in MODELS.items()}.get(type(model), "classifier")
    state = _unwrap(state_dict)
    own = {k: v for k, v in model.state_dict().items() if k != "prompts"}
    parts = {name: _official_names(arch, getattr(model, "prompt", None), name) for name in own}
    expected = {}
    for name, sources in parts.items():
        rows = own[name].shape[0]
        rows = [rows] if len(sources) == 1 else [rows // 3, rows // 3 * 2]
        expected |= {source: (row, *own[name].shape[1:]) for source, row in zip(sources, rows)}
    _check_names(expected, {k: v.shape for k, v in state.items()})
    for name, sources in parts.items():
        own[name].copy_(torch.cat([state[source] for source in sources]))
    if prompts is not None:
        if not hasattr(model, "prompts"):
            raise ValueError("prompts belong to 'ep' models; this one takes none")
        prompts = torch.as_tensor(prompts, dtype=torch.float32)
        if prompts.shape != model.prompts.shape:
            raise ValueError(f"prompts must be (7, 128, 128), not {tuple(prompts.shape)}")
        model.prompts.copy_(prompts)
    return model


# ---- Restoring images of any size ----------------------------------------------------------------
def reflect_pad(x, left, right, top, bottom):
    """Reflection without repeating the edge, like F.pad(mode="reflect"), but for any length:
    a 3-pixel image padded to 64 is reflected back and forth."""
    def reflected(size, before, after):
        period = max(2 * (size - 1), 1)
        at = torch.arange(-before, size + after, device=x.device) % period
        return torch.minimum(at, period - at) if size > 1 else at * 0
    h, w = x.shape[2:]
    if not (left or right or top or bottom):
        return x                                         # F.pad would copy it
    if max(left, right) < w and max(top, bottom) < h:
        return F.pad(x, (left, right, top, bottom), mode="reflect")               # the same, faster
    return x[:, :, reflected(h, top, bottom)][:, :, :, reflected(w, left, right)]


def pad_for(model, x, square):
    """Pads as the published test protocol does. Returns (padded, top, left): where the image is."""
    h, w = x.shape[2:]
    x = reflect_pad(x, 0, -w % model.multiple, 0, -h % model.multiple)            # right and bottom
    if not square:
        return x, 0, 0
    h, w = x.shape[2:]                 # then the shorter side, equally at both ends, to a square
    top, left = max(w - h, 0) // 2, max(h - w, 0) // 2
    return reflect_pad(x, left, left, top, top), top, left


@torch.no_grad()
def restore(model, x, task=None, tile=None, overlap=None, report=None):
    """Restores images of any height and width: pads, runs, cuts back; does not clamp.
    model: a backbone. x: (N,3,H,W) in [0,1]. task: as in Backbone.modulation. An "ap" model reads
    the padded image. tile: edge of square tiles in pixels (rounded up to the model's multiple), so
    that memory stays bounded; None runs the image whole. overlap: pixels that neighbours share, at
    least twice model.context; the default suits the backbone. report(done, tiles) is called after
    each tile. Returns y: (N,3,H,W)."""
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
        raise ValueError(f"restore takes (N,3,H,W) with H, W >= 1, not {tuple(x.shape)}")
    was_training = model.training
    model.eval()
    padded, top, left = pad_for(model, x, square=model.square and tile is None)
    modulate = model.modulation(padded, task)
    if tile is None:
        y = model(padded, modulate=modulate)
    else:
        overlap = model.overlap if overlap is None else overlap
        y = _restore_tiled(model, padded, modulate, tile, overlap, report)
    model.train(was_training)
    return y[:, :, top:top + x.shape[2], left:left + x.shape[3]]


def _restore_tiled(model, x, modulate, tile, overlap, report):
    """Tiles blended by trapezoids: weight 0 within model.context of an inner border, where a tile
    lacks its neighbours, then a ramp over the rest of the overlap, then one."""
    tile = max(-(-tile // model.multiple), 1) * model.multiple
    if not 2 * model.context < overlap < tile:
        raise ValueError(f"overlap must lie between {2 * model.context + 1} and {tile - 1}, "
                         f"not {overlap}")
    y, total = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
    corners = [(top, left) for top in _starts(x.shape[2], tile, overlap)
               for left in _starts(x.shape[3], tile, overlap)]
    for count, (top, left) in enumerate(corners, 1):
        window = (..., slice(top, top + tile), slice(left, left + tile))
        part = x[window]
        weight = (_trapezoid(top, part.shape[2], x.shape[2], overlap, model.context, x)[:, None]
                  * _trapezoid(left, part.shape[3], x.shape[3], overlap, model.context, x))
        y[window] += model(part, modulate=modulate) * weight
        total[window] += weight
        if report:
            report(count, len(corners))
    return y.div_(total)                               # in place: a large picture is large


def _starts(size, tile, overlap):
    """Where tiles begin along an axis; the last one ends at the image's edge."""
    return [*range(0, max(size - tile, 0), tile - overlap), max(size - tile, 0)]


def _trapezoid(start, length, size, overlap, context, like):
    """Weights (length,) of a tile along one axis; an edge of the image keeps full weight."""
    at = torch.arange(length, device=like.device, dtype=like.dtype)
    ramp = (overlap - 2 * context + 1)
    weight = torch.ones_like(at)
    if start > 0:
        weight = weight.minimum((at - context + 1) / ramp)
    if start + length < size:
        weight = weight.minimum((length - at - context) / ramp)
    return weight.clamp_min(0)
