"""Calls of the kernels of the training step's ops, and what plain torch answers, for the
emulator's tests."""

import ctypes

import torch
import torch.nn.functional as F
from emulator import DTYPE_CODES, address, f64, i32, i64, ptr, structure
from numerics import assert_rows_as_accurate_as_torch, nudge, worst_row

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

AddRmsNormShape = structure("AddRmsNormShape", stream=i32, delta=i32, y=i32, rows=i64, channels=i64)
AddRmsNormForward = structure(
    "AddRmsNormForward",
    shape=AddRmsNormShape,
    x=ptr,
    delta=ptr,
    weight=ptr,
    sum=ptr,
    y=ptr,
    inv_rms=ptr,
    eps=f64,
)
AddRmsNormBackward = structure(
    "AddRmsNormBackward",
    shape=AddRmsNormShape,
    d_sum=ptr,
    d_y=ptr,
    sum=ptr,
    inv_rms=ptr,
    weight=ptr,
    d_x=ptr,
    d_delta=ptr,
    d_weight=ptr,
    workspace=ptr,
)
RotaryShape = structure("RotaryShape", dtype=i32, batch=i64, steps=i64, heads=i64, head_dim=i64)
RotaryForward = structure(
    "RotaryForward", shape=RotaryShape, qkv=ptr, cos=ptr, sin=ptr, q=ptr, k=ptr, v=ptr
)
RotaryBackward = structure(
    "RotaryBackward", shape=RotaryShape, dq=ptr, dk=ptr, dv=ptr, cos=ptr, sin=ptr, d_qkv=ptr
)
GeluForward = structure("GeluForward", dtype=i32, n=i64, z=ptr, active=ptr)
GeluBackward = structure("GeluBackward", dtype=i32, n=i64, z=ptr, d_active=ptr, active=ptr, d_z=ptr)
CrossEntropyRows = structure(
    "CrossEntropyRows",
    dtype=i32,
    rows=i64,
    vocab=i64,
    row_stride=i64,
    ignore_index=i64,
    gradients=ctypes.c_bool,
    logits=ptr,
    targets=ptr,
    loss=ptr,
    correct=ptr,
)
CrossEntropySums = structure(
    "CrossEntropySums", loss=ptr, correct=ptr, rows=i64, total=ptr, n_correct=ptr
)

TokenConcatNormShape = structure(
    "TokenConcatNormShape",
    table=i32,
    x=i32,
    delta=i32,
    y=i32,
    rows=i64,
    vocab=i64,
    token_channels=i64,
    mel_channels=i64,
)
TokenConcatNormForward = structure(
    "TokenConcatNormForward",
    shape=TokenConcatNormShape,
    tokens=ptr,
    table=ptr,
    x=ptr,
    delta=ptr,
    mel_weight=ptr,
    weight=ptr,
    cat=ptr,
    y=ptr,
    mel_inv_rms=ptr,
    inv_rms=ptr,
    mel_eps=f64,
    eps=f64,
)
TokenConcatNormBackward = structure(
    "TokenConcatNormBackward",
    shape=TokenConcatNormShape,
    d_cat=ptr,
    d_y=ptr,
    cat=ptr,
    x=ptr,
    delta=ptr,
    mel_inv_rms=ptr,
    inv_rms=ptr,
    mel_weight=ptr,
    weight=ptr,
    d_tokens=ptr,
    d_x=ptr,
    d_delta=ptr,
    d_weights=ptr,
    workspace=ptr,
)


def check_rows(answers):
    """{name: (got, plain torch, float64, float64 of nudged inputs)} to the rule, row by row."""
    for name, values in answers.items():
        assert_rows_as_accurate_as_torch(name, *values)


def worst_of_rows(answers):
    """The largest error of a row, 1 being its limit."""
    return max(worst_row(*values)[0] for values in answers.values())


def differentiate(function, tensors, d_outputs):
    """Outputs of `function` and the gradients of all `tensors` but None, in order."""
    leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    pairs = [(y, d.to(y.dtype)) for y, d in zip(outputs, d_outputs, strict=True) if d is not None]
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad([y for y, _ in pairs], wanted, [d for _, d in pairs])
    return [*(y.detach() for y in outputs), *grads]


