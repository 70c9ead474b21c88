"""Classes of diffusers and transformers: example inputs, a trace, a proof; and what a model may ask of its masks."""

# Models here are put together of attributes that a type checker does not see.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rebasin
from experiments import zoo_library
from experiments.architectures import markdown, merged
from experiments.zoo import ZOO
from rebasin import tracing
from rebasin.checkpoints.classes import example
from rebasin.errors import CheckpointError, TraceError
from rebasin.tracing.export import export

QUICK = {
    "diffusers": [
        "FluxTransformer2DModel", "Lumina2Transformer2DModel", "PixArtTransformer2DModel", "PriorTransformer",
        "WanTransformer3DModel", "MiniMaxH3Transformer3DModel", "VQModel",
    ],
    "transformers": [
        "LlamaForSequenceClassification", "BartForSequenceClassification", "CLIPModel",
        "HubertForSequenceClassification", "MixtralForCausalLM",
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("REBASIN_CACHE", "off")


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, names in QUICK.items() for n in names])
def test_classes_have_examples_and_are_proved(family: str, name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = ZOO[family][name](False)
    spec = rebasin.trace(model, *args, **kwargs)
    report = rebasin.verify(model, spec, *args, dtype=torch.float64, **kwargs)
    assert report.passed and report.maps == len(spec.continuous) and spec.neurons


@pytest.mark.parametrize("name", ["BartForSequenceClassification", "LlamaForSequenceClassification"])
def test_examples_of_models_without_numbers(name: str) -> None:
    """The same spec on the meta device: lengths and positions have their values there, too."""
    family = "diffusers" if name in ZOO["diffusers"] else "transformers"
    model, _, kwargs = ZOO[family][name](False)
    spec = rebasin.trace(model, **kwargs)
    with torch.device("meta"):
        model, _, kwargs = ZOO[family][name](False)
        assert rebasin.trace(model, **kwargs) == spec
    assert all(p.is_meta for p in model.parameters())


def test_unknown_classes_and_arguments_are_told() -> None:
    import transformers
    from diffusers import ModelMixin

    with pytest.raises(CheckpointError, match=r"^Linear is a class of neither diffusers nor .* your own\.$"):
        example(nn.Linear(2, 2))

    class Own(ModelMixin):
        def forward(self, curvature: Tensor) -> Tensor:
            return curvature

    with pytest.raises(
        CheckpointError, match=r"^Own needs 'curvature', and nothing is known .* example inputs\.$"
    ):
        example(Own())

    class Other(ModelMixin):
        def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return sample

    with pytest.raises(
        CheckpointError, match=r"^Other needs 'encoder_hidden_states', but .* no number as 'joint_"
    ):
        example(Other())

    class Nose(transformers.PreTrainedModel):
        main_input_name = "smells"

        def forward(self, smells: Tensor | None = None) -> Tensor | None:
            return smells

    with pytest.raises(
        CheckpointError, match=r"^Nose needs 'smells', .* has a main input 'smells', of which"
    ):
        example(Nose(transformers.PretrainedConfig()))


def test_every_transformer_class_of_diffusers_is_in_the_table_or_has_a_reason() -> None:
    import inspect

    import diffusers.models.transformers as package

    classes = {n for n in dir(package) if inspect.isclass(getattr(package, n))}
    classes |= {"MiniMaxMusic3RVQDepthDecoder"} & set(zoo_library.DIFFUSERS)
    missing = classes - set(ZOO["diffusers"]) - set(zoo_library.NOT_POSSIBLE)
    assert {
        n for n in missing if issubclass(getattr(package, n), __import__("diffusers").ModelMixin)
    } == set()


def test_the_table_takes_new_rows_and_keeps_the_old() -> None:
    old = [{"family": "blocks", "name": n, "sound": False, "error": "old"} for n in ("conv1d", "mlp", "gone")]
    new = [{"family": "blocks", "name": "mlp", "sound": False, "error": "new"}]
    rows = merged(old, new)
    assert [(r["name"], r["error"]) for r in rows] == [("mlp", "new"), ("conv1d", "old")]
    assert "## Not possible here" in markdown(rows) and "| mlp | **no** | new |" in markdown(rows)


# -------------------------------------------------------------------------- values of whole numbers and masks


class Reads(nn.Module):
    """Two layers around something that looks at the mask or the ids."""

    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.use = nn.Linear(3, 5), nn.Linear(5, 2), use

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.b(self.use(torch.tanh(self.a(x)), mask))


def positions(y: Tensor, mask: Tensor) -> Tensor:
    places = torch.zeros(4, dtype=torch.long)
    for k, length in enumerate(mask.sum(1).tolist()):
        places[:length] = torch.arange(length)
        places[length:] = k
    return y[:, places.tolist()]


READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tolist": lambda y, m: y[:, : max(m.sum(1).tolist())],
    "item": lambda y, m: y[:, : int(m.sum().item()) // 2],
    "set": lambda y, m: y if len(set(m.sum(1).tolist())) == 1 else y[:1],
    "if": lambda y, m: y if m.all() else y * m[..., None],
    "mask": lambda y, m: y[m].unsqueeze(0),
    "mask of one": lambda y, m: y[:, m[0]],
    "nonzero": lambda y, m: y[:, m[0].nonzero()[:, 0]],
    "slice": lambda y, m: y[:, : m[0].sum()],
    "range": lambda y, m: torch.cat([y[:, k : k + 1] for k in range(m[0].sum())], 1),
    "arange": lambda y, m: y[:, torch.arange(m[0].sum())],
    "repeat": lambda y, m: y.repeat_interleave(m[0].long() + 1, 1),
    "write": lambda y, m: y.masked_fill(~m[..., None], 0.0)[:, : m[0].sum()],
    "put": lambda y, m: torch.zeros(2, 4, 5).to(y).index_put((m.nonzero()[:, 0], m.nonzero()[:, 1]), y[m]),
    "positions": positions,
    "one hot": lambda y, m: y[:, nn.functional.one_hot(m.long().sum(1))[0]],
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_a_model_asks_of_a_mask_is_answered(name: str) -> None:
    model, x = Reads(READ[name]), torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, True, False]] * 2)
    spec = rebasin.trace(model, x, mask)
    assert spec.neurons == 5, spec.summary()
    assert rebasin.verify(model, spec, x, mask, dtype=torch.float64).passed


