"""What happens to memory while a program runs: it is read by copying, and changed in every way; filled from outside."""

from __future__ import annotations

# Where a tensor lives that the pass reads but did not make. `OUTSIDE` is seen by no module.
SOURCES = {
    "buffer": ("self.buffer", "model.buffer"),
    "parameter": ("self.table", "model.table"),
    "attribute": ("self.attribute", "model.attribute"),
    "features": ("x", "x"),
    "argument": ("extra", "extra"),
    "outside": ("OUTSIDE", "OUTSIDE"),
    "in a list": ("self.held[0]", "model.held[0]"),
    "of the pass": ("made", None),
    "view of a buffer": ("self.buffer[:]", "model.buffer"),
}

# Ways to read (N, C), each giving (N, C) in memory of its own.
READS = {
    "t[i]": "{}[index]",
    "index_select": "{}.index_select(0, index)",
    "product": "({} * 2)",
    "exp": "{}.exp()",
    "relu": "F.relu({})",
    "sigmoid": "torch.sigmoid({})",
    "cat": "torch.cat([{0}, {0}])[N // 2:-(N // 2)]",
    "stack": "torch.stack([{}, h.detach()])[0]",
    "clone": "{}.clone()",
    "cast": "{}.double().float()",
    "gather": "{}.gather(0, index.view(-1, 1).expand(-1, C))",
    "where": "torch.where(h.detach() > 0, {}, .5)",
    "masked_fill": "{}.masked_fill(h.detach() > 1, 0.)",
    "index_add": "torch.zeros(N, C).index_add(0, index, {})",
    "tanh of a slice": "torch.tanh(torch.cat([{0}[:, :8], {0}[:, :8]], -1))",
    "contiguous": "{}.t().contiguous().t()",
    "normalize": "F.normalize({}, dim=-1)",
    "repeat": "{}[:1].repeat(N, 1)",
    "sum": "{}.sum(0).expand(N, C)",
    "clamp": "{}.clamp(-1, 1)",
    "difference": "({} - h.detach())",
    "comparison": "({} > 0).float()",
}

# What is done with what was read: it is needed for the gradient.
USES = {
    "times": "h = h * @r",
    "linear after": "h = @m(h) * @r",
    "into linear": "h = h + @m(@r)",
    "divided": "h = h / (@r.square() + 1)",
    "power": "h = (h + @r).sigmoid() * @r",
    "matmul": "h = h @ @r[:C]",
    "maximum": "h = torch.maximum(h * @r, @r)",
    "mask": "h = torch.where(@r > 0, h, .5 * h)",
    "mask filled": "h = h.masked_fill(@r > .5, 0.)",
    "gathered again": "h = h[index] * @r[index]",
}

# Ways to change a tensor: the lines see it as `t`. None of them takes part in autograd.
CHANGES = {
    "data": "t.data.mul_(.5)",
    "numpy": "t.detach().numpy()[:] *= .5",
    "numpy row": "t.detach().numpy()[3] = 7",
    "no_grad": "with torch.no_grad():\n    t.mul_(.5)",
    "no_grad slice": "with torch.no_grad():\n    t[:9] = 0",
    "copy_": "with torch.no_grad():\n    t.copy_(torch.ones_like(t))",
    "detach": "t.detach().add_(1)",
    "set_": "with torch.no_grad():\n    t.set_(torch.full_like(t, .25))",
    "data assigned": "t.data = t.data * .5",
    "out=": "with torch.no_grad():\n    torch.mul(t, .5, out=t)",
    "dlpack": "torch.from_dlpack(t.detach()).mul_(.5)",
    "index_copy_": "with torch.no_grad():\n    t.index_copy_(0, index[:9], torch.zeros(9, C))",
    "storage": "t.untyped_storage().copy_((t.detach() * .5).untyped_storage())",
    "pointer": "ctypes.memset(t.data_ptr(), 0, t.numel() * t.element_size())",
    "foreach": "with torch.no_grad():\n    torch._foreach_mul_([t], .5)",
    "SGD": "step(torch.optim.SGD, t)",
    "Adam": "step(torch.optim.Adam, t)",
}