def compare(names, got, function, tensors, d_outputs):
    """What `check_rows` takes: `function` in the tensors' own types, in float64, and nudged."""
    kinds = [t.dtype for t in tensors if t is not None]
    wide = [t if t is None else t.double() for t in tensors]
    moved = [t if t is None else nudge(t, kinds[0]) for t in wide]
    answers = [differentiate(function, ts, d_outputs) for ts in (tensors, wide, moved)]
    return {
        name: values for name, *values in zip(names, got, *answers, strict=True) if name is not None
    }


# ---- add_rms_norm


def norm_reference(x, delta, weight, y_dtype, eps=1e-6):
    """s and y, as wgpt.ops.reference has it."""
    total = x if delta is None else x + delta
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    y = F.rms_norm(wide, wide.shape[-1:], weight.to(wide.dtype), eps)
    return total.to(x.dtype), y if y.dtype == torch.float64 else y.to(y_dtype)


def norm(emu, rows, channels, stream, delta_dtype, y_dtype, seed=0, aligned=True):
    """Forward and backward: what `compare` gives. delta_dtype None: there is no delta."""
    g = torch.Generator().manual_seed(seed)

    def tensor(dtype, *shape):
        values = torch.randn(shape, generator=g).to(dtype)
        if aligned:
            return emu.tensor(values)
        flat = emu.empty((values.numel() + 1,), dtype)[1:]
        return flat.view(shape).copy_(values)

    x, d_sum = tensor(stream, rows, channels), tensor(stream, rows, channels)
    delta = None if delta_dtype is None else tensor(delta_dtype, rows, channels)
    weight, d_y = tensor(torch.float32, channels), tensor(y_dtype, rows, channels)
    codes = (DTYPE_CODES[t] for t in (stream, delta_dtype or stream, y_dtype))
    shape = AddRmsNormShape(*codes, rows, channels)
    total = None if delta is None else emu.empty(x.shape, stream)
    y, inv_rms = emu.empty(x.shape, y_dtype), emu.empty((rows,), torch.float32)
    tensors = (x, delta, weight, total, y, inv_rms)
    emu.call("add_rms_norm_forward", AddRmsNormForward(shape, *map(address, tensors), 1e-6))
    d_x, d_weight = emu.empty(x.shape, stream), emu.empty(weight.shape, torch.float32)
    other_type = delta_dtype not in (None, stream)
    d_delta = emu.empty(x.shape, delta_dtype) if other_type else None
    work = emu.workspace("add_rms_norm_backward_workspace_bytes", shape)
    seen = x if delta is None else total
    tensors = (None if delta is None else d_sum, d_y, seen, inv_rms, weight, d_x, d_delta, d_weight)
    emu.call(
        "add_rms_norm_backward", AddRmsNormBackward(shape, *map(address, tensors), address(work))
    )

    def function(x, delta, weight):
        return norm_reference(x, delta, weight, y_dtype)

    if delta is None:
        names, got = ("d_x", "d_weight"), (d_x, d_weight)
        outputs, d_outputs = (None, "y"), (None, d_y)
        got = (x, y, *got)
    else:
        names = ("d_x", "d_delta", "d_weight")
        outputs, d_outputs = ("sum", "y"), (d_sum, d_y)
        got = (total, y, d_x, d_x if d_delta is None else d_delta, d_weight)
    return compare((*outputs, *names), got, function, (x, delta, weight), d_outputs)


def norm_alone(emu, x, delta, y_dtype):
    """sum (x without a delta) and y of a forward with weights of one."""
    weight = emu.tensor(torch.ones(x.shape[1]))
    shape = AddRmsNormShape(
        DTYPE_CODES[x.dtype], DTYPE_CODES[x.dtype], DTYPE_CODES[y_dtype], *x.shape
    )
    total = None if delta is None else emu.empty(x.shape, x.dtype)
    y, inv_rms = emu.empty(x.shape, y_dtype), emu.empty((len(x),), torch.float32)
    tensors = (emu.tensor(x), emu.tensor(delta), weight, total, y, inv_rms)
    emu.call("add_rms_norm_forward", AddRmsNormForward(shape, *map(address, tensors), 1e-6))
    return x if total is None else total, y


# ---- token_concat_norm


