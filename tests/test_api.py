"""compress, decompress, track: what they attach, when they act, and what they never disturb."""

import copy
import gc
import pickle
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from dibit import Config, Sample
from dibit._torch.private.autograd import top_hooks
from dibit.api import state_of
from tests.marks import nothing_compressed
from tests.unbiased import gradient


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(dropout))
        self.decoder = nn.Linear(32, 8)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encode(x))


def make(dropout: float = 0.0) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(dropout).train(), torch.randn(64, 16)


def one_step(net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    net(x).square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    with dibit.track(net) as saved:
        net(x)
    return saved.total


class TestAttachment:
    def test_the_model_stays_what_it_was(self) -> None:
        net, _ = make()
        before = (
            type(net),
            repr(net),
            list(net.state_dict()),
            [id(p) for p in net.parameters()],
            set(vars(net)),
        )
        calls: list[str] = []
        net.encoder.register_forward_hook(lambda *_: calls.append("mine"))
        assert dibit.compress(net) is net
        after = (
            type(net),
            repr(net),
            list(net.state_dict()),
            [id(p) for p in net.parameters()],
            set(vars(net)),
        )
        assert before == after
        net(torch.randn(4, 16))
        assert calls == ["mine"]

    def test_decompress_leaves_nothing(self) -> None:
        net, x = make()
        net.encoder.register_forward_hook(lambda *_: None)
        kept = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()]
        plain = one_step(net, x)
        assert dibit.decompress(dibit.compress(net)) is net
        assert kept == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()]
        for m in net.modules():
            assert not m._forward_hooks_with_kwargs
            assert not m._forward_pre_hooks_with_kwargs
            assert not m._forward_hooks_always_called
        assert all(torch.equal(a, b) for a, b in zip(plain, one_step(net, x), strict=True))

    def test_compressing_again_replaces(self) -> None:
        net, x = make()
        once = saved_bytes(dibit.compress(net, "iexact"), x)
        dibit.compress(net, "exact")
        assert saved_bytes(dibit.compress(net, "iexact"), x) == once
        assert len(net._forward_pre_hooks) == 1

    def test_per_module_rules(self) -> None:
        net, x = make()
        dibit.compress(net, {"decoder": Config(bits=8), "encoder.?": None, "*": "iexact"})
        with dibit.track(net) as saved:
            net(x)
        how = {(row.module, row.operation): row.how for row in saved.rows if row.kept}
        assert how["decoder", "linear"] == "8 bit, block 1024"
        assert how["encoder.1", "batch_norm"] == "exact"
        dibit.compress(net, {"encoder": "default"})
        with dibit.track(net) as saved:
            net(x)
        assert {row.how for row in saved.rows if row.module == "decoder"} == {"exact"}
        assert all(row.how != "exact" for row in saved.rows if row.module.startswith("encoder") and row.kept)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_a_copy_is_compressed_and_on_its_own(self, how: str) -> None:
        net, x = make(0.5)
        dibit.compress(net)
        twin = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
        assert saved_bytes(twin, x) == saved_bytes(net, x)
        assert state_of(twin).root is twin  # type: ignore[union-attr]
        dibit.decompress(net)
        with dibit.track(twin) as saved:
            twin(x)
        assert saved.total < saved.plain


class TestBadInput:
    @pytest.mark.parametrize(
        ("config", "error", "words"),
        [
            ("defualt", ValueError, "recipe 'defualt' is unknown; did you mean 'default'?"),
            ({"encodr": "default"}, ValueError, "no module is named 'encodr'; did you mean 'encoder'?"),
            (3, TypeError, "a setting of type int was given; expected a recipe's name or a dibit.Config"),
        ],
    )
    def test_compress(self, config: object, error: type[Exception], words: str) -> None:
        net, _ = make()
        dibit.compress(net, "exact")
        with pytest.raises(error) as caught:
            dibit.compress(net, config)  # type: ignore[arg-type]
        assert words in str(caught.value)
        assert len(net._forward_pre_hooks) == 1, "what was there is kept"

    def test_not_a_module(self) -> None:
        with pytest.raises(TypeError, match=r"compress got a list; expected a torch.nn.Module"):
            dibit.compress([])  # type: ignore[type-var]

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"bits": 3}, "bits = 3 was given; choose one of 1, 2, 4, 8"),
            ({"block": 0}, "block = 0 was given; expected a whole number of at least 1"),
            ({"block": "rows"}, "block = 'rows' was given"),
            ({"levels": "gaussian"}, "did you mean|the known names are 'uniform', 'normal'"),
            ({"levels": (0, 2, 1, 3)}, "give 4 increasing numbers"),
            ({"levels": (0, 1)}, "give 4 increasing numbers"),
            ({"rounding": "stochastc"}, "did you mean 'stochastic'?"),
            ({"rounding": "dither", "levels": "normal"}, "rounding='dither' needs levels='uniform'"),
            ({"stats": torch.float16}, "choose torch.bfloat16 or torch.float32"),
            ({"reduce": 8}, "expected None, Project"),
            ({"norm": "exact"}, "expected None or a dibit.Config"),
        ],
        ids=str,
    )
    def test_config(self, settings: dict[str, object], words: str) -> None:
        with pytest.raises((ValueError, TypeError), match=words.replace("(", r"\(").replace("?", r"\?")):
            Config(**settings)  # type: ignore[arg-type]

    @pytest.mark.parametrize("ratio", [0, -1, 2.5, True])
    def test_ratio(self, ratio: object) -> None:
        with pytest.raises(ValueError, match=r"Sample.ratio = .* was given; expected a whole number"):
            Sample(ratio)  # type: ignore[arg-type]


