"""MiOIR in one file: five restoration backbones, their common prompt path, the task classifier.

One network restores seven kinds of degraded image. Two ideas make that work:
  * sequential learning: add the tasks one after another, keeping the earlier ones  (see train.py)
  * prompt learning: tell the network which task it faces                      (PromptPath, below)

    model = build_model("restormer", prompt="ep")          # 26.5 M parameters, the paper's size
    y = model(x, task=torch.tensor([TASKS.index("rain")])) # x: (1,3,H,W) in [0,1], sides of 8 k
    y = restore(model, x, task)                            # the same for any height and width
    model, info = load_model("assets/restormer.pt")        # a checkpoint rebuilds its own model
    restore(model, "assets/coffee_noisy.png", "noise").save("out.png")  # or an array, a tensor
    restore(model, "assets/coffee_noisy.png", "auto")      # a classifier names the task, or none

Papers: MiOIR (Kong et al., arXiv 2401.03379); SRResNet (Ledig et al. 2017), SwinIR (Liang et al.
2021), Restormer (Zamir et al. 2022), Uformer (Wang et al. 2022), PromptIR (Potlapalli et al. 2023).

Glossary: the paper's symbol -> our name
    I_LQ, I_GT      x (or lq), gt     degraded and true image                   (N,3,H,W) in [0,1]
    I_SR            y                 restored image                        (N,3,H,W), not clamped
    P_exp           prompts           seven fixed random images, one per task   (7,128,128)
    P_ada           x                 the degraded image as its own prompt
    F_ext           Extractor         prompt image -> 64 numbers z              (N,64)
    gamma, beta     scale, shift      f' = scale * f + shift + f at each site   (N,C,1,1)
    -M, -S          mixed, --seq      all tasks at once, or one after another
    -EP, -AP        "ep", "ap"        explicit or adaptive prompt
Shapes: N images, C channels, H x W pixels; feature maps are (N,C,H,W) between modules and
(N,H,W,C) inside window attention, where the linear layers want channels last. The numbers in the
shape comments are the paper's sizes. A star * marks a site: a place where the prompt modulates f.

Reading order: the prompt path; SRResNet, the plainest backbone; Restormer and PromptIR (attention
over channels); SwinIR and Uformer (attention in windows); the classifier; restoring a whole image.
What comes after the banner "not in the paper" is kinds of pictures, the answer "none", tiles,
files, and the names of published weights.
"""
import contextlib
import functools
import math
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

TASKS = ("blur", "noise", "jpeg", "rain", "haze", "dark", "sr")     # rows of prompts and of logits
ARCHS = ("srresnet", "swinir", "restormer", "uformer", "promptir")


# ---- The prompt path (paper, Section 3.3): one module for every backbone -------------------------
#
# A prompt image P says which task it is. From it come, for every site of the backbone,
#
#     z = F_ext(P)  in R^64,     s = W_s z + a_s,     b = W_b z + a_b,     f' = s f + b + f.
#
# s and b have one number per channel of f. At s = b = 0 the backbone is untouched; but training
# does not start there: unlike adaLN-Zero of DiT, W is not zeroed, so f' differs from f at once.
#
# Why images, when seven tasks could share a table of 7 x 64 learned numbers? Because the same F_ext
# then serves both kinds of prompt: a fixed image per task ("ep"), or the degraded image itself
# ("ap"). (To mix two prompts is to mix their images: it is linear in pixels, not in z.)

class Extractor(nn.Module):
    """F_ext: what a prompt image has to say, in 64 numbers. Mirrors `F_ext`, as published."""
    def __init__(self, in_channels, width):
        super().__init__()
        # A padding of 3 would suit a 7 x 7 kernel; the published 1 loses a rim: 128 -> 62, not 64.
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, p):
        """p: (N,1 or 3,H,W), at least 5 x 5 -> z (N,64). The global mean makes any size fit."""
        f = F.relu(self.conv1(p))                                               # (N,64,62,62)
        f = F.relu(self.conv2(f))                                               # (N,64,31,31)
        f = F.relu(self.conv3(f))                                               # (N,64,16,16)
        return f.mean((2, 3))                                                   # (N,64)


class PromptPath(nn.Module):
    """Turns prompt images into a scale and a shift for each site of a backbone.

    sites: {name: (number of its extractor, channels there)}. All sites may share one F_ext
    (SRResNet, SwinIR), or several F_ext serve a few sites each (Restormer, Uformer).
    in_channels: 1 for explicit prompts, which are grey; 3 for a degraded image as its own prompt.
    """
    def __init__(self, in_channels, sites, width):
        super().__init__()
        self.extractor_of = {site: number for site, (number, _) in sites.items()}
        extractors = 1 + max(self.extractor_of.values())
        self.extract = nn.ModuleList(Extractor(in_channels, width) for _ in range(extractors))
        self.scale = nn.ModuleDict({site: nn.Linear(width, c) for site, (_, c) in sites.items()})
        self.shift = nn.ModuleDict({site: nn.Linear(width, c) for site, (_, c) in sites.items()})

    def forward(self, images, rows=None):
        """images: (M,1 or 3,H,W) -> {site: (scale, shift)}, each (N,C,1,1).

        rows: (N,) which of the M prompt images belongs to each of N pictures, so that a prompt
        that several of them share is read once. None: M = N, in the same order.
        """
        features = [extract(images) for extract in self.extract]                # each z (M,64)
        if rows is not None:
            features = [z[rows] for z in features]                              # each z (N,64)
        prompt = {}
        for site, number in self.extractor_of.items():
            z = features[number]
            scale = self.scale[site](z)                                         # s = W_s z + a_s
            shift = self.shift[site](z)                                         # b = W_b z + a_b
            prompt[site] = (scale[:, :, None, None], shift[:, :, None, None])
        return prompt


def modulate(f, prompt, site):
    """f' = s f + b + f, the paper's modulation. f: (N,C,H,W) at a site of the backbone.
    prompt: what PromptPath gave, {site: (scale, shift)}; None, for plain models, changes nothing.
    """
    if prompt is None:
        return f
    scale, shift = prompt[site]                                                 # (N,C,1,1)
    return f * (1 + scale) + shift


class Backbone(nn.Module):
    """What the five backbones share: y = body(x, prompt), and where the prompt comes from.

    A backbone lists its sites and writes `body`. Four attributes tell `restore` how to treat it:
    multiple: `restore` pads height and width to multiples of it, as published;
    square:   the published test protocol also pads to a square;
    overlap:  pixels that neighbouring tiles share;
    context:  how far from its border a tile is not to be trusted: SRResNet's is exact, the others
              see farther, up to the whole tile, and 16 is where little of that is left.
    """
    multiple, square, overlap, context = 1, False, 64, 16

    def __init__(self, prompt, sites, prompt_width):
        super().__init__()
        if prompt not in (None, "ep", "ap"):
            raise ValueError(f"unknown prompt {prompt!r}: choose None, 'ep' (explicit) or 'ap'")
        self.prompt = prompt
        if prompt is not None:
            self.path = PromptPath(1 if prompt == "ep" else 3, sites, prompt_width)
        if prompt == "ep":
            # What the images show means nothing, only that they differ; uniform noise, as
            # published. A buffer, so saved: another set of prompts would be another model.
            # (Drawn as float32 on the CPU, so that they are the same whatever defaults torch has.)
            images = torch.rand(len(TASKS), 128, 128, generator=torch.Generator().manual_seed(0),
                                dtype=torch.float32, device="cpu")
            self.register_buffer("prompts", torch.empty(images.shape).copy_(images))

    def read_prompt(self, x, task=None):
        """{site: (scale, shift)} for these images, or None for a plain model.

        x: (N,3,H,W), read by "ap". task, read by "ep": LongTensor (N,) of rows of TASKS, or
        FloatTensor (N,7) of weights: the prompt is then that weighted sum of the seven images.
        A task of (1,) or (1,7) is that of all N. ValueError for any other, see `check_task`.
        """
        if self.prompt is None:
            return None
        if self.prompt == "ap":
            return self.path(x)
        if task is None:
            raise ValueError("an 'ep' model needs a task: to restore, a name such as 'noise'; in "
                             "any call a LongTensor (N,) of rows of TASKS, or weights (N,7)")
        check_task(task, len(x), len(self.prompts))
        if task.is_floating_point():
            # (A model made before a task was added has fewer prompts: that task's weight is 0.)
            weights = task.to(self.prompts)[:, :len(self.prompts)]
            mixed = torch.einsum("nt,thw->nhw", weights, self.prompts)
            return self.path(mixed[:, None])                                    # (N,1,128,128) in
        task = task.long()                         # an index of uint8 would be taken for a mask
        if task.device.type == "cpu" and not torch.compiler.is_compiling():
            # Several images may share a task: F_ext reads each prompt that occurs once.
            present, rows = task.unique(return_inverse=True)
            return self.path(self.prompts[present][:, None], rows)              # (M,1,128,128) in
        # A GPU would have to be waited for to know which occur: all seven are read.
        return self.path(self.prompts[:, None], task)                           # (7,1,128,128) in

    def forward(self, x, task=None, prompt=None):
        """x: (N,3,H,W) in [0,1], H and W as `body` needs them -> y: (N,3,H,W), not clamped.
        task as in `read_prompt`; prompt, if given, is what `read_prompt` returned earlier."""
        if prompt is None:
            prompt = self.read_prompt(x, task)
        return self.body(x, prompt)


