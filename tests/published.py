"""The published layers, written down as their authors' code runs them: bench.py times ours against
this, so it must share no habit of ours. Nothing here comes from mioir.py; golden outputs check it.

A network is a plain function of a state dict with the published names (golden/models.json.gz):

    y = restormer(w, x, p)         w: {name: tensor}; x: (N,3,H,W); p: prompt images, or None
    net = Published("restormer", w, prompts)      the same as a module: y = net(x, task)

p is (N,1,128,128) for an explicit prompt, x itself for an adaptive one, and None for a plain model
and for PromptIR. Sizes are read off the weights. What differs from mioir.py, always on purpose:
  * Restormer's layer norm is written out; Swin's and Uformer's is torch's own, as published
  * q and k are normalised at full size; attention over all windows at once; softmax spelled out
  * Uformer makes its shift mask in every block, and has q apart from k and v
  * each image reads its own prompt; f * scale + shift + f; drop path divides, then multiplies
Tokens t are (N,HW,C), feature maps f are (N,C,H,W).
"""
import functools

import torch
from torch import nn
from torch.nn import functional as F

WINDOW, SHIFT = 8, 4                   # of SwinIR and Uformer
DROP_PATH = 0.1                        # the largest probability to leave a branch out


# ---- A layer is its weights and the name they have -----------------------------------------------

def conv(w, name, f, padding=0, stride=1, groups=1):
    return F.conv2d(f, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding, 1, groups)


def depthwise(w, name, f):
    return conv(w, name, f, padding=1, groups=f.shape[1])


def linear(w, name, t):
    return F.linear(t, w[f"{name}.weight"], w[f"{name}.bias"])