class TestRandomness:
    """Invariants 1 and 5."""

    def test_same_torch_seed_same_gradient_on_the_same_model(self) -> None:
        net, x = make(0.5)
        dibit.compress(net)
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append([one_step(net, x) for _ in range(3)])
        for a, b in zip(runs[0], runs[1], strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        assert not torch.equal(runs[0][0][0], runs[2][0][0])
        assert not torch.equal(runs[0][0][0], runs[0][1][0]), "each step draws anew"

    def test_the_models_own_draws_are_not_shifted(self) -> None:
        """torch's dropout under the papers' recipes: the same masks, step after step, as the plain model."""
        outputs = []
        for recipe in (None, "exact", "iexact"):
            net, x = make(0.5)
            dibit.compress(net, recipe)
            torch.manual_seed(7)
            outputs.append([net(x).detach() for _ in range(3)])
        for other in outputs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))

    def test_generator_state_is_all_there_is(self) -> None:
        """Restoring torch's generator is enough for a run to go on to the same result."""
        net, x = make(0.5)
        dibit.compress(net)
        one_step(net, x)
        state = torch.get_rng_state()
        first = [one_step(net, x) for _ in range(2)]
        torch.set_rng_state(state)
        again = [one_step(net, x) for _ in range(2)]
        assert all(torch.equal(p, q) for a, b in zip(first, again, strict=True) for p, q in zip(a, b, strict=True))