def test_what_depends_on_floats_is_not_answered() -> None:
    """Nor what was written into a tensor of known numbers, or is read out of a weight."""

    def poisoned(y: Tensor, mask: Tensor) -> Tensor:
        known = mask.long()
        known[0, :1] = (y[0, 0, :1] > 0).long()
        return y[:, : 1 + int(known.sum())]

    def through_a_view(y: Tensor, mask: Tensor) -> Tensor:
        known = mask.long()
        known.view(-1)[:1].add_((y[0, 0, :1] > 0).long())
        return y * known.sum().item()

    def compared(y: Tensor, mask: Tensor) -> Tensor:
        return y if ((y[..., 0] > 0) & mask).any() else -y

    def drawn(y: Tensor, mask: Tensor) -> Tensor:
        return y * torch.rand_like(mask, dtype=torch.float32).sum().item()

    mask = torch.ones(2, 4, dtype=torch.bool)
    for use in (poisoned, through_a_view, compared, drawn):
        with pytest.raises(TraceError, match="depends on values of tensors|can't be exported"):
            rebasin.trace(Reads(use), torch.randn(2, 4, 3), mask)
    model = Reads(lambda y, mask: y * model.held[0].sum().item())
    for held in (model.a.weight.data, model.a.weight.data.t()):
        model.held = held
        with pytest.raises(TraceError, match="depends on values of tensors|can't be exported"):
            rebasin.trace(model, torch.randn(2, 4, 3), mask)


def test_weights_that_the_example_does_not_reach_stay() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            hidden = torch.tanh(self.a(x))
            return self.b(hidden) if mask.all() else self.c(hidden)

    x, mask = torch.randn(2, 3), torch.ones(2, dtype=torch.bool)
    spec = rebasin.trace(Two(), x, mask)
    assert spec.neurons == 5 and {s.parameter for g in spec for c in g.cells for s in c.sites} == {
        "a.weight", "a.bias", "b.weight"
    }  # fmt: skip