def check_task(task, images, count):
    """Raises ValueError unless the tensor `task` is one that `Backbone.read_prompt` takes, for so
    many images and so many prompts.

    Its numbers are looked at where they lie on a CPU. A GPU would have to be waited for in every
    iteration; there `restore` looks at them before it sends them.
    """
    mixture = task.is_floating_point()
    right = task.dtype != torch.bool and task.ndim == 1 + mixture and len(task) in (1, images)
    right = right and not (mixture and task.shape[1] not in (count, len(TASKS)))
    if right and task.device.type == "cpu" and not torch.compiler.is_compiling():
        right = task.min() >= 0 and (mixture or task.max() < count)            # NaN fails, too
        if mixture and right:                      # some weight, and none on prompts it lacks
            right = 0 < task.sum(1).min() and task.sum() < math.inf and not task[:, count:].any()
    if not right:
        shown = task.tolist() if task.numel() < 9 else f"of shape {tuple(task.shape)}"
        raise ValueError(f"task {shown}: for {images} images a model of {count} prompts takes a "
                         f"LongTensor (N,) of rows, 0 to {count - 1}, or a FloatTensor (N,{count}) "
                         "of weights, finite, not negative, not all zero; N may be 1")


# ---- SRResNet: 16 residual blocks at full resolution ("MSRResNet" of BasicSR, at scale 1) --------

class ResidualBlock(nn.Module):
    """f + conv(relu(conv(f))): the block of EDSR, without batch norm; (N,64,H,W)."""
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, f):
        return f + self.conv2(F.relu(self.conv1(f)))


class SRResNet(Backbone):
    """conv - 16 blocks* - conv* - conv* + x.  18 sites, one F_ext.

    Sites: the blocks' outputs, conv_hr after its activation, conv_last before the input is added.
    """
    context = 35                   # radius of what a pixel sees: 1 + 16 x 2 + 1 + 1 convolutions
    overlap = 80                   # two contexts and some room to blend: tiled equals whole

    def __init__(self, prompt=None, width=64, blocks=16, prompt_width=64):
        sites = {f"block{i + 1}": (0, width) for i in range(blocks)}
        sites["hr"] = (0, width)
        sites["last"] = (0, 3)
        super().__init__(prompt, sites, prompt_width)
        self.conv_first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.conv_hr = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, 3, 3, padding=1)
        # Small residuals: without a prompt, training starts near y = x. As published, the three
        # outer convolutions are scaled in that form alone; with a prompt they start as torch's do.
        scaled = [conv for block in self.blocks for conv in (block.conv1, block.conv2)]
        if prompt is None:
            scaled += [self.conv_first, self.conv_hr, self.conv_last]
        for conv in scaled:
            nn.init.kaiming_normal_(conv.weight)
            conv.weight.data.mul_(0.1)
            nn.init.zeros_(conv.bias)

    def body(self, x, prompt):
        """x: (N,3,H,W) -> (N,3,H,W)."""
        f = F.leaky_relu(self.conv_first(x), 0.1, inplace=True)                 # (N,64,H,W)
        for first in range(0, len(self.blocks), 3):
            f = self.three_blocks(f, prompt, first)                             # (N,64,H,W) *
        f = F.leaky_relu(self.conv_hr(f), 0.1, inplace=True)
        f = modulate(f, prompt, "hr")                                           # (N,64,H,W) *
        return modulate(self.conv_last(f), prompt, "last") + x                  # (N,3,H,W)  *

    def three_blocks(self, f, prompt, first):
        """Blocks first .. first + 2. A function of its own, so that train.py --checkpointing can
        keep its input alone, and run it again going backward."""
        for i in range(first, min(first + 3, len(self.blocks))):
            f = modulate(self.blocks[i](f), prompt, f"block{i + 1}")
        return f


# ---- Restormer: a U-shape whose attention runs over channels, so its cost is linear in the pixels
#
#      x                                                             y
#      |                                                             |
#    embed   48 channels, H x W            output 3 *  <- refinement 96 *
#      |                                                             |
#    encoder[0]  48 --------------- skip ----------------> decoder[0]  96 *
#      |  half the size, twice the channels                          |  twice the size
#    encoder[1]  96 --------------- skip ----------------> decoder[1]  96 *
#      |                                                             |
#    encoder[2]  192 -------------- skip ----------------> decoder[2]  192 *
#      |                                                             |
#      +------------------> latent 384 * ----------------------------+     H/8 x W/8
#
# All lists go from the finest level to the coarsest. The paper calls these levels 1, 2 and 3, and
# the sites are called so, too: the star at decoder[0] is the site "decoder1".

class ChannelAttention(nn.Module):
    """MDTA (Restormer, Section 3.1): the channels of a head attend to each other over all pixels.

        A = softmax(tau * q k^T / (|q| |k|)),   f' = A v;   lengths are taken along the pixels.

    A is 48 x 48 for 48 channels; attention over the pixels of 128 x 128 would be 16384 x 16384.
    tau, the temperature, is learned and multiplies.
    """
    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads can't share {dim} channels evenly")
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=False)
        self.project = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, f):
        n, c, h, w = f.shape
        qkv = self.dwconv(self.qkv(f))                                          # (N,3C,H,W)
        qkv = qkv.reshape(n, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.unbind(1)                               # each (N,heads,C',HW), C' = C / heads
        if q.dtype == torch.float16:     # sums over 256 x 256 pixels go beyond its largest, 65504
            q, k = q.float(), k.float()
        # The paper normalises q and k; dividing their small product by both lengths is the same
        # and spares two maps of full size.
        length_q = q.norm(dim=-1, keepdim=True).clamp_min(1e-12)                # (N,heads,C',1)
        length_k = k.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        scores = (q @ k.mT) / (length_q * length_k.mT) * self.temperature       # (N,heads,C',C')
        out = scores.softmax(-1).to(v.dtype) @ v                                # (N,heads,C',HW)
        return self.project(out.reshape(n, c, h, w))                            # (N,C,H,W)


class GatedFeedForward(nn.Module):
    """GDFN (Restormer, Section 3.2): gelu(one half) decides how much of the other half passes."""
    def __init__(self, dim, expansion):
        super().__init__()
        hidden = int(dim * expansion)                                           # 48 -> 127
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, f):
        gate, value = self.dwconv(self.project_in(f)).chunk(2, dim=1)           # (N,127,H,W) each
        return self.project_out(F.gelu(gate) * value)                           # (N,48,H,W)