def concat_norm(emu, rows, ct, cm, table_type, delta_type, y_type, seed=0):
    """Forward and backward: what `compare` gives. delta_type None: there is no delta."""
    g = torch.Generator().manual_seed(seed)
    c, vocab = ct + cm, 5

    def tensor(dtype, *shape, gain=1.0):
        return emu.tensor((torch.randn(shape, generator=g) * gain).to(dtype))

    tokens = emu.tensor(torch.randint(vocab, (rows,), generator=g))
    table, x = tensor(table_type, vocab, ct, gain=0.1), tensor(table_type, rows, cm)
    delta = None if delta_type is None else tensor(delta_type, rows, cm)
    weights = tensor(torch.float32, cm, gain=0.1), tensor(torch.float32, c)
    d_cat, d_y = tensor(table_type, rows, c), tensor(y_type, rows, c)
    codes = (DTYPE_CODES[t] for t in (table_type, table_type, delta_type or table_type, y_type))
    shape = TokenConcatNormShape(*codes, rows, vocab, ct, cm)
    cat, y = emu.empty((rows, c), table_type), emu.empty((rows, c), y_type)
    roots = [emu.empty((rows,), torch.float32) for _ in range(2)]
    tensors = (tokens, table, x, delta, *weights, cat, y, *roots)
    call = TokenConcatNormForward(shape, *map(address, tensors), 1e-5, 1e-6)
    emu.call("token_concat_norm_forward", call)
    d_tokens, d_x = emu.empty((rows, ct), table_type), emu.empty(x.shape, table_type)
    has_type = delta_type not in (None, table_type)
    d_delta = emu.empty(x.shape, delta_type) if has_type else None
    d_weights = emu.empty((c + cm,), torch.float32)
    work = emu.workspace("token_concat_norm_backward_workspace_bytes", shape)
    tensors = (d_cat, d_y, cat, x, delta, *roots, *weights, d_tokens, d_x, d_delta, d_weights, work)
    call = TokenConcatNormBackward(shape, *map(address, tensors))
    emu.call("token_concat_norm_backward", call)

    def function(embedded, x, delta, mel_weight, weight):
        mel = norm_reference(x, delta, mel_weight, table_type, 1e-5)[1]
        return norm_reference(torch.cat([embedded, mel], -1), None, weight, y_type)

    names = ["cat", "y", "d_tokens", "d_x", "d_delta", "d_mel_weight", "d_weight"]
    got = [cat, y, d_tokens, d_x, d_x if d_delta is None else d_delta, d_weights[c:], d_weights[:c]]
    if delta is None:
        del names[4], got[4]
    inputs = (table[tokens], x, delta, *weights)
    return compare(names, got, function, inputs, (d_cat, d_y))


# ---- rotary_qkv


def rotary_reference(qkv, cos, sin):
    wide = torch.promote_types(qkv.dtype, torch.float32)
    cos, sin = (angle[:, None].to(wide) for angle in (cos, sin))

    def rotated(x):
        first, second = x.to(wide).chunk(2, dim=-1)
        y = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return y.to(qkv.dtype)

    q, k, v = qkv.unbind(2)
    return rotated(q), rotated(k), v