def test_specs_of_values_are_kept_for_these_values(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another mask of the same shape may take another way."""
    monkeypatch.setenv("REBASIN_CACHE", str(tmp_path))
    model, _, kwargs = ZOO["transformers"]["BartForSequenceClassification"](False)
    spec = rebasin.trace(model, **kwargs)
    exported: list[Any] = []
    monkeypatch.setattr(tracing, "export", lambda *given: exported.append(given) or export(*given))
    assert rebasin.trace(model, **kwargs) == spec and not exported
    ids = kwargs["input_ids"].clone()
    ids[:, 1:-1] += 1
    rebasin.trace(model, **{**kwargs, "input_ids": ids})
    assert len(exported) == 1


def test_a_table_that_is_made_on_the_first_call_keeps_no_tensors_of_the_export() -> None:
    class Table:
        def __init__(self) -> None:
            self.angles: Tensor | None = None

        def __call__(self, n: int) -> Tensor:
            if self.angles is None:
                self.angles = torch.arange(n).float().cos()
            return self.angles

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.table = nn.Linear(3, 5), nn.Linear(5, 2), Table()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)) * self.table(2)[:, None] * self.kept(2)[:, None])

        @functools.lru_cache(maxsize=8)  # noqa: B019
        def kept(self, n: int) -> Tensor:
            return torch.arange(n).float().cos()

    model, x = Net(), torch.randn(2, 3)
    spec = rebasin.trace(model, x)
    assert model.table.angles is None and model(x).shape == (2, 2)
    assert rebasin.verify(model, spec, x).passed and spec.neurons == 5


# ------------------------------------------------------------------------------------------------ rules


class Around(nn.Module):
    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.other, self.b, self.use = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 2), use

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(torch.tanh(self.a(x)), self.other(x)))


PLACES, PUT = torch.tensor([2, 0]), torch.ops.aten.index_put
MOVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "type_as": lambda y, z: y.type_as(z.sum(-1)),
    "index_put": lambda y, z: y.index_put((torch.tensor([0, 1]), PLACES), z[:, 0]),
    "index_put along": lambda y, z: PUT(y, [None, PLACES], z[:, :2]),
    "index_put added": lambda y, z: PUT(y, [None, PLACES], z[:, :2], True),
    "index_copy": lambda y, z: y.index_copy(1, PLACES, z[:, :2]),
    "index_add": lambda y, z: y.index_add(1, PLACES, z[:, :2]),
    "scatter_add": lambda y, z: y.scatter_add(1, PLACES[None, :, None].expand(2, 2, 5), z[:, :2]),
    "repeats": lambda y, z: y.repeat_interleave(torch.tensor([1, 2, 0, 1]), 1, output_size=4) + z,
    "vstack": lambda y, z: torch.vstack([y, z]),
    "column_stack": lambda y, z: torch.column_stack([y, z]),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_neurons_move_with_what_is_written_by_index(name: str) -> None:
    model, x = Around(MOVES[name]), torch.randn(2, 4, 3)
    spec = rebasin.trace(model, x)
    assert spec.neurons >= 5 and any(
        s.parameter == "b.weight" for g in spec for c in g.cells for s in c.sites
    )
    rebasin.verify(model, spec, x, dtype=torch.float64).require()


def test_neurons_that_are_written_to_by_their_place_stay() -> None:
    x = torch.randn(2, 4, 3)
    for use in (
        lambda y, z: PUT(y, [None, None, PLACES], z[..., :2]),
        lambda y, z: y.index_copy(2, PLACES, z[..., :2]),
        lambda y, z: y.scatter_add(2, PLACES.expand(2, 4, 2), z[..., :2]),
        lambda y, z: y.repeat_interleave(torch.tensor([1, 2, 0, 1, 1]), 2, output_size=5) + z,
    ):
        model = Around(use)
        spec = rebasin.trace(model, x)
        rebasin.verify(model, spec, x, dtype=torch.float64).require()
        assert not any(
            c.size == 5 for g in spec for c in g.cells if any(s.parameter == "b.weight" for s in c.sites)
        )


def test_experts_share_their_axes() -> None:
    """The grouped product that transformers has by default; fp32, for in fp64 the library has none."""
    import transformers

    config = {**zoo_library.TRANSFORMERS["MixtralForCausalLM"], "experts_implementation": "grouped_mm"}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config))
    inputs = example(model)
    spec = rebasin.trace(model, **inputs)
    rebasin.verify(model, spec, **inputs).require()
    assert spec.coverage().one > 0.95 and not any("no rule" in p.reason for p in spec.pins)


def test_views_of_what_is_empty_end() -> None:
    """A view of a tensor without elements that has neurons went on for ever."""
    model, x = (
        Around(lambda y, z: torch.cat([y, z[:, :0].reshape(0, 2, 5).reshape(2, 0, 5)], 1)),
        torch.randn(2, 4, 3),
    )
    spec = rebasin.trace(model, x)
    assert rebasin.verify(model, spec, x, dtype=torch.float64).passed and spec.neurons >= 5


def test_what_has_no_elements_is_tied_as_if_it_had() -> None:
    """A picture without places is the only one whose zeros this class may ask for; the spec holds for others, too."""
    model, _, kwargs = ZOO["diffusers"]["HunyuanVideo15Transformer3DModel"](False)
    spec = rebasin.trace(model, **kwargs)
    picture = torch.randn(1, 3, kwargs["image_embeds"].shape[-1])
    rebasin.verify(model, spec, dtype=torch.float64, **{**kwargs, "image_embeds": picture}).require()
    assert {"image_embedder.linear_1.weight"} <= {s.parameter for g in spec for c in g.cells for s in c.sites}


def test_flex_attention_is_proved_in_double_precision() -> None:
    """With casts to float32 that the model writes out: computed in float64, they are no reason to fail."""
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.b(self.a(x))).float().view(1, 1, 16, 16)
            return flex_attention(y, y, y).sum(-1)  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    model, x = Flex(), torch.randn(1, 16, 16)
    spec = rebasin.trace(model, x)
    with torch.device("meta"):
        empty = Flex()
    assert rebasin.trace(empty, x).hash == spec.hash
    report = rebasin.verify(model, spec, x, dtype=torch.float64)
    assert report.passed and report.max_relative_error < 1e-12 and spec.neurons == 16


def test_autocast_by_the_device_of_a_tensor_is_exported_without_memory() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(device_type=x.device.type, enabled=False):
                return self.b(torch.tanh(self.a(x)))

    x, before = torch.randn(2, 4), torch.autocast.__init__
    with torch.device("meta"):
        empty = Casts()
    assert rebasin.trace(empty, x).neurons == rebasin.trace(Casts(), x).neurons == 5
    assert torch.autocast.__init__ is before


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_numbers_that_the_code_writes_down_are_known_on_every_device(device: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            ids = torch.full_like(mask, -1, dtype=torch.long)
            ids[mask.nonzero(as_tuple=True)[0]] = torch.tensor([0, 3], device=mask.device)
            return self.b(torch.tanh(self.a(x))) * len(set(ids.tolist()))

    with torch.device(device):
        model, x = Writes(), torch.randn(1, 4)
    assert rebasin.trace(model, x, mask=torch.tensor([False, True, True])).neurons == 5


WAN = ("WanTransformer3DModel", "ChronoEditTransformer3DModel", "SkyReelsV2Transformer3DModel")


@pytest.mark.parametrize("name", WAN)
@pytest.mark.parametrize("places", [None, 8], ids=["one picture", "first and last"])
def test_pictures_beside_wans_texts_reach_their_weights(name: str, places: int | None) -> None:
    import diffusers

    config = {**zoo_library.DIFFUSERS[name], "image_dim": 10, "added_kv_proj_dim": 24}
    model = getattr(diffusers, name)(**config, pos_embed_seq_len=places).eval()
    output = model(**example(model)).sample
    output.square().sum().backward()
    own = [n for n, _ in model.named_parameters() if "add_" in n or "added" in n or "image_embedder" in n]
    assert own and all(model.get_parameter(n).grad is not None for n in own)
    flat = [n for n in own if float(model.get_parameter(n).grad.abs().max()) == 0]
    assert not flat
