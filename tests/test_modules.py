"""What every room does with a module leaves no traces behind."""

from collections import UserDict

import pytest
import torch
from torch import Tensor, nn

from rebasin.data.batches import batched
from rebasin.tensors.modules import eval_mode, hooked, loaded, restored, to_device, with_weights
from rebasin.types import common_dtype, is_finite


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_other_weights_stay_in_the_block_even_if_it_fails():
    model, other = network(), values(network())
    model[2].eval()
    before, flags = values(model), [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), with_weights(model, other):
        assert same(values(model), other)
        model.train(not model.training)
        model(torch.randn(5, 3))
        raise RuntimeError("on purpose")
    assert same(values(model), before)
    assert [module.training for module in model.modules()] == flags


def test_what_is_written_to_a_restored_model_is_undone():
    model = network()
    before = values(model)
    with restored(model) as own:
        own["0.weight"].zero_()
        assert not own["0.weight"].any() and not model.state_dict()["0.weight"].any()
    assert same(values(model), before)


def test_a_loaded_copy_shares_nothing():
    model, other = network(), values(network())
    before = values(model)
    copied = loaded(model, other)
    with torch.no_grad():
        copied.get_parameter("0.weight").zero_()
    assert same(values(model), before) and other["0.weight"].any()


def test_hooks_and_eval_mode_end_with_the_block():
    model, seen = network(), []
    model[0].eval()
    modules = {"first": model[0], "last": model[3]}
    with eval_mode(model), hooked(modules, lambda name, *_: seen.append(name)):
        assert not any(module.training for module in model.modules())
        model(torch.randn(2, 3))
    model(torch.randn(2, 3))
    assert seen == ["first", "last"]
    assert [module.training for module in model] == [False, True, True, True]


def test_batches_are_moved_whatever_holds_their_tensors():
    x = torch.zeros(2)
    batch = {"a": [x, (x, "text")], "b": UserDict(c=x), "d": None}
    moved = to_device(batch, "meta")
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["b"]["c"].is_meta
    assert moved["a"][1][1] == "text" and moved["d"] is None


def test_batches_keep_their_rows_together():
    cut = batched(2, x=torch.arange(5), texts=list("abcde"))
    assert [batch["x"].tolist() for batch in cut] == [[0, 1], [2, 3], [4]]
    assert [batch["texts"] for batch in cut] == [["a", "b"], ["c", "d"], ["e"]]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_one_value_decides_whether_all_are_finite(dtype: torch.dtype):
    tensor = torch.ones(3, 4, dtype=dtype)
    assert is_finite(tensor) and is_finite(tensor[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensor[1, 2] = bad
        assert not is_finite(tensor)


def test_tensors_are_combined_in_float32_or_wider():
    assert common_dtype(torch.float16, torch.bfloat16) is torch.float32
    assert common_dtype(torch.float8_e4m3fn) is torch.float32
    assert common_dtype(torch.float16, torch.float64) is torch.float64
    assert common_dtype(torch.float32, torch.complex64) is torch.complex64