def layer_norm(w, name, t):
    """torch's own, on tokens (N,HW,C): what SwinIR and Uformer use."""
    return F.layer_norm(t, t.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def to_tokens(f):
    """(N,C,H,W) -> (N,HW,C), in memory too."""
    return f.flatten(2).transpose(1, 2).contiguous()


def to_map(t, height):
    """(N,HW,C) -> (N,C,H,W)."""
    n, length, c = t.shape
    return t.transpose(1, 2).contiguous().view(n, c, height, length // height)


def blocks_of(w, prefix, last_part):
    """The names prefix0, prefix1, ... as far as the weights have them."""
    names = []
    while f"{prefix}{len(names)}{last_part}" in w:
        names.append(f"{prefix}{len(names)}")
    return names


# ---- The prompt ----------------------------------------------------------------------------------

def extract(w, name, p):
    """F_ext: prompt images (N,1 or 3,H,W) -> z (N,64); None, for plain models, stays None."""
    if p is None:
        return None
    for layer in ("conv1", "conv2", "conv3"):
        p = F.pad(p, (1, 1, 1, 1))                         # the published code pads by a layer
        p = F.relu(conv(w, f"{name}.{layer}", p, stride=2), inplace=True)
    return p.mean((2, 3))


def modulate(w, site, z, f, inside=""):
    """f * scale + shift + f on a map (N,C,H,W) or tokens (N,HW,C)."""
    if z is None:
        return f
    scale = linear(w, f"{inside}prompt_scale{site}", z)
    shift = linear(w, f"{inside}prompt_shift{site}", z)
    if f.ndim == 3:
        scale, shift = scale[:, None, :], shift[:, None, :]
    else:
        scale, shift = scale[:, :, None, None], shift[:, :, None, None]
    return f * scale + shift + f


# ---- SRResNet ------------------------------------------------------------------------------------

def srresnet(w, x, p=None, training=False):
    z = extract(w, "F_ext_net", p)
    f = F.leaky_relu(conv(w, "conv_first", x, 1), 0.1, inplace=True)
    if z is None:
        names = blocks_of(w, "body.", ".conv1.weight")
    else:                                                  # each block is a list of its own
        names = [f"body{i}.0" for i in range(1, 100) if f"body{i}.0.conv1.weight" in w]
    for i, name in enumerate(names, 1):
        branch = F.relu(conv(w, f"{name}.conv1", f, 1), inplace=True)
        branch = conv(w, f"{name}.conv2", branch, 1)
        f = modulate(w, i, z, f + branch * 1.0)            # times res_scale, which is 1
    f = F.leaky_relu(conv(w, "conv_hr", f, 1), 0.1, inplace=True)
    f = modulate(w, "hr", z, f)
    return modulate(w, "out", z, conv(w, "conv_last", f, 1)) + x


# ---- Restormer and PromptIR ----------------------------------------------------------------------

def norm_by_hand(w, name, f):
    """Restormer's layer norm. Rearranged to b (h w) c and back, which changes strides alone."""
    n, c, h, width = f.shape
    t = f.permute(0, 2, 3, 1).reshape(n, h * width, c)
    mu = t.mean(-1, keepdim=True)
    sigma = t.var(-1, keepdim=True, unbiased=False)
    t = (t - mu) / torch.sqrt(sigma + 1e-5) * w[f"{name}.body.weight"] + w[f"{name}.body.bias"]
    return t.reshape(n, h, width, c).permute(0, 3, 1, 2)


def channel_attention(w, name, f):
    """MDTA: q and k of length 1 along the pixels; softmax(q k^T * temperature) v."""
    n, c, h, width = f.shape
    temperature = w[f"{name}.temperature"]
    heads = len(temperature)
    q, k, v = depthwise(w, f"{name}.qkv_dwconv", conv(w, f"{name}.qkv", f)).chunk(3, dim=1)
    q = q.reshape(n, heads, c // heads, h * width)
    k = k.reshape(n, heads, c // heads, h * width)
    v = v.reshape(n, heads, c // heads, h * width)
    q = F.normalize(q, dim=-1)
    k = F.normalize(k, dim=-1)
    attention = (q @ k.transpose(-2, -1)) * temperature
    attention = attention.softmax(dim=-1)
    return conv(w, f"{name}.project_out", (attention @ v).reshape(n, c, h, width))


def gated_feed_forward(w, name, f):
    """GDFN: gelu(one half) times the other."""
    a, b = depthwise(w, f"{name}.dwconv", conv(w, f"{name}.project_in", f)).chunk(2, dim=1)
    return conv(w, f"{name}.project_out", F.gelu(a) * b)


def restormer_block(w, name, f):
    f = f + channel_attention(w, f"{name}.attn", norm_by_hand(w, f"{name}.norm1", f))
    return f + gated_feed_forward(w, f"{name}.ffn", norm_by_hand(w, f"{name}.norm2", f))


def restormer_level(w, level, f):
    for name in blocks_of(w, f"{level}.", ".attn.temperature"):
        f = restormer_block(w, name, f)
    return f


def down(w, name, f):
    return F.pixel_unshuffle(conv(w, f"{name}.body.0", f, 1), 2)


def up(w, name, f):
    return F.pixel_shuffle(conv(w, f"{name}.body.0", f, 1), 2)


def encode(w, x):
    """The way down of both networks: the three maps for the skips, then the latent one."""
    f1 = restormer_level(w, "encoder_level1", conv(w, "patch_embed.proj", x, 1))
    f2 = restormer_level(w, "encoder_level2", down(w, "down1_2", f1))
    f3 = restormer_level(w, "encoder_level3", down(w, "down2_3", f2))
    return f1, f2, f3, restormer_level(w, "latent", down(w, "down3_4", f3))


def restormer(w, x, p=None, training=False):
    z1, z2, z3, z4 = [extract(w, f"F_ext_net{i}", p) for i in (1, 2, 3, 4)]
    f1, f2, f3, f = encode(w, x)
    f = modulate(w, 1, z1, f)
    f = conv(w, "reduce_chan_level3", torch.cat([up(w, "up4_3", f), f3], 1))
    f = modulate(w, 2, z2, restormer_level(w, "decoder_level3", f))
    f = conv(w, "reduce_chan_level2", torch.cat([up(w, "up3_2", f), f2], 1))
    f = modulate(w, 3, z3, restormer_level(w, "decoder_level2", f))
    f = torch.cat([up(w, "up2_1", f), f1], 1)
    f = modulate(w, 4, z3, restormer_level(w, "decoder_level1", f))
    f = modulate(w, 5, z3, restormer_level(w, "refinement", f))
    return modulate(w, "out", z4, conv(w, "output", f, 1)) + x


def with_prompt(w, level, f):
    """PromptIR: features make a prompt, both pass a block together, and come down in channels."""
    n, _, h, width = f.shape
    weights = linear(w, f"prompt{level}.linear_layer", f.mean((-2, -1))).softmax(dim=1)    # (N,5)
    maps = w[f"prompt{level}.prompt_param"].unsqueeze(0).repeat(n, 1, 1, 1, 1, 1).squeeze(1)
    prompt = (weights[:, :, None, None, None] * maps).sum(dim=1)                   # (N,C,size,size)
    prompt = F.interpolate(prompt, (h, width), mode="bilinear")
    prompt = conv(w, f"prompt{level}.conv3x3", prompt, 1)
    f = restormer_block(w, f"noise_level{level}", torch.cat([f, prompt], 1))
    return conv(w, f"reduce_noise_level{level}", f)


def promptir(w, x, p=None, training=False):
    f1, f2, f3, f = encode(w, x)
    f = up(w, "up4_3", with_prompt(w, 3, f))
    f = restormer_level(w, "decoder_level3", conv(w, "reduce_chan_level3", torch.cat([f, f3], 1)))
    f = up(w, "up3_2", with_prompt(w, 2, f))
    f = restormer_level(w, "decoder_level2", conv(w, "reduce_chan_level2", torch.cat([f, f2], 1)))
    f = up(w, "up2_1", with_prompt(w, 1, f))
    f = restormer_level(w, "decoder_level1", torch.cat([f, f1], 1))
    return conv(w, "output", restormer_level(w, "refinement", f), 1) + x


# ---- What SwinIR and Uformer share ---------------------------------------------------------------

def partition(f):
    """(N,H,W,C) -> (N * windows, 8, 8, C)."""
    n, h, width, c = f.shape
    f = f.view(n, h // WINDOW, WINDOW, width // WINDOW, WINDOW, c)
    return f.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, WINDOW, WINDOW, c)


def reverse(windows, h, width):
    """(N * windows, 8, 8, C) -> (N,H,W,C)."""
    c = windows.shape[-1]
    f = windows.view(-1, h // WINDOW, width // WINDOW, WINDOW, WINDOW, c)
    return f.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h, width, c)


def shift_mask(h, width, device):
    """(windows,64,64): -100 between pixels that only the shift made neighbours, else 0."""
    region, number = torch.zeros(1, h, width, 1, device=device), 0
    bands = slice(0, -WINDOW), slice(-WINDOW, -SHIFT), slice(-SHIFT, None)
    for rows in bands:
        for columns in bands:
            region[:, rows, columns, :] = number
            number += 1
    region = partition(region).view(-1, WINDOW * WINDOW)
    apart = region.unsqueeze(1) - region.unsqueeze(2)
    return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)


# SwinIR's mask is a buffer of its module, made once for the size that it was built for. (At another
# size the published code makes it anew in every block; here it is kept, in their favour.)
kept_shift_mask = functools.cache(shift_mask)


@functools.cache
def relative_position_index(device):
    """(64,64): which row of the bias table two pixels of a window use. A buffer, made once."""
    at = torch.arange(WINDOW, device=device)
    y, x = torch.meshgrid(at, at, indexing="ij")
    pixels = torch.stack([y.flatten(), x.flatten()])                                # (2,64)
    apart = pixels[:, :, None] - pixels[:, None, :] + WINDOW - 1                    # 0 .. 14
    return apart[0] * (2 * WINDOW - 1) + apart[1]


def attend(w, name, q, k, v, mask):
    """softmax(q k^T / sqrt(c) + bias + mask) v. q, k, v: (N * windows, heads, 64, c)."""
    all_windows, heads, length, c = q.shape
    attention = (q * c ** -0.5) @ k.transpose(-2, -1)
    index = relative_position_index(q.device)
    bias = w[f"{name}.relative_position_bias_table"][index.view(-1)].view(length, length, heads)
    attention = attention + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
    if mask is not None:
        attention = attention.view(-1, len(mask), heads, length, length) + mask[None, :, None]
        attention = attention.view(-1, heads, length, length)
    out = attention.softmax(dim=-1) @ v
    return linear(w, f"{name}.proj", out.transpose(1, 2).reshape(all_windows, length, heads * c))


def drop_path(f, probability):
    """Leaves out the branch of an image, and divides the others, so that the mean stays."""
    if probability == 0:
        return f
    keep = 1 - probability
    return f.div(keep) * f.new_empty(f.shape[0], 1, 1).bernoulli_(keep)


def rising(count):
    """Drop path's probabilities: from 0 to the largest along a run of blocks."""
    return [DROP_PATH * i / max(count - 1, 1) for i in range(count)]


def window_block(w, name, t, height, shift, mask, drop, attention, mlp):
    """t + attention(norm(t)) in windows, then t + mlp(norm(t)); t: (N,HW,C)."""
    n, length, c = t.shape
    width = length // height
    f = layer_norm(w, f"{name}.norm1", t).view(n, height, width, c)
    if shift:
        f = torch.roll(f, (-shift, -shift), (1, 2))
    windows = partition(f).view(-1, WINDOW * WINDOW, c)
    if f"{name}.modulator.weight" in w:                                    # Uformer's decoder
        windows = windows + w[f"{name}.modulator.weight"]
    windows = attention(w, f"{name}.attn", windows, mask)
    f = reverse(windows.view(-1, WINDOW, WINDOW, c), height, width)
    if shift:
        f = torch.roll(f, (shift, shift), (1, 2))
    t = t + drop_path(f.view(n, length, c), drop)
    return t + drop_path(mlp(w, f"{name}.mlp", layer_norm(w, f"{name}.norm2", t), height), drop)


# ---- SwinIR --------------------------------------------------------------------------------------

def swin_attention(w, name, t, mask):
    windows, length, c = t.shape
    heads = w[f"{name}.relative_position_bias_table"].shape[1]
    qkv = linear(w, f"{name}.qkv", t).reshape(windows, length, 3, heads, c // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attend(w, name, q, k, v, mask)


def swin_mlp(w, name, t, height):
    return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", t)))


@functools.cache
def mean_colour(device):
    """DIV2K's, taken off and put back; kept by the module."""
    return torch.tensor((0.4488, 0.4371, 0.4040), device=device).view(1, 3, 1, 1)


def swinir(w, x, p=None, training=False):
    z = extract(w, "F_ext_net", p)
    mean = mean_colour(x.device)
    height, mask = x.shape[2], kept_shift_mask(*x.shape[2:], x.device)
    groups = blocks_of(w, "layers.", ".conv.weight")
    blocks = [blocks_of(w, f"{group}.residual_group.blocks.", ".norm1.weight") for group in groups]
    drops = iter(rising(sum(map(len, blocks))))

    shallow = conv(w, "conv_first", x - mean, 1)
    t = layer_norm(w, "patch_embed.norm", to_tokens(shallow))
    for group, names in zip(groups, blocks):
        before = t
        for i, name in enumerate(names):
            shift, drop = SHIFT * (i % 2), next(drops) * training
            t = window_block(w, name, t, height, shift, mask if shift else None, drop,
                             swin_attention, swin_mlp)
        t = to_tokens(conv(w, f"{group}.conv", to_map(t, height), 1)) + before
        t = modulate(w, "", z, t, inside=f"{group}.")
    f = conv(w, "conv_after_body", to_map(layer_norm(w, "norm", t), height), 1) + shallow
    f = modulate(w, "_after_body", z, f)
    f = F.leaky_relu(conv(w, "conv_before_upsample.0", f, 1), 0.01, inplace=True)
    f = modulate(w, "_before_upsample", z, f)
    return modulate(w, "_last", z, conv(w, "conv_last", f, 1)) + mean


# ---- Uformer -------------------------------------------------------------------------------------

def uformer_attention(w, name, t, mask):
    windows, length, c = t.shape
    heads = w[f"{name}.relative_position_bias_table"].shape[1]
    q = linear(w, f"{name}.qkv.to_q", t).reshape(windows, length, 1, heads, c // heads)
    kv = linear(w, f"{name}.qkv.to_kv", t).reshape(windows, length, 2, heads, c // heads)
    q, = q.permute(2, 0, 3, 1, 4)
    k, v = kv.permute(2, 0, 3, 1, 4)
    return attend(w, name, q, k, v, mask)


def leff(w, name, t, height):
    """An MLP with a depthwise convolution between, for which tokens become a map and go back."""
    n, length, _ = t.shape
    t = F.gelu(linear(w, f"{name}.linear1.0", t))
    f = t.reshape(n, height, length // height, -1).permute(0, 3, 1, 2)
    f = F.gelu(depthwise(w, f"{name}.dwconv.0", f))
    t = f.permute(0, 2, 3, 1).reshape(n, length, -1)
    return linear(w, f"{name}.linear2.0", t)


def uformer_stage(w, stage, t, drops):
    """Blocks of one resolution; every second one is shifted, and makes its mask itself."""
    height = int(t.shape[1] ** 0.5)                        # the published code runs on squares
    for i, name in enumerate(blocks_of(w, f"{stage}.blocks.", ".norm1.weight")):
        shift = SHIFT * (i % 2)
        mask = shift_mask(height, height, t.device) if shift else None
        t = window_block(w, name, t, height, shift, mask, next(drops), uformer_attention, leff)
    return t


def uformer_drops(w):
    """Drop path's probabilities, block by block: up along the encoder, down along the decoder."""
    def depth(stage):
        return len(blocks_of(w, f"{stage}.blocks.", ".norm1.weight"))
    up_the_encoder = rising(sum(depth(f"encoderlayer_{i}") for i in range(4)))
    return up_the_encoder + [DROP_PATH] * depth("conv") + up_the_encoder[::-1]


def uformer(w, x, p=None, training=False):
    z = [extract(w, f"F_ext_net{i}", p) for i in (1, 2, 3, 4, 5)]
    drops = iter([probability * training for probability in uformer_drops(w)])
    skips = []
    t = to_tokens(F.leaky_relu(conv(w, "input_proj.proj.0", x, 1), 0.01, inplace=True))
    for i in range(4):
        t = uformer_stage(w, f"encoderlayer_{i}", t, drops)
        skips.append(t)
        f = to_map(t, int(t.shape[1] ** 0.5))
        t = to_tokens(conv(w, f"dowsample_{i}.conv.0", f, padding=1, stride=2))
    t = modulate(w, 0, z[0], uformer_stage(w, "conv", t, drops))
    for i in range(4):
        name = f"upsample_{i}.deconv.0"
        f = to_map(t, int(t.shape[1] ** 0.5))
        f = F.conv_transpose2d(f, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
        t = torch.cat([to_tokens(f), skips[3 - i]], -1)
        t = modulate(w, i + 1, z[i], uformer_stage(w, f"decoderlayer_{i}", t, drops))
    f = conv(w, "output_proj.proj.0", to_map(t, x.shape[2]), 1)
    return modulate(w, 5, z[4], f) + x


# ---- As a module, for whoever calls, trains or counts one ----------------------------------------

FORWARD = {"srresnet": srresnet, "swinir": swinir, "restormer": restormer, "uformer": uformer,
           "promptir": promptir}


class Published(nn.Module):
    """net(x, task) with the weights of a published state dict, which become its parameters.

    prompts: (7,128,128), of an explicit-prompt model; adaptive: the image is its own prompt.
    """
    def __init__(self, arch, state, prompts=None, adaptive=False):
        super().__init__()
        self.arch, self.adaptive = arch, adaptive
        self.w = {}
        for name, value in state.items():
            self.w[name] = nn.Parameter(value.detach().clone())
            self.register_parameter(name.replace(".", "/"), self.w[name])
        self.register_buffer("prompts", prompts)

    def forward(self, x, task=None):
        p = None
        if self.prompts is not None:
            p = self.prompts[task][:, None]                # (N,1,128,128): one for every image
        if self.adaptive:
            p = x
        return FORWARD[self.arch](self.w, x, p, self.training)