class TestAutograd:
    def test_backward_twice(self) -> None:
        net, x = make()
        dibit.compress(net)
        loss = net(x).square().sum()
        first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        second = torch.autograd.grad(loss, list(net.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, list(net.parameters()))

    def test_backward_in_another_thread_and_after_another_shape(self) -> None:
        net, x = make()
        dibit.compress(net)
        torch.manual_seed(3)
        expected = one_step(net, x)
        torch.manual_seed(3)
        net.zero_grad()
        loss = net(x).square().sum()
        net(torch.randn(9, 16))
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        assert all(torch.equal(a, p.grad) for a, p in zip(expected, net.parameters(), strict=True))

    def test_double_backward_is_a_clear_error(self) -> None:
        net, x = make()
        dibit.compress(net)
        with pytest.raises(RuntimeError, match="no second derivatives, but create_graph=True asks for them"):
            torch.autograd.grad(net(x).square().sum(), list(net.parameters()), create_graph=True)

    @pytest.mark.parametrize("what", ["features", "weight"])
    def test_a_change_in_place_is_noticed(self, what: str) -> None:
        net, x = make()
        dibit.compress(net)
        loss = net(x).square().sum()
        with torch.no_grad():
            (x if what == "features" else net.decoder.weight).add_(1)
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
            loss.backward()

    @nothing_compressed
    def test_exact_tensors_of_other_operations_are_checked_too(self) -> None:
        class Exp(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                y = x.exp()
                return y.sum(), y

        total, y = dibit.compress(Exp())(torch.randn(5).requires_grad_())
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(RuntimeError, match="changed in place"):
            total.backward()

    def test_nan_in_features_reaches_every_weight(self) -> None:
        net, x = make()
        x[5, 3] = float("nan")
        for recipe in dibit.recipes.RECIPES:
            dibit.compress(net, recipe)
            assert all(g.isnan().any() for g in one_step(net, x))


class TestWhereItActs:
    def test_parts_called_on_their_own(self) -> None:
        net, x = make()
        dibit.compress(net)
        with dibit.track(net) as saved:
            F.relu(net.decoder(net.encode(x))).sum().backward()
        assert {"encoder.1", "encoder.2", "decoder"} <= {row.module for row in saved.rows}
        assert saved.total < saved.plain / 3
        assert not torch.overrides._get_current_function_mode_stack()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_interrupted_forward_leaves_nothing_that_acts(self, error: type[BaseException]) -> None:
        net, x = make()
        dibit.compress(net)
        reference = saved_bytes(net, x)
        fail = net.encoder[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            net(x)
        fail.remove()
        outside = nn.Linear(16, 4)  # not compressed: its gradient must be exact whatever was left behind
        h = (x * 2).requires_grad_()
        F.relu(outside(h)).sum().backward()
        assert torch.equal(outside.weight.grad, (outside(h) > 0).float().T @ h.detach())
        assert saved_bytes(net, x) == reference
        assert not torch.overrides._get_current_function_mode_stack()
        assert top_hooks() is None

    def test_activation_checkpointing_inside_stays_exact(self) -> None:
        from torch.utils.checkpoint import checkpoint

        class Checkpointed(Net):
            def forward(self, x: Tensor) -> Tensor:
                return self.decoder(checkpoint(self.encode, x, use_reentrant=False))

        torch.manual_seed(0)
        net, x = Checkpointed().train(), torch.randn(64, 16)
        plain = gradient(net, x, torch.ones(64, 8))
        dibit.compress(net)
        kept = gradient(net, x, torch.ones(64, 8))
        below = plain.numel() - 32 * 8 - 8
        assert torch.allclose(plain[:below], kept[:below], rtol=1e-4, atol=1e-5)

    def test_warns_once_where_nothing_was_seen(self) -> None:
        class Cumsum(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.cumsum(0)

        net = dibit.compress(Cumsum())
        with pytest.warns(UserWarning, match="compressed Cumsum had no operation that Dibit knows"):
            net(torch.randn(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net(torch.randn(3))
            net, x = make()
            dibit.compress(net)(x)

    def test_a_users_own_rule(self) -> None:
        seen = []

        def rule(step: object, x: Tensor) -> Tensor:
            seen.append(x.shape)
            return NotImplemented

        net = dibit.compress(
            nn.Sequential(nn.Linear(16, 4), nn.ReLU()), rules={F.relu: lambda s, x, inplace: rule(s, x)}
        )
        net(torch.randn(5, 16))
        assert seen == [(5, 4)]

    def test_frozen_parts_and_eval_batch_norm_in_training(self) -> None:
        net, x = make()
        net.encoder[1].eval()
        net.encoder[0].requires_grad_(False)
        dibit.compress(net)
        net(x).sum().backward()
        assert net.encoder[0].weight.grad is None


class TestMemory:
    def test_nothing_outlives_the_graph(self) -> None:
        """No reference cycle: with the collector off, a pass dies with its loss."""
        net, x = make(0.5)
        dibit.compress(net)
        alive: list[weakref.ref] = []
        net.encoder[2].register_forward_hook(lambda m, a, out: alive.append(weakref.ref(out)))
        gc.collect()
        gc.disable()
        try:
            loss = F.log_softmax(net(x), 1).sum()
            loss.backward()
            del loss
            assert [ref() for ref in alive] == [None]
            before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
            for _ in range(20):
                net(x).sum().backward()
            assert sum(issubclass(type(o), Tensor) for o in gc.get_objects()) <= before + 2
        finally:
            gc.enable()

    def test_ctrl_c_has_no_destructors_to_get_lost_in(self) -> None:
        """Python drops what is raised in `__del__`, and Ctrl-C is raised anywhere: one destructor a pass at most."""
        net, x = make()
        dibit.compress(net)
        net(x).sum().backward()
        called: list[str] = []
        sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
        try:
            net(x).sum().backward()
        finally:
            sys.setprofile(None)
        assert len(called) > 100
        assert called.count("__del__") <= 1

    def test_activations_are_gone_after_the_forward(self) -> None:
        net, x = make()
        dibit.compress(net)
        alive: list[weakref.ref] = []
        for part in net.encoder:
            part.register_forward_hook(lambda m, a, out: alive.append(weakref.ref(out)))
        out = net(x)
        assert [ref() for ref in alive] == [None] * len(alive)
        out.sum().backward()


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, dibit; heavy = {'torch_geometric', 'numba', 'scipy', 'rich', 'yaml', "
        "'matplotlib', 'pandas', 'tensorboard', 'torchmetrics'}; print(heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_without_numba_plain_torch_serves_and_says_so() -> None:
    import subprocess
    import sys

    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'numba' else find(name, *a)\n"
        "import torch, dibit\n"
        "m = dibit.compress(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))\n"
        "m(torch.randn(9, 8)).sum().backward(); print('numba' in sys.modules, m[2].weight.grad.isfinite().all().item())"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False True"
    assert done.stderr.count("numba is not installed") == 1


def test_a_rule_for_no_function_is_a_sentence() -> None:
    with pytest.raises(TypeError, match=r"expected a function of torch, such as torch\.asinh"):
        dibit.compress(nn.Linear(4, 4), rules={"asinh": lambda forward, x: NotImplemented})


def test_a_rule_that_is_none_is_a_sentence() -> None:
    with pytest.raises(TypeError, match=r"rules has 2 for asinh; expected a rule: a function of the running pass"):
        dibit.compress(nn.Linear(4, 4), rules={torch.asinh: 2})  # type: ignore[dict-item]