# Fresh memory, and what fills it without torch seeing it.
MAKES = {
    "zeros": "torch.zeros(N, C)",
    "zeros of a shape": "torch.zeros(h.shape)",
    "ones": "torch.ones(N, C)",
    "full": "torch.full((N, C), .5)",
    "empty": "torch.empty(N, C).fill_(.25)",
    "new_zeros": "h.new_zeros(N, C)",
    "zeros_like": "torch.zeros_like(h)",
    "ones_like": "torch.ones_like(h)",
    "zeros, viewed": "torch.zeros(N * C).view(N, C)",
    "zeros, plus": "(torch.zeros(N, C) + 1)",
    "clone": "h.detach().clone()",
    "relu": "h.detach().relu()",
    "arange": "torch.arange(N * C, dtype=torch.float32).view(N, C)",
}
FILLS = {
    "numpy": "@t.numpy()[:] = 2 * h.detach().numpy()",
    "numpy add": "np.add(@t.numpy(), h.detach().numpy(), out=@t.numpy())",
    "dlpack": "torch.from_dlpack(@t).copy_(h.detach())",
    "data": "@t.data.add_(h.detach())",
    "pointer": "@ts = h.detach().to(@t.dtype).contiguous()\nctypes.memmove(@t.data_ptr(), @ts.data_ptr(), @t.nbytes)",
    "interface": "np.asarray(@t)[:] = 3 * h.detach().numpy()",
    "numba": "fill_by_numba(@t.numpy(), h.detach().numpy())",
    "numpy of a view": "@t[: N // 2].numpy()[:] = 1.5 * h.detach()[: N // 2].numpy()",
    "memoryview": "memoryview(@t.numpy())[0, 0] = 9.",
    "set in a view, later": "@tv = @t.numpy()\n@tc = @t * 1\n@tv[:] = 5\n@t = @t * @tc",
}
FILLED_USES = {
    "times": "h = h * @t",
    "into linear": "h = h + @m(@t)",
    "twice": "h = h * (@t * 2)",
    "returned by a function": "h = Returned.apply(h, @t)",
    "returned by a function, then linear": "h = @m(Returned.apply(h, @t)).relu()",
    "gathered": "h = h * @t[index]",
}

# Constants of equal content, one of which is written later. `u` is needed for the gradient, `v` is not.
TWINS = {
    "ones": ("torch.ones(C)", "torch.ones(C)"),
    "zeros": ("torch.zeros(C)", "torch.zeros(C)"),
    "a weight's copy": ("@m.detach().clone()", "@m.detach().clone()"),
    "indices": ("index.clone()", "index.clone()"),
    "indices as rows": ("(index % 5).view(-1, 4).clone()", "(index % 5).view(-1, 4).clone()"),
    "booleans": ("(index % 2 == 0).clone()", "(index % 2 == 0).clone()"),
}
TWIN_CHANGES = {
    "in place": "@v.mul_(3)",
    "data": "@v.data.mul_(3)",
    "numpy": "@v.numpy()[...] = 0",
    "zero_": "@v.zero_()",
    "out=": "torch.add(@v, @v, out=@v)",
}

# Integers, read by copying them, and what is done with the copy.
INDEX_SOURCES = {
    "buffer": "self.order",
    "outside": "index",
    "structure": "edges[0, :N]",
    "in a list": "self.several[0]",
}
INDEX_READS = {
    "t[i]": "{}[torch.arange(N).flip(0)]",
    "clone": "{}.clone()",
    "sum": "({} + 1) % N",
    "remainder": "{} % N",
    "flip": "{}.flip(0)",
    "cat": "torch.cat([{0}[:9], {0}[9:]])",
    "int": "{}.int().long()",
    "sort": "{}.sort().values",
    "where": "torch.where({0} > 5, {0}, 0)",
    "repeat": "{}[:1].repeat(N)",
    "stack": "torch.stack([{0}, {0}])[0]",
}
INDEX_USES = {
    "gathered": "h = h[@r] * 2",
    "gathered factor": "h = h * h[@r]",
    "index_select": "h = h.index_select(0, @r)",
    "index_add": "h = h + torch.zeros_like(h).index_add(0, @r, h)",
    "scatter": "h = h.new_zeros(N, C).scatter_add_(0, @r.view(-1, 1).expand(-1, C), h) + h",
    "embedding": "h = h * @m(@r)",
    "conv": "h = @m(h, torch.stack([@r, index]))",
    "mask": "h = h.masked_fill((@r % 2 == 0).view(-1, 1), .5)",
}
INDEX_CHANGES = {
    "data": "t.data.zero_()",
    "numpy": "t.numpy()[:] = t.numpy()[::-1].copy()",
    "in place": "t.add_(1).remainder_(N)",
    "copy_": "t.copy_(t.flip(0))",
    "set_": "t.set_(torch.zeros_like(t))",
    "out=": "torch.remainder(t + 3, N, out=t)",
}