def rotary(emu, b, t, h, d, dtype, seed=0):
    """Forward and backward: what `compare` gives."""
    g = torch.Generator().manual_seed(seed)
    qkv = emu.tensor(torch.randn(b, t, 3, h, d, generator=g).to(dtype))
    angles = torch.rand(t, d // 2, generator=g, dtype=torch.float64) * 6
    cos, sin = emu.tensor(angles.cos().float()), emu.tensor(angles.sin().float())
    shape = RotaryShape(DTYPE_CODES[dtype], b, t, h, d)
    parts = [emu.empty((b, t, h, d), dtype) for _ in range(3)]
    tensors = (qkv, cos, sin, *parts)
    emu.call("rotary_qkv_forward", RotaryForward(shape, *map(address, tensors)))
    d_parts = [emu.tensor(torch.randn(b, t, h, d, generator=g).to(dtype)) for _ in range(3)]
    d_qkv = emu.empty(qkv.shape, dtype)
    tensors = (*d_parts, cos, sin, d_qkv)
    emu.call("rotary_qkv_backward", RotaryBackward(shape, *map(address, tensors)))
    return compare(
        ("q", "k", "v", "d_qkv"),
        (*parts, d_qkv),
        lambda qkv: rotary_reference(qkv, cos, sin),
        (qkv,),
        d_parts,
    )


# ---- feed_forward


def gelu(emu, n, dtype, seed=0, in_place=True, offset=0):
    """Forward and backward, a row for each 64 elements: what `compare` gives."""
    g = torch.Generator().manual_seed(seed)

    def memory():
        return emu.empty((n + offset,), dtype)[offset:]

    z = memory().copy_(torch.randn(n, generator=g) * 2.5)
    d_active = memory().copy_(torch.randn(n, generator=g))
    wanted = d_active.clone()
    active, again = memory(), memory()
    emu.call("gelu_forward", GeluForward(DTYPE_CODES[dtype], n, address(z), address(active)))
    d_z = d_active if in_place else memory()
    tensors = (z, d_active, again, d_z)
    emu.call("gelu_backward", GeluBackward(DTYPE_CODES[dtype], n, *map(address, tensors)))
    assert torch.equal(active, again)
    answers = compare(("active", "d_z"), (active, d_z), lambda z: (F.gelu(z),), (z,), (wanted,))
    rows = n // 64 * 64 or n
    return {
        f"{name}{part}": [v[at].view(-1, min(n, 64)) if part == "" else v[at][None] for v in values]
        for name, values in answers.items()
        for part, at in (("", slice(rows)), (" of the rest", slice(rows, None)))
        if len(values[0][at])
    }


# ---- linear_cross_entropy


def row_losses(logits, targets, ignore_index):
    """Losses of the rows of logits, and whether each target is the first of the largest."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="none")
    return loss, (wide.argmax(-1) == targets) & (targets != ignore_index)


def cross_entropy(
    emu, logits, targets, ignore_index=-1, gradients=True, pitch=None, padding=torch.nan
):
    """loss (rows,), correct (rows,), the gradient of each loss (or the logits), their sums."""
    (rows, vocab), dtype = logits.shape, logits.dtype
    if pitch is None:
        lanes = 16 // dtype.itemsize
        pitch = -(-vocab // lanes) * lanes
    memory = emu.empty((rows, pitch), dtype)
    memory[:, :vocab] = logits
    memory[:, vocab:] = padding
    targets = emu.tensor(targets)
    loss, correct = emu.empty((rows,), torch.float32), emu.empty((rows,), torch.uint8)
    sizes = (rows, vocab, pitch, ignore_index, gradients)
    tensors = map(address, (memory, targets, loss, correct))
    emu.call("cross_entropy_rows", CrossEntropyRows(DTYPE_CODES[dtype], *sizes, *tensors))
    total, n_correct = emu.empty((), torch.float32), emu.empty((), torch.int64)
    pointers = (address(loss), address(correct), rows, address(total), address(n_correct))
    emu.call("cross_entropy_sums", CrossEntropySums(*pointers))
    return loss, correct, memory[:, :vocab], total.item(), n_correct.item()


def scores(emu, rows, vocab, dtype, seed=0, pitch=None):
    """A call with ties, hits and ignored rows: what `compare` gives."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=g) * 3).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=g)
    targets[1::4] = logits[1::4].float().argmax(-1)
    logits[2::4, vocab // 2] = logits[2::4].amax(-1)  # a tie, unless it is the largest itself
    targets[2::4] = vocab // 2
    targets[3::4] = -1
    loss, correct, d_logits, total, n_correct = cross_entropy(emu, logits, targets, pitch=pitch)
    _, hits = row_losses(logits, targets, -1)
    assert torch.equal(correct.bool(), hits) and n_correct == hits.sum()
    expected = loss.double().sum().item()
    assert abs(total - expected) <= 1e-6 * max(1.0, abs(expected))
    answers = compare(
        ("loss", "d_logits"),
        (loss[:, None], d_logits),
        lambda logits: (row_losses(logits, targets, -1)[0][:, None],),
        (logits,),
        (torch.ones(rows, 1),),
    )
    # The loss is a difference of logits: hold it by its largest value, not each row by its own.
    answers["loss"] = [v.T for v in answers["loss"]]
    return answers