class RestormerBlock(nn.Module):
    """f + MDTA(norm(f)), then f + GDFN(norm(f)); (N,dim,H,W)."""
    def __init__(self, dim, heads, expansion):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ChannelAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = GatedFeedForward(dim, expansion)

    def forward(self, f):
        # nn.LayerNorm works on the last axis, so channels are moved there. Its result lies so in
        # memory ("channels-last"), and still does when the axes are back in their order.
        t = self.norm1(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        f = f + self.attn(t)
        t = self.norm2(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return f + self.ffn(t)


class Restormer(Backbone):
    """The drawing above. 6 sites and four F_ext: one for the latent, one for the coarsest decoder,
    one for the two finer decoders and the refinement together, one for the output."""
    multiple = 64                  # the U-shape needs 8; the published test protocol pads to 64

    def __init__(self, prompt=None, dim=48, blocks=(4, 6, 6, 8), refinement=4, heads=(1, 2, 4, 8),
                 expansion=2.66, prompt_width=64, up3_from=None):
        d1, d2, d3, d4 = dim, 2 * dim, 4 * dim, 8 * dim                         # 48, 96, 192, 384
        u3 = up3_from or d4        # channels that enter the first way up: PromptIR has fewer
        super().__init__(prompt, {"latent": (0, d4), "decoder3": (1, d3), "decoder2": (2, d2),
                                  "decoder1": (2, d2), "refinement": (2, d2), "output": (3, 3)},
                         prompt_width)

        def level(i, width):
            return nn.Sequential(*(RestormerBlock(width, heads[i], expansion)
                                   for _ in range(blocks[i])))

        self.embed = nn.Conv2d(3, d1, 3, padding=1, bias=False)
        self.encoder = nn.ModuleList((level(0, d1), level(1, d2), level(2, d3)))
        self.down = nn.ModuleList((self.downsample(d1), self.downsample(d2), self.downsample(d3)))
        self.latent = level(3, d4)
        self.up = nn.ModuleList((self.upsample(d2), self.upsample(d3), self.upsample(u3)))
        # 1 x 1 convolutions after a skip is joined. Level 1 has none: it decodes at twice the
        # encoder's width.
        self.reduce = nn.ModuleList((nn.Identity(), nn.Conv2d(d3, d2, 1, bias=False),
                                     nn.Conv2d(u3 // 2 + d3, d3, 1, bias=False)))
        self.decoder = nn.ModuleList((level(0, d2), level(1, d2), level(2, d3)))
        self.refinement = nn.Sequential(*(RestormerBlock(d2, heads[0], expansion)
                                          for _ in range(refinement)))
        self.output = nn.Conv2d(d2, 3, 3, padding=1, bias=False)

    @staticmethod
    def downsample(dim):
        """(N,dim,H,W) -> (N,2 dim,H/2,W/2): halve the channels, then 2 x 2 pixels become 4."""
        conv = nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.PixelUnshuffle(2))

    @staticmethod
    def upsample(dim):
        """(N,dim,H,W) -> (N,dim/2,2H,2W): double the channels, then 4 become 2 x 2 pixels."""
        conv = nn.Conv2d(dim, 2 * dim, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.PixelShuffle(2))

    def before_up(self, i, f):
        """PromptIR mixes its own prompts in here; Restormer leaves f as it is."""
        return f

    def body(self, x, prompt):
        """x: (N,3,H,W), H and W multiples of 8 -> (N,3,H,W)."""
        f1 = self.encoder[0](self.embed(x))                                     # (N,48,H,W)
        f2 = self.encoder[1](self.down[0](f1))                                  # (N,96,H/2,W/2)
        f3 = self.encoder[2](self.down[1](f2))                                  # (N,192,H/4,W/4)
        f = self.latent(self.down[2](f3))                                       # (N,384,H/8,W/8)
        f = modulate(f, prompt, "latent")                                       # *

        f = self.up[2](self.before_up(2, f))                                    # (N,192,H/4,W/4)
        f = self.reduce[2](torch.cat((f, f3), 1))                               # 384 -> 192
        f = modulate(self.decoder[2](f), prompt, "decoder3")                    # *

        f = self.up[1](self.before_up(1, f))                                    # (N,96,H/2,W/2)
        f = self.reduce[1](torch.cat((f, f2), 1))                               # 192 -> 96
        f = modulate(self.decoder[1](f), prompt, "decoder2")                    # *

        f = self.up[0](self.before_up(0, f))                                    # (N,48,H,W)
        f = torch.cat((f, f1), 1)                                               # (N,96,H,W)
        f = modulate(self.decoder[0](f), prompt, "decoder1")                    # *

        f = modulate(self.refinement(f), prompt, "refinement")                  # (N,96,H,W) *
        return modulate(self.output(f), prompt, "output") + x                   # (N,3,H,W)  *


# ---- PromptIR: a Restormer that makes its own prompts --------------------------------------------

class PromptGenerator(nn.Module):
    """PGM (PromptIR, Section 3.1): a mixture of five learned maps P_c, by what the features show:

        P = conv3x3(sum_c w_c P_c),   w = softmax(linear(mean of f over the pixels)).
    """
    def __init__(self, dim, prompt_dim, size, length=5):
        super().__init__()
        self.components = nn.Parameter(torch.rand(1, length, prompt_dim, size, size))
        self.linear = nn.Linear(dim, length)
        self.conv = nn.Conv2d(prompt_dim, prompt_dim, 3, padding=1, bias=False)

    def forward(self, f):
        """(N,dim,H,W) -> (N,prompt_dim,H,W). The maps have one size and are stretched to f's."""
        w = self.linear(f.mean((2, 3))).softmax(1)                              # (N,5)
        p = torch.einsum("nl,lchw->nchw", w, self.components[0])                # (N,C,size,size)
        return self.conv(F.interpolate(p, f.shape[2:], mode="bilinear"))


class PromptInteraction(nn.Module):
    """PIM (PromptIR, Section 3.1): one transformer block over features and prompt together."""
    def __init__(self, dim, prompt_dim, out_dim, size, heads, expansion):
        super().__init__()
        self.generate = PromptGenerator(dim, prompt_dim, size)
        self.block = RestormerBlock(dim + prompt_dim, heads, expansion)
        self.reduce = nn.Conv2d(dim + prompt_dim, out_dim, 1, bias=False)

    def forward(self, f):
        """(N,dim,H,W) -> (N,out_dim,H,W)."""
        return self.reduce(self.block(torch.cat((f, self.generate(f)), 1)))


class PromptIR(Restormer):
    """Restormer with a prompt interaction before each way up; it takes no other prompt.

    Two oddities are the published code's: all three interaction blocks have level 3's number of
    heads; and the one at the bottom comes down to 4*dim channels, so that the first way up gives
    2*dim where Restormer's gives 4*dim.
    """
    def __init__(self, prompt=None, dim=48, blocks=(4, 6, 6, 8), refinement=4, heads=(1, 2, 4, 8),
                 expansion=2.66, prompt_dims=(64, 128, 320), prompt_sizes=(64, 32, 16)):
        if prompt is not None:
            raise ValueError("it has prompts of its own: build it without a prompt")
        d2, d3, d4 = 2 * dim, 4 * dim, 8 * dim
        super().__init__(None, dim, blocks, refinement, heads, expansion, up3_from=d3)
        (p1, p2, p3), (s1, s2, s3) = prompt_dims, prompt_sizes
        self.interact = nn.ModuleList((
            PromptInteraction(d2, p1, d2, s1, heads[2], expansion),       # before level 1, H/2
            PromptInteraction(d3, p2, d3, s2, heads[2], expansion),       # before level 2, H/4
            PromptInteraction(d4, p3, d3, s3, heads[2], expansion)))      # before level 3, H/8

    def before_up(self, i, f):
        return self.interact[i](f)


# ---- Window attention, shared by SwinIR and Uformer ----------------------------------------------

def to_windows(f, window):
    """(N,H,W,C) -> (N, windows, window*window, C), windows in reading order."""
    n, h, w, c = f.shape
    f = f.view(n, h // window, window, w // window, window, c)                  # (N,H/8,8,W/8,8,C)
    return f.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(t, window, width):
    """(N, windows, window*window, C) -> (N,H,W,C), where width is W."""
    t = t.unflatten(2, (window, window)).unflatten(1, (-1, width // window))    # (N,H/8,W/8,8,8,C)
    return t.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def relative_position_index(window):
    """For each two pixels of a window, the row of the bias table: (window^2, window^2) of int64.
    Offsets dy, dx each take 2 * window - 1 values, so the table has (2 * window - 1)^2 rows."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy = y[:, None] - y[None] + window - 1                                      # 0 .. 2*window - 2
    dx = x[:, None] - x[None] + window - 1
    return dy * (2 * window - 1) + dx


def shift_mask(h, w, window, shift, device):
    """-100 between pixels that the cyclic shift made neighbours though they were none: (windows,
    window^2, window^2). Every second block rolls the map by `shift`, so that windows straddle the
    borders of the block before; what left at the top comes back at the bottom. A row (or column)
    is of band 0, 1 or 2, and a pixel of one of nine regions:

          w - window   w - shift                 the band of a row or column:
        +-------------+-----+-----+                0  windows that hold one region
        |      0      |  1  |  2  |                1  the last window's own part
        +-------------+-----+-----+  h - window    2  what came around
        |      3      |  4  |  5  |
        +-------------+-----+-----+  h - shift   region = 3 * band of row + band of column:
        |      6      |  7  |  8  |              only the last row's and column's windows hold
        +-------------+-----+-----+              two of them, the one in the corner four.

    -100 and not minus infinity, as published: the softmax leaves such pairs about e^-100.
    """
    def band(size):
        at = torch.arange(size, device=device)
        return (at >= size - window).long() + (at >= size - shift).long()
    region = 3 * band(h)[:, None] + band(w)[None]                               # (H,W) in 0..8
    region = to_windows(region[None, :, :, None], window)[0, :, :, 0]           # (windows,window^2)
    return -100.0 * (region[:, :, None] != region[:, None, :])


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window (Swin Transformer, Equation 4):

        softmax(q k^T / sqrt(c) + B + mask) v,   B: a learned bias for each offset of two pixels.
    """
    def __init__(self, dim, heads, window):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads can't share {dim} channels evenly")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.register_buffer("index", relative_position_index(window), persistent=False)

    def forward(self, t, mask=None):
        """t: (N,windows,T,C) with T = window^2; mask: (windows,T,T) or None -> (N,windows,T,C).

        Some windows at a time, so that memory stays bounded: the scores of all 43,350 of SwinIR's
        for 2040 x 1356 pixels would take 4 GB. A CPU is fastest on as many as keep to its cache. A
        GPU gets enough to be busy; times 16 heads they stay below 65,536 matrices, more than which
        some of its kernels do not take at once.
        """
        bias = self.bias_table[self.index].permute(2, 0, 1)                     # (heads,T,T)
        if torch.compiler.is_compiling():          # a graph of free size can't hold the loop
            return self.attend(t, bias, mask)
        few = max((32 if t.device.type == "cpu" else 2048) // len(t), 1)        # of each image
        masks = [None] * t.shape[1] if mask is None else mask.split(few)
        parts = zip(t.split(few, 1), masks)
        return torch.cat([self.attend(part, bias, part_mask) for part, part_mask in parts], 1)

    def attend(self, t, bias, mask):
        """The same for all these windows at once."""
        qkv = self.qkv(t).unflatten(-1, (3, self.heads, -1))                    # (N,w,T,3,heads,c)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)                                 # (N,w,heads,T,c)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT                               # (N,w,heads,T,T)
        scores += bias
        if mask is not None:
            scores += mask[:, None]
        out = scores.softmax(-1) @ v                                            # (N,w,heads,T,c)
        return self.project(out.transpose(2, 3).flatten(3))                     # (N,w,T,C)


class DropPath(nn.Module):
    """Stochastic depth: in training, leaves out the whole branch of an image with a probability,
    and scales the others up, so that the mean stays: f / (1 - p) or 0.

    draws: (N,) uniform in [0,1), one for each image, which train.py sets before each step, so that
    what is dropped does not depend on how a batch is split. None: torch's own generator.
    """
    def __init__(self, probability):
        super().__init__()
        self.probability, self.draws = probability, None

    def forward(self, f):
        """f: (N,H,W,C) -> the same, some of the N images zero."""
        if not self.training or self.probability == 0:
            return f
        draws = torch.rand(len(f), device=f.device) if self.draws is None else self.draws
        kept = (draws >= self.probability).to(f.dtype) / (1 - self.probability)
        return f * kept[:, None, None, None]


class WindowBlock(nn.Module):
    """One transformer block on (N,H,W,C): f + attention(norm(f)), then f + mlp(norm(f)).

    With an MLP it is Swin's; with LeFF, and in the decoder with a modulator (64 x C learned numbers
    added to every window), it is Uformer's LeWin block.
    """
    def __init__(self, dim, heads, window, shift, drop_path, mlp, modulator=False):
        super().__init__()
        self.window, self.shift = window, shift
        self.modulator = nn.Parameter(torch.randn(window ** 2, dim)) if modulator else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, f, mask):
        """f: (N,H,W,C); mask: (windows,T,T), the shift mask of this size; None: no block shifts."""
        t = self.norm1(f)
        if self.shift:
            t = t.roll((-self.shift, -self.shift), (1, 2))
        t = to_windows(t, self.window)                                          # (N,windows,T,C)
        if self.modulator is not None:
            t = t + self.modulator
        t = self.attn(t, mask if self.shift else None)
        t = from_windows(t, self.window, f.shape[2])                            # (N,H,W,C)
        if self.shift:
            t = t.roll((self.shift, self.shift), (1, 2))
        f = f + self.drop_path1(t)
        return f + self.drop_path2(self.mlp(self.norm2(f)))


class WindowStage(nn.Module):
    """A run of blocks at one resolution, (N,C,H,W) -> (N,C,H,W); every second one is shifted.
    drop_paths: one probability a block; make_mlp(dim): the feed-forward half of a block."""
    def __init__(self, dim, heads, window, drop_paths, make_mlp, modulator=False):
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList()
        for i, drop_path in enumerate(drop_paths):
            shift = window // 2 if i % 2 else 0
            self.blocks.append(WindowBlock(dim, heads, window, shift, drop_path, make_mlp(dim),
                                           modulator))

    def forward(self, f):
        f = f.permute(0, 2, 3, 1).contiguous()                                  # (N,H,W,C)
        _, h, w, _ = f.shape
        mask = None                                # a single block is not shifted
        if len(self.blocks) > 1:
            mask = shift_mask(h, w, self.window, self.window // 2, f.device).to(f.dtype)
        for block in self.blocks:
            f = block(f, mask)
        return f.permute(0, 3, 1, 2)                                            # (N,C,H,W)


def init_linears(model):
    """SwinIR and Uformer start their linear layers, the prompt path's too, at a normal of deviation
    0.02 truncated to [-2, 2], and at zero bias."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


# ---- SwinIR: groups of Swin blocks at full resolution, between two convolutions ------------------

class Mlp(nn.Sequential):
    """The feed-forward half of a Swin block, on (...,dim)."""
    def __init__(self, dim, ratio):
        hidden = int(dim * ratio)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class SwinGroup(nn.Module):
    """RSTB (SwinIR, Section 3.2): Swin blocks, a convolution, a skip around both; (N,C,H,W)."""
    def __init__(self, dim, heads, window, drop_paths, mlp_ratio):
        super().__init__()
        self.stage = WindowStage(dim, heads, window, drop_paths, lambda d: Mlp(d, mlp_ratio))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, f):
        return f + self.conv(self.stage(f))


class SwinIR(Backbone):
    """conv - 6 groups* - conv* (around them a skip) - conv* - conv*.  9 sites, one F_ext.

    Mirrors the published SwinIR with upsampler "pixelshuffle" at scale 1: nothing is enlarged, and
    the input is not added to the output. `mean` is DIV2K's colour, taken off and put back.
    """
    multiple = 8                   # the window

    def __init__(self, prompt=None, dim=180, depths=(6,) * 6, heads=6, window=8, mlp_ratio=2,
                 drop_path=0.1, width=64, prompt_width=64):
        sites = {f"group{i + 1}": (0, dim) for i in range(len(depths))}
        sites |= {"after_body": (0, dim), "before_upsample": (0, width), "last": (0, 3)}
        super().__init__(prompt, sites, prompt_width)
        # Drop path grows linearly from 0 in the first block to 0.1 in the last, over all groups.
        drops = torch.linspace(0, drop_path, sum(depths), device="cpu").split(depths)
        self.conv_first = nn.Conv2d(3, dim, 3, padding=1)
        self.norm_first = nn.LayerNorm(dim)
        self.groups = nn.ModuleList(SwinGroup(dim, heads, window, d.tolist(), mlp_ratio)
                                    for d in drops)
        self.norm_last = nn.LayerNorm(dim)
        self.conv_after_body = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv_before_upsample = nn.Conv2d(dim, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, 3, 3, padding=1)
        self.register_buffer("mean", torch.tensor((0.4488, 0.4371, 0.4040)).view(1, 3, 1, 1),
                             persistent=False)
        init_linears(self)

    def body(self, x, prompt):
        """x: (N,3,H,W), H and W multiples of 8 -> (N,3,H,W)."""
        shallow = self.conv_first(x - self.mean)                                # (N,180,H,W)
        f = self.norm_first(shallow.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for i, group in enumerate(self.groups):
            f = modulate(group(f), prompt, f"group{i + 1}")                     # (N,180,H,W) *
        f = self.norm_last(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        f = modulate(self.conv_after_body(f) + shallow, prompt, "after_body")   # (N,180,H,W) *
        f = F.leaky_relu(self.conv_before_upsample(f), 0.01)
        f = modulate(f, prompt, "before_upsample")                              # (N,64,H,W)  *
        return modulate(self.conv_last(f), prompt, "last") + self.mean          # (N,3,H,W)   *


# ---- Uformer-B: a U-shape of window attention ----------------------------------------------------
#
#      x                                                         y
#    input 32, H x W                                         output 3 *
#      |                                                         |
#    encoder 0  32  --------------- joined ------------> decoder 3  64 *
#    encoder 1  64  --------------- joined ------------> decoder 2  128 *
#    encoder 2  128 --------------- joined ------------> decoder 1  256 *
#    encoder 3  256 --------------- joined ------------> decoder 0  512 *
#      |                                                         |
#      +----------------> bottleneck 512 * ----------------------+      H/16 x W/16
#
# Both lists count in the order in which they run, so that decoder 0 is the coarsest: not by level,
# as Restormer's do. Nothing comes down after a skip is joined: each decoder is twice as wide as its
# encoder.

class LeFF(nn.Module):
    """Locally-enhanced feed-forward (Uformer, Section 3.2): an MLP with a depthwise convolution."""
    def __init__(self, dim, ratio=4):
        super().__init__()
        self.linear1 = nn.Linear(dim, ratio * dim)
        self.dwconv = nn.Conv2d(ratio * dim, ratio * dim, 3, padding=1, groups=ratio * dim)
        self.linear2 = nn.Linear(ratio * dim, dim)

    def forward(self, f):
        """(N,H,W,C) -> (N,H,W,C)."""
        f = F.gelu(self.linear1(f)).permute(0, 3, 1, 2)                         # (N,4C,H,W)
        f = F.gelu(self.dwconv(f)).permute(0, 2, 3, 1)                          # (N,H,W,4C)
        return self.linear2(f)


class Uformer(Backbone):
    """The drawing above. 6 sites; bottleneck and decoder 0 share an F_ext, the others have their
    own.

    Stages run encoder 0..3, bottleneck, decoder 0..3. The published code takes the square root of
    the number of tokens for the height, so it runs on squares alone; ours keeps both sides.
    """
    multiple, square = 128, True   # four halvings, and a window of 8 at the bottom

    def __init__(self, prompt=None, dim=32, depths=(1, 2, 8, 8, 2, 8, 8, 2, 1),
                 heads=(1, 2, 4, 8, 16, 16, 8, 4, 2), window=8, drop_path=0.1, prompt_width=64):
        c = [dim * 2 ** i for i in range(5)]                                    # 32 .. 512
        sites = {"bottleneck": (0, c[4]), "decoder0": (0, c[4]), "decoder1": (1, c[3]),
                 "decoder2": (2, c[2]), "decoder3": (3, c[1]), "output": (4, 3)}
        super().__init__(prompt, sites, prompt_width)
        # Drop path grows along the encoder, holds at the bottom, and shrinks along the decoder.
        rise = torch.linspace(0, drop_path, sum(depths[:4]), device="cpu").tolist()
        fall = rise[::-1] + [0.0] * sum(depths[5:])     # zeros: should the decoder be deeper
        drops = rise + [drop_path] * depths[4] + fall

        def stage(i, width):
            first = sum(depths[:i])
            return WindowStage(width, heads[i], window, drops[first:first + depths[i]], LeFF,
                               modulator=i > 4)

        self.input = nn.Conv2d(3, c[0], 3, padding=1)
        self.encoder = nn.ModuleList(stage(i, c[i]) for i in range(4))
        self.down = nn.ModuleList(nn.Conv2d(c[i], c[i + 1], 4, stride=2, padding=1)
                                  for i in range(4))
        self.bottleneck = stage(4, c[4])
        skips = (c[3], c[2], c[1], c[0])                # widths of what the encoders hand over
        below = (c[4], c[4], c[3], c[2])                # and of what comes from below
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, s, 2, stride=2) for b, s in zip(below, skips))
        self.decoder = nn.ModuleList(stage(5 + i, 2 * skips[i]) for i in range(4))
        self.output = nn.Conv2d(c[1], 3, 3, padding=1)
        init_linears(self)

    def body(self, x, prompt):
        """x: (N,3,H,W), H and W multiples of 128 -> (N,3,H,W)."""
        f = F.leaky_relu(self.input(x), 0.01)                                   # (N,32,H,W)
        f0 = self.encoder[0](f)                                                 # (N,32,H,W)
        f1 = self.encoder[1](self.down[0](f0))                                  # (N,64,H/2,W/2)
        f2 = self.encoder[2](self.down[1](f1))                                  # (N,128,H/4,W/4)
        f3 = self.encoder[3](self.down[2](f2))                                  # (N,256,H/8,W/8)
        f = self.bottleneck(self.down[3](f3))                                   # (N,512,H/16,W/16)
        f = modulate(f, prompt, "bottleneck")                                   # *

        f = self.decoder[0](torch.cat((self.up[0](f), f3), 1))                  # (N,512,H/8,W/8)
        f = modulate(f, prompt, "decoder0")                                     # *
        f = self.decoder[1](torch.cat((self.up[1](f), f2), 1))                  # (N,256,H/4,W/4)
        f = modulate(f, prompt, "decoder1")                                     # *
        f = self.decoder[2](torch.cat((self.up[2](f), f1), 1))                  # (N,128,H/2,W/2)
        f = modulate(f, prompt, "decoder2")                                     # *
        f = self.decoder[3](torch.cat((self.up[3](f), f0), 1))                  # (N,64,H,W)
        f = modulate(f, prompt, "decoder3")                                     # *
        return modulate(self.output(f), prompt, "output") + x                   # (N,3,H,W) *


# ---- The task classifier: names the degradation when the user does not ---------------------------

class TaskClassifier(nn.Module):
    """(N,3,H,W) -> logits (N,7) in the order of TASKS; H and W at least 9.

    It looks at blocks of 9 x 9 pixels side by side, and averages what it found. The published one
    ends in a softmax and is trained with a cross-entropy that applies another, which flattens the
    gradients; ours returns logits, whose softmax equals the published output.
    """
    def __init__(self, width=128):
        super().__init__()
        self.answers = TASKS
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=3), nn.LeakyReLU(0.1),                # (N,128,H/3,W/3)
            nn.Conv2d(width, width, 3, stride=3), nn.LeakyReLU(0.1),            # (N,128,H/9,W/9)
            nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1), nn.Conv2d(width, 32, 1))
        self.head = nn.Linear(32, len(TASKS))

    def forward(self, x):
        return self.decide(self.features(self.look(x)).flatten(2))

    def look(self, x):
        """What is looked at: the picture, (N,3,H,W)."""
        return x

    def decide(self, found):
        """found: the 32 numbers of each block, (N,32,blocks) -> logits (N,7)."""
        return self.head(found.mean(2))


# ---- Building a model ----------------------------------------------------------------------------

MODELS = dict(zip(ARCHS, (SRResNet, SwinIR, Restormer, Uformer, PromptIR)))


def build_model(arch, prompt=None, **overrides):
    """A backbone with fresh weights. arch: one of ARCHS; prompt: None, "ep" (explicit) or "ap"
    (adaptive). Defaults are the paper's sizes; overrides shrink them: dim=16, blocks=(1,1,1,1).
    Raises ValueError for an unknown arch, prompt or override, and for promptir with a prompt."""
    if arch not in MODELS:
        raise ValueError(f"unknown arch {arch!r}: choose one of {', '.join(MODELS)}")
    with blamed_on(arch):
        return MODELS[arch](prompt, **overrides)


# ---- Restoring a whole image (the published test protocol; README, "Reproduce") ---------------

def reflect_pad(x, left, right, top, bottom):
    """Reflection without repeating the edge, like F.pad(mode="reflect"), but for any length:
    a 3-pixel image padded to 64 is reflected back and forth. x: (N,C,H,W)."""
    def reflected(size, before, after):            # 3 pixels: ... 2 1 [0 1 2] 1 0 1 2 1 ...
        period = max(2 * (size - 1), 1)
        at = torch.arange(-before, size + after, device=x.device) % period
        return torch.minimum(at, period - at)
    h, w = x.shape[2:]
    if max(left, right) < w and max(top, bottom) < h:
        return F.pad(x, (left, right, top, bottom), mode="reflect")             # the same, faster
    return x[:, :, reflected(h, top, bottom)][:, :, :, reflected(w, left, right)]


def pad_for(x, multiple, square):
    """Pads (N,3,H,W) as the published test protocol does: to a multiple at the right and bottom;
    then, if square, the shorter side equally at both ends. Returns (padded, top, left), where
    padded[:, :, top:top + H, left:left + W] is x."""
    h, w = x.shape[2:]
    x = reflect_pad(x, 0, -w % multiple, 0, -h % multiple)
    h, w = x.shape[2:]
    edge = max(h, w)
    top, left = ((edge - h) // 2, (edge - w) // 2) if square else (0, 0)
    return reflect_pad(x, left, left, top, top), top, left


def parse_task(text):
    """"noise" or "noise:0.7, jpeg:0.3" -> (1,7) weights in the order of TASKS, with a sum of 1.

    The prompt is then w_1 P_1 + ... + w_7 P_7: the prompt IMAGES are mixed, before F_ext encodes
    them; F_ext is not linear, so mixing the encoded prompts would give something else. Training saw
    single prompts alone, a sum of 1; so weights are divided by theirs, and "noise,jpeg" is half and
    half. Raises ValueError with the mend.
    """
    weights = torch.zeros(1, len(TASKS), device="cpu")
    for part in text.lower().split(","):
        name, _, weight = part.replace(" ", "").partition(":")
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}: choose auto (by a classifier), one of "
                             f"{', '.join(TASKS)}, or a mixture such as noise:0.7,jpeg:0.3")
        try:
            weights[0, TASKS.index(name)] += float(weight or 1)        # "noise" alone has weight 1
        except ValueError:
            raise ValueError(f"task {text}: {weight!r} is not a number") from None
    total = weights.sum().item()
    if weights.min() < 0 or not 0 < total < math.inf:                  # NaN fails, too
        raise ValueError(f"task {text}: weights can't be negative, infinite or all zero")
    return weights / total


def restore(model, x, task=None, tile=None, overlap=None, report=None, classifier=None):
    """Restores pictures of any height and width, and of any kind; the same kind comes out.

    x: a tensor (N,3,H,W) or (3,H,W), floats in [0,1]; a numpy array (H,W,3) or, grey, (H,W), uint8
    or floats in [0,1]; a PIL image of 8 bits, or a file's path: for both an upright image of PIL
    comes out, of mode L for grey of mode L, else RGB: transparency is lost. Floats come out
    unclamped, as the network made them. Raises ValueError for other shapes, and for numbers beyond
    2: such as are in 0 .. 255.
    task: a name of TASKS, or its row; a mixture, "noise:0.7,jpeg:0.3"; a tensor as
    Backbone.read_prompt takes it; or "auto": `classifier` (a TaskClassifier; None: the one that is
    shipped) names the task of each picture, and one in which it finds nothing, or is in doubt,
    comes out as it was. Of our models only "ep" ones read it.
    tile: edge of square tiles in pixels, rounded up to the model's multiple, so that memory stays
    bounded; 0 runs the picture whole; None: as `auto_tile` says, in tiles above a megapixel.
    overlap: pixels that neighbours share, more than twice model.context; the default suits the
    backbone. report(done, tiles) is called after each tile.

    model is put into eval mode for the time of the call, and back, also after an exception. So
    threads may share a model that is in eval mode already, which is then only read; but no other
    thread may train it meanwhile, or call train() or eval().
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module                       # what copies a network for large batches
    like = next(model.parameters(), x if torch.is_tensor(x) else torch.zeros((), device="cpu"))
    x, as_given = to_batch(x, like)
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
        raise ValueError(f"restore takes (N,3,H,W) with H, W >= 1, not {tuple(x.shape)}")
    # A network's own output may leave [0,1] a little; 0 .. 255 is far outside. NaN fails, too.
    # (Here `restore` waits for the GPU, once a picture; a forward pass never does.)
    if not x.is_floating_point() or not (x.is_meta or x.abs().max() <= 2):
        raise ValueError(f"restore takes floats in [0,1], not {x.dtype} up to {x.max():g}; "
                         "divide by 255")
    # Each module's own mode: model.train() would also wake a part that someone keeps in eval mode.
    modes = {module: module.training for module in model.modules()}
    model.eval()                                   # drop path is for training
    try:
        if isinstance(task, str) and task.lower() == "auto":
            if getattr(model, "prompt", "ep") == "ep":
                return as_given(restore_as_named(model, x, classifier, tile, overlap, report))
            task = None                            # a plain or "ap" model reads no task
        task = task_tensor(model, task, len(x))
        return as_given(restore_batch(model, x, task, tile, overlap, report))
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def restore_batch(model, x, task, tile, overlap, report):
    """`restore` of (N,3,H,W) by a model in eval mode: pads, runs, cuts back.

    model: a backbone, or any network called as model(x, task=task); what it needs may stand in its
    attributes `multiple`, `square`, `overlap` and `context` (see Backbone). An "ap" model's prompt
    is the padded image, whole, whatever the tiles. task: what `task_tensor` gives.
    """
    tile = auto_tile(model, *x.shape[2:]) if tile is None else tile
    if tile:
        tile, overlap = check_tile(model, tile, overlap)
    square = getattr(model, "square", False) and not tile
    padded, top, left = pad_for(x, getattr(model, "multiple", 1), square)
    task = None if task is None else task.to(x.device)
    run = functools.partial(model, task=task)
    if hasattr(model, "read_prompt"):              # a Backbone reads its prompt once for all tiles
        h, w = padded.shape[2:]
        large = reflect_pad(padded, 0, max(5 - w, 0), 0, max(5 - h, 0))         # F_ext needs 5 x 5
        run = functools.partial(model, prompt=model.read_prompt(large, task))
    y = restore_tiled(model, run, padded, tile, overlap, report) if tile else run(padded)
    return y[:, :, top:top + x.shape[2], left:left + x.shape[3]]


# ==================================================================================================
# Not in the paper: kinds of pictures and tasks, "auto", tiles, files, names of published weights.
# ==================================================================================================

# ---- Kinds of pictures and of tasks --------------------------------------------------------------

def to_batch(x, like):
    """What `restore` is given -> (the same as (N,3,H,W), a function that turns a result of that
    shape into the kind it came from). Floats go to the device and type of the tensor `like`, and
    results back to those of x. numpy and pillow are imported here, so that nobody needs them to
    restore tensors."""
    if torch.is_tensor(x):                         # (N,3,H,W) or (3,H,W)
        batch = x[None] if x.ndim == 3 else x
        if x.is_floating_point():                  # anything else is refused
            batch = batch.to(like)
        return batch, lambda y: y.reshape(x.shape).to(x)
    import numpy as np
    from PIL import Image
    if isinstance(x, (str, Path)):
        with Image.open(x) as image:               # a missing or torn file is pillow's to name
            return to_batch(image, like)
    picture = isinstance(x, Image.Image)
    if picture:
        refuse_deep_grey(x.mode)
        x = upright(x).convert("L" if x.mode == "L" else "RGB")
    x = np.asarray(x)
    grey, kind = x.ndim == 2, str(x.dtype)
    if not (grey or x.shape[2:] == (3,)) or kind not in ("uint8", "float16", "float32", "float64"):
        raise ValueError("restore takes a path, a PIL image, a tensor or an array (H,W,3) or (H,W) "
                         f"of uint8 or floats, not {x.shape} of {kind}")
    full = 255 if kind == "uint8" else 1           # floats beyond [0,1] are for restore to refuse
    if grey:                                       # to the network, three equal channels
        x = np.stack((x, x, x), 2)                                              # (H,W,3)

    def back(y):
        y = y[0].permute(1, 2, 0).float().cpu()                                 # (H,W,3)
        if grey:
            y = y @ y.new_tensor((0.299, 0.587, 0.114))                         # (H,W): luma
        if full == 255:                            # as the protocol rounds: see eval.restored
            y = (y * 255).round().clamp(0, 255)
        y = y.numpy().astype(kind)
        return Image.fromarray(y) if picture else y
    return torch.from_numpy(x.astype(np.float32) / full).permute(2, 0, 1)[None].to(like), back


def upright(image):
    """A copy of a PIL image, as it was seen: cameras store pictures as the sensor lay, and in EXIF
    how to turn them. Nothing else of EXIF is read: odd values, which cameras and editors do write,
    must not make a whole photograph unreadable."""
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}     # EXIF's numbers: PIL.Image.Transpose's
    turn = None
    with contextlib.suppress(Exception):
        turn = turns.get(image.getexif().get(0x0112))      # the tag "orientation"; 1 is upright
    return image.copy() if turn is None else image.transpose(turn)


def refuse_deep_grey(mode):
    """Raises ValueError for the modes of pillow in which grey has more than 8 bits: I, I;16, F. The
    file does not say what is white there: one of 16 bits often holds 12."""
    if mode in ("I", "F") or mode.startswith("I;"):
        raise ValueError(f"grey of more than 8 bits or floats ({mode}): which number is white "
                         "can't be told; save it as 8 bits first, numpy.uint8(255 * array / white)")


def task_tensor(model, task, images):
    """A task as `restore` takes it -> the tensor for model(x, task=task): a LongTensor of rows,
    (1,) or (N,), or weights, (1,7) or (N,7); or None. ValueError for what this model can't take."""
    prompts = getattr(model, "prompts", None)      # plain, "ap" and some foreign networks have none
    count = len(prompts if torch.is_tensor(prompts) else TASKS)
    if isinstance(task, str):
        weights = parse_task(task)
        if count != len(TASKS) and not hasattr(model, "read_prompt"):
            raise ValueError(f"task {task!r}: names are those of TASKS, {len(TASKS)} in number; "
                             f"this network has {count} prompts of its own: give a row, 0 to "
                             f"{count - 1}")
        task = TASKS.index(task) if task in TASKS else weights
    if not isinstance(task, (torch.Tensor, type(None))):
        try:
            task = torch.tensor([task], device="cpu")                  # 2, or numpy's int64(2)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"task {task!r}: give auto, a name of TASKS, a row, a mixture such as "
                             "noise:0.7,jpeg:0.3, or a tensor as Backbone.read_prompt takes "
                             "it") from None
    if task is not None and torch.is_tensor(prompts):
        check_task(task.cpu() if task.is_cuda else task, images, count)
    return task


# ---- "auto": the task that a classifier names ----------------------------------------------------

ANSWERS = (*TASKS, "none")


class TaskOrNone(TaskClassifier):
    """Our own classifier: (N,3,H,W) -> logits (N,8) in the order of ANSWERS. It may also say that
    nothing is wrong. (The published one has no word for a clean picture, and calls it "dark".)

    To tell a clean picture from a slightly damaged one is harder, and takes two things more:
      - detail, what a pixel has beyond the mean of the 3 x 3 around it, in units of two grey
        levels and clipped to [-1,1]. What JPEG leaves behind is that faint, and next to an edge of
        a hundred levels no filter would notice it (steganalysis truncates residuals for that:
        Fridrich, Kodovsky 2012);
      - the most, besides the mean: of each of the 32 numbers its mean over the sixteenth of the
        blocks that have most of it. A blurred picture has no sharp block ANYWHERE, a hazy one no
        black one; a clean picture may have few of them.
    """
    def __init__(self, width=128):
        super().__init__(width)
        self.answers = ANSWERS
        self.features[0] = nn.Conv2d(6, width, 3, stride=3)
        self.head = nn.Linear(64, len(ANSWERS))

    def look(self, x):
        """The picture, and its detail: (N,3,H,W) -> (N,6,H,W)."""
        detail = x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return torch.cat((x, (detail * 255 / 2).clamp(-1, 1)), 1)

    def decide(self, found):
        """(N,32,blocks) -> logits (N,8)."""
        most = found.topk(max(found.shape[2] // 16, 1), dim=2).values           # (N,32,blocks/16)
        return self.head(torch.cat((found.mean(2), most.mean(2)), 1))           # of (N,64)


def build_classifier(width=128, none=False):
    """A fresh classifier: the paper's, which knows TASKS; or, with none, ours, with ANSWERS."""
    return (TaskOrNone if none else TaskClassifier)(width)


# Below these probabilities the classifier that ships is in doubt, and a wrong prompt harms a
# picture. A grey day looks like haze, and a night like low light, so these two must be surer.
# Chosen on 24 photographs that it was not trained on (assets/README.md); a guess has 0.125.
DOUBT = {"blur": 0.9, "noise": 0.95, "jpeg": 0.75, "rain": 0.6, "haze": 0.95, "dark": 0.94,
         "sr": 0.95}


@torch.no_grad()
def classify(classifier, x, damaged=False):
    """(name, its probability) for one image (1,3,H,W), all of it in its own size. The name is one
    of classifier.answers, but not "none" where the image is known as damaged.

    The classifier is a function of blocks: each 9 x 9 pixels become 32 numbers, and no two blocks
    overlap. So a large picture is read in strips of whole blocks, in little memory. (Detail looks
    one pixel beyond a block: a strip is given its neighbours' rows, which are then cut off. Up to 8
    pixels at the right and the bottom make no whole block and are not seen.)
    """
    h, w = x.shape[2:]
    x = F.pad(x, (0, max(9 - w, 0), 0, max(9 - h, 0)), mode="replicate")       # at least one block
    found = []
    for top in range(0, x.shape[2] - 8, 9 * 64):           # a rest below 9 rows makes no block
        above = min(top, 1)                                # there is no row above the first
        strip = x[:, :, top - above:top + 9 * 64 + 1].to(classifier.head.weight)
        strip = classifier.look(strip)[:, :, above:above + 9 * 64]             # (1,3 or 6,576,W)
        found.append(classifier.features(strip).flatten(2))                    # (1,32,64 (W // 9))
    logits = classifier.decide(torch.cat(found, 2))[0]                         # (7,) or (8,)
    if damaged:
        logits = logits[:len(TASKS)]                       # "none" comes last
    sure, row = logits.softmax(0).max(0)
    return classifier.answers[row.item()], sure.item()     # waits for the GPU


def choose_task(classifier, x):
    """(task, name, probability) for one image (1,3,H,W): what `classify` named, and, as task, the
    same name, or None where the picture is better left as it is.

    A picture that is fine must stay so. A classifier that can answer "none" is believed when it
    does, and where it is in doubt nothing is touched either: a picture left as it was can be
    restored later. The published classifier always has to name a damage.
    """
    name, sure = classify(classifier, x)
    doubt = name == "none" or sure < DOUBT.get(name, max(DOUBT.values()))
    return (None if doubt and "none" in classifier.answers else name), name, sure


@torch.no_grad()
def restore_as_named(model, x, classifier, tile, overlap, report):
    """`restore` of (N,3,H,W) with the task "auto", by a model in eval mode that reads a task."""
    if classifier is None:
        shipped = Path(__file__).parent / "assets" / "classifier.pt"
        classifier, _ = load_model(shipped, device=x.device)
    y = x.clone()
    for k in range(len(x)):
        name, *_ = choose_task(classifier, x[k:k + 1])
        if name is not None:
            task = task_tensor(model, name, 1)
            y[k:k + 1] = restore_batch(model, x[k:k + 1], task, tile, overlap, report)
    return y


# ---- Tiles: bounded memory for pictures of any size ----------------------------------------------

def auto_tile(model, h, w):
    """0, which is whole, up to a megapixel; above it tiles of 512, so that memory stays bounded:
    the features of a tile take the same room in a picture of any size. What counts is what the
    network sees: a picture that is padded to a square is as large as that square."""
    pixels = max(h, w) ** 2 if getattr(model, "square", False) else h * w
    return 512 if pixels > 2 ** 20 else 0


def check_tile(model, tile, overlap=None):
    """(tile, overlap) as they will be used: tile rounded up to the model's multiple, overlap, if
    None, the model's own. Raises ValueError for a tile no larger than the overlap, no pixel of
    which would be its own, and for an overlap that is all spoilt by its tiles' borders."""
    multiple, context = getattr(model, "multiple", 1), getattr(model, "context", 16)
    overlap = getattr(model, "overlap", 64) if overlap is None else overlap
    least = overlap // multiple * multiple + 1
    if overlap <= 2 * context or tile < least:
        raise ValueError(f"tile {tile}, overlap {overlap}: too small for this model; a tile needs "
                         f"at least {least} (0: whole), an overlap {2 * context + 1}")
    return math.ceil(tile / multiple) * multiple, overlap


def restore_tiled(model, run, x, tile, overlap, report):
    """Runs (N,3,H,W) in tiles, whose overlaps fade into each other; run: what to call with each.
    A pixel's weight in a tile is that of its row times that of its column."""
    y, done = torch.zeros_like(x), 0
    context = getattr(model, "context", 16)
    above_each_other = tile_weights(x.shape[2], tile, overlap, context, x)
    side_by_side = tile_weights(x.shape[3], tile, overlap, context, x)
    for rows, down in above_each_other:
        for columns, across in side_by_side:
            part = run(x[:, :, rows, columns])                                  # (N,3,tile,tile)
            y[:, :, rows, columns] += part * (down[:, None] * across)           # by (tile,tile)
            done += 1
            if report:
                report(done, len(above_each_other) * len(side_by_side))
    return y


def tile_weights(size, tile, overlap, context, like):
    r"""[(slice, weights there), ...]: the tiles along one axis of an image. A tile's weight, before
    division by the sum over the tiles, is a trapezoid:

        full         _______________________
                    /                       \
        0   _______/                         \_______
            context ramp               ramp context

    It is 0 near an inner border, where a tile lacks its neighbours; the ramp is what is left of the
    overlap without both tiles' contexts, so that one tile's falls where the next one's rises.
    """
    last = max(size - tile, 0)                     # the last tile ends at the image's edge
    starts = [*range(0, last, tile - overlap), last]
    full = overlap - 2 * context + 1               # the ramp climbs by 1 a pixel
    pixel = torch.arange(size, device=like.device) # within each tile, counted from its start:
    at = torch.stack([pixel - start for start in starts])                       # (tiles,size)
    rise, fall = at - context + 1, tile - context - at
    rise[0] = full                                 # the first tile has no neighbour before it,
    fall[-1] = full                                # the last none after it
    weights = rise.minimum(fall).clamp(0, full)
    weights = (weights / weights.sum(0)).to(like)
    spans = [slice(start, start + tile) for start in starts]
    return [(span, weight[span]) for span, weight in zip(spans, weights)]


# ---- Files: ours, and those published with the paper ---------------------------------------------

def read_checkpoint(path):
    """What a file holds, as a dict: a checkpoint of train.py, in which every field is as it should
    be; or anything else that torch.save wrote of a dict, for `load_model` to look into.

    path: a file; or the folder of a run, which stands for its last.pt. Read with weights_only=True,
    so that a file can hold numbers but can't run code.
    Raises ValueError with one line that names the file and what is wrong with it.
    """
    path = Path(path, "last.pt") if Path(path).is_dir() else path
    with blamed_on(path, "not a checkpoint (torn, not written by torch.save, or holding more than "
                         "plain weights)"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
    with blamed_on(path):
        if not isinstance(saved, dict):
            raise ValueError(f"not a checkpoint: it holds a {type(saved).__name__}")
        if "mioir" in saved:
            check_fields(saved)
    return saved


def load_model(path, weights="raw", device="cpu", prompts=None):
    """A model from a file: one of ours, or one published with the paper. Returns (model, info).

    path: as `read_checkpoint` takes it. weights: "raw" (what the paper evaluates) or "ema".
    prompts: (7,128,128), for published "ep".
    info: {"arch", "prompt", "sizes", "published", ...}; ours adds what train.py stored beside it.
    A bare state_dict, of our names or the published ones, is taken to be of the paper's size; it
    may lie in {"params"}, {"state_dict"} or {"model"}, its names after module., net., _orig_mod.
    Raises ValueError with one line that names the file and what is wrong with it.
    """
    saved = read_checkpoint(path)
    with blamed_on(path):
        if "mioir" in saved:
            info = {key: saved[key] for key in saved if key not in ("raw", "ema", "optimizer")}
            info["published"], state = False, saved[weights]
        else:
            state = _unwrap(saved, weights)
            check_weights(state)
            info = recognise(state)
        needs_prompts = info["published"] and info["prompt"] == "ep"
        if needs_prompts != (prompts is not None):
            raise ValueError("a published 'ep' model, and no other, needs the prompt images it was "
                             "trained with, which its file lacks: --prompts type7.npy")
        with torch.device(device):
            model = model_for(info, state)
        if info["published"]:
            load_official(model, state, prompts)
        else:
            fill(model.state_dict(), state)
        return model.eval(), info


@contextlib.contextmanager
def blamed_on(what, reason=None):
    """Around work on a file, or a part of it: what goes wrong becomes a ValueError that names it.
    (What a hostile file makes torch and Python raise can't be listed.) reason: said in place of
    the error's own words, but for those of the operating system, "No such file or directory"."""
    try:
        yield
    except Exception as error:
        words = f"key {error} is missing" if isinstance(error, KeyError) else str(error).strip()
        words = getattr(error, "strerror", None) or reason or words or type(error).__name__
        raise ValueError(f"{what}: {words.splitlines()[0][:900]}") from None


def model_for(info, state):
    """The model that info, {"arch", "prompt", "sizes"}, describes, with fresh weights, and with as
    many prompt images as there are in state: one for each task known when it was trained."""
    if info["arch"] == "classifier":
        return build_classifier(**info["sizes"])
    model = build_model(info["arch"], info["prompt"], **info["sizes"])
    if info["prompt"] == "ep" and "prompts" in state:
        count = len(state["prompts"])
        if count > len(TASKS):
            raise ValueError(f"was trained on {count} tasks, and this program knows {len(TASKS)}; "
                             "run it by the script that added the task")
        model.prompts = model.prompts.new_empty(count, 128, 128)
    return model


# ---- What a file may hold: its writer is not known, and may mean harm ----------------------------

def check_fields(saved):
    """Raises ValueError where a checkpoint of train.py is not what `Run.save` writes: most fields
    are used here as they will be later, and what goes wrong then names the field. The optimiser's
    state is not looked into: only train.py loads it."""
    with blamed_on("facts (order, periods)"):
        order, periods = saved["facts"]["order"], saved["facts"]["periods"]
        for tasks, iterations in zip(order, periods, strict=True):     # of each stage
            ", ".join(tasks), sum(iterations)
    with blamed_on("table"):
        for name, row in saved["table"]:
            f"{name:s}", [f"{number or 0:f}" for number in row.values()]
    stage, iteration = saved["stage"], saved["iteration"]
    if not (type(stage) is type(iteration) is int and 0 <= stage <= len(order) and iteration >= 0):
        raise ValueError(f"stage {stage} of {len(order)}, iteration {iteration}: there is "
                         "none such")
    if not isinstance(saved.get("optimizer", {}), dict):       # a file to restore with has none
        raise ValueError("optimizer is not what train.py writes there")
    for weights in ("raw", "ema"):
        with blamed_on(weights):
            check_weights(saved[weights])
            check_sizes(saved, saved[weights])


def check_weights(state):
    """Raises ValueError unless state is {name: tensor of finite floats}, each with numbers of its
    own: with strides of 0, a file of a kilobyte can hold a tensor of terabytes."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for name, value in state.items():
        name = str(name)[:80]
        if not (torch.is_tensor(value) and value.dtype in floats and value.device.type == "cpu"
                and value.layout == torch.strided):
            raise ValueError(f"{name} is not a tensor of floats")
        if not 0 < value.nbytes <= value.untyped_storage().nbytes():
            raise ValueError(f"{name} is larger than what is stored of it, or empty")
        if not value.float().isfinite().all():     # .float(): as a model will hold it
            raise ValueError(f"{name} holds numbers that are not finite")


def check_sizes(info, state):
    """Raises ValueError unless a model of info's arch, prompt and sizes has exactly the tensors of
    state. Nothing of the stated size is made for that: the model is built on torch's meta device,
    where tensors have a shape but no numbers. Before, its blocks are counted, each of which takes
    time to build, and none of which is without tensors."""
    with blamed_on("arch, prompt and sizes"):
        for name in ("blocks", "depths", "refinement"):        # a number, or one for each stage
            count = torch.tensor(info["sizes"].get(name, 0), dtype=torch.float64, device="cpu")
            if not (count.min() >= 0 and count.sum() + count.numel() <= len(state)):
                raise ValueError(f"size {name} does not fit the weights")
        with torch.device("meta"):
            model = model_for(info, state)
        fill(model.state_dict(), state)
    # Tables that are not stored, such as a window's index, must be small beside the weights.
    stored = sum(value.numel() for value in state.values())
    if sum(table.numel() for table in model.buffers()) > 10 ** 7 + 10 * stored:
        raise ValueError("its sizes need tables far larger than its weights")


@torch.no_grad()
def fill(slots, state):
    """Copies state into slots, both {name: tensor}. ValueError, and nothing is copied, where a name
    is missing or unexpected or has another shape. (Slots on the meta device are only compared.)"""
    faults = [f"unexpected {name}" for name in state if name not in slots]
    faults += [f"missing {name}" for name in slots if name not in state]
    shapes = {name: (tuple(state[name].shape), tuple(slots[name].shape))
              for name in slots if name in state}
    faults += [f"mis-shaped {name}: {found}, not {due}"
               for name, (found, due) in shapes.items() if found != due]
    if faults:                                     # a wrong model has hundreds: nine are shown
        raise ValueError(f"{len(faults)} weights do not fit the model: {'; '.join(faults[:9])}")
    for name, slot in slots.items():
        slot.copy_(state[name])


# ---- Published weights ---------------------------------------------------------------------------

def _unwrap(saved, weights):
    """Out of wrappers, prefixes, and buffers that the sizes imply.

    {"params", "params_ema"} is BasicSR's, {"state_dict"} Lightning's, {"model"} everybody's;
    module. comes from DistributedDataParallel, _orig_mod. from torch.compile, net. from a wrapper.
    """
    if weights == "ema" and "params_ema" not in saved:
        raise ValueError("holds no moving average of the weights (EMA): leave --weights ema out")
    for name in ("params_ema" if weights == "ema" else "params", "state_dict", "model"):
        saved = saved.get(name, saved)             # where there is no such wrapper, as it is
        if not isinstance(saved, dict):
            raise ValueError(f"{name} holds no weights")
    prefix = re.compile(r"^((module|net|_orig_mod)\.)+")
    return {prefix.sub("", str(key)): value for key, value in saved.items()
            if not str(key).endswith(("relative_position_index", "attn_mask"))}


# A parameter that tells a network, by its name in ours and in the published one. PromptIR has
# Restormer's, too, so it is asked for first. A few of the latter are in ours, too, as SRResNet's
# conv_hr: so weights that have the former are ours.
_MARKS = {
    "promptir": ("interact.0.generate.components", "prompt1.prompt_param"),
    "restormer": ("embed.weight", "latent.0.attn.temperature"),
    "uformer": ("input.weight", "input_proj.proj.0.weight"),
    "swinir": ("norm_first.weight", "conv_after_body.weight"),
    "srresnet": ("blocks.0.conv1.weight", "conv_hr.weight"),
    "classifier": ("features.0.weight", "CondNet.0.weight")}


def recognise(state):
    """{"arch", "prompt", "sizes", "published"} of weights, told by their keys and shapes: what
    train.py would have stored beside them. ValueError if they are neither ours nor published.

    The paper's sizes are assumed, and `fill` refuses any others: keys and shapes tell most of them,
    but not the number of heads. Of our classifier the last layer tells whether it knows "none".
    """
    for arch, (ours, theirs) in _MARKS.items():
        if ours in state or theirs in state:
            # F_ext alone has such kernels: (64,1,7,7) for a grey prompt, (64,3,7,7) for x.
            channels = {value.shape[1] for value in state.values() if value.shape[2:] == (7, 7)}
            prompt = None if not channels else "ep" if 1 in channels else "ap"
            none = len(state.get("head.bias", [])) == len(ANSWERS)
            return {"arch": arch, "prompt": prompt, "sizes": {"none": True} if none else {},
                    "published": ours not in state}
    raise ValueError(f"none of the published models: its keys begin with {', '.join([*state][:3])}")


def load_official(model, state_dict, prompts=None):
    """Loads published weights into one of our models (backbone or TaskClassifier), strictly.

    state_dict: {published name: tensor}, bare or wrapped in {"params", "params_ema"} or with a
    "module." prefix. prompts: (7,128,128) array, the images of a published "ep" model (type7.npy).
    Raises ValueError that names missing, unexpected and mis-shaped keys. Returns the model.
    """
    arch = next((name for name in ARCHS if type(model) is MODELS[name]), "classifier")
    state = _unwrap(state_dict, "raw")
    slots = by_published_names(arch, model, model.state_dict())                 # where to copy to
    if prompts is None:
        slots.pop("prompts", None)                 # the model keeps those that it has
    else:                                          # they keep their name
        with blamed_on("prompts"):
            state["prompts"] = torch.as_tensor(prompts, device="cpu")
    check_weights(state)
    fill(slots, state)
    return model


# What a part of our names is called in the published ones. {n} is a number from 0 up, {n1} and {n2}
# are the next two: our lists count from 0, most of theirs from 1. {k} is "scale" or "shift".
_NAMES = {
    "srresnet without prompt": {"blocks": "body"},
    "srresnet": {"blocks.{n}": "body{n1}.0", "path.extract.0": "F_ext_net",     # a list for each
                 "path.{k}.block{n1}": "prompt_{k}{n1}", "path.{k}.hr": "prompt_{k}hr",
                 "path.{k}.last": "prompt_{k}out"},
    "swinir": {"path.extract.0": "F_ext_net", "path.{k}.group{n1}": "layers.{n}.prompt_{k}",
               "path.{k}.after_body": "prompt_{k}_after_body", "path.{k}.last": "prompt_{k}_last",
               "path.{k}.before_upsample": "prompt_{k}_before_upsample", "groups": "layers",
               "norm_first": "patch_embed.norm", "norm_last": "norm", "stage": "residual_group",
               "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "project": "proj",
               "bias_table": "relative_position_bias_table",
               "conv_before_upsample": "conv_before_upsample.0"},
    "restormer": {"path.extract.{n}": "F_ext_net{n1}", "path.{k}.latent": "prompt_{k}1",
                  "path.{k}.decoder3": "prompt_{k}2", "path.{k}.decoder2": "prompt_{k}3",
                  "path.{k}.decoder1": "prompt_{k}4", "path.{k}.refinement": "prompt_{k}5",
                  "path.{k}.output": "prompt_{k}out", "embed": "patch_embed.proj",
                  "encoder.{n}": "encoder_level{n1}", "decoder.{n}": "decoder_level{n1}",
                  "down.{n}": "down{n1}_{n2}.body", "up.{n}": "up{n2}_{n1}.body",
                  "reduce.{n}": "reduce_chan_level{n1}", "norm1": "norm1.body",
                  "norm2": "norm2.body", "attn.dwconv": "attn.qkv_dwconv",
                  "attn.project": "attn.project_out"},
    # All of Restormer's, and:
    "promptir": {"interact.{n}.generate": "prompt{n1}", "interact.{n}.block": "noise_level{n1}",
                 "interact.{n}.reduce": "reduce_noise_level{n1}", "components": "prompt_param",
                 "linear": "linear_layer", "conv": "conv3x3"},
    # "dowsample": so it is published.
    "uformer": {"path.extract.{n}": "F_ext_net{n1}", "path.{k}.bottleneck": "prompt_{k}0",
                "path.{k}.decoder{n}": "prompt_{k}{n1}", "path.{k}.output": "prompt_{k}5",
                "input": "input_proj.proj.0", "encoder.{n}": "encoderlayer_{n}",
                "down.{n}": "dowsample_{n}.conv.0", "bottleneck": "conv",
                "up.{n}": "upsample_{n}.deconv.0", "decoder.{n}": "decoderlayer_{n}",
                "output": "output_proj.proj.0", "modulator": "modulator.weight",
                "linear1": "linear1.0", "linear2": "linear2.0", "dwconv": "dwconv.0",
                "project": "proj", "bias_table": "relative_position_bias_table"},
    "classifier": {"features": "CondNet", "head": "lastOut"},
}


def by_published_names(arch, model, tensors):
    """{our name: tensor} -> {published name: tensor}: the same tensors, or views of them, so that
    what is copied into the result is in ours. Prompt images keep their name."""
    plain = arch == "srresnet" and model.prompt is None
    table = _NAMES["srresnet without prompt" if plain else arch]
    if arch == "promptir":
        table = _NAMES["restormer"] | table
    parts = {}                                     # {"encoder.0": "encoder_level1", ...}
    for ours, theirs in table.items():
        for n in range(16):                        # as many as SRResNet has blocks
            for k in ("scale", "shift"):
                values = dict(n=n, n1=n + 1, n2=n + 2, k=k)
                parts[ours.format(**values)] = theirs.format(**values)
    # One pass over a name, the longest part first: what has been replaced is not looked at again.
    longest_first = "|".join(map(re.escape, sorted(parts, key=len, reverse=True)))
    part = re.compile(rf"(?<![^.])({longest_first})(?![^.])")          # between two dots, or ends
    renamed = {}
    for name, value in tensors.items():
        name = part.sub(lambda found: parts[found[0]], name)
        if arch == "uformer" and ".qkv." in name:  # our qkv is their to_q, then their to_kv
            third = len(value) // 3
            renamed[name.replace(".qkv.", ".qkv.to_q.")] = value[:third]
            renamed[name.replace(".qkv.", ".qkv.to_kv.")] = value[third:]
        else:
            renamed[name] = value
    return renamed
