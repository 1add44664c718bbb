"""What the loader uses of torch and transformers without their promise to keep it.

Each is called here by the arguments that compute_node/model/loaded.py gives it. A library that
renames one or changes its arguments fails by that name, before a model does in some other way.
Planted fault seen red: a renamed function, an argument more.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils import _device, _pytree
from transformers import PreTrainedModel, conversion_mapping, core_model_loading, initialization
from transformers.integrations import moe
from transformers.modeling_utils import LoadStateDictConfig

MODEL = PreTrainedModel
ANY = object()
CALLS: list[tuple[object, str, tuple[object, ...], dict[str, object]]] = [
    (initialization, "no_init_weights", (), {}),
    (conversion_mapping, "get_model_conversion_mapping", (ANY,), {}),
    (core_model_loading, "convert_and_load_state_dict_in_model", (ANY, {}, ANY), {}),
    (MODEL, "_get_dtype_plan", (ANY, torch.float32), {}),
    (MODEL, "_adjust_missing_and_unexpected_keys", (ANY, ANY), {}),
    (MODEL, "mark_tied_weights_as_initialized", (ANY, ANY), {}),
    (MODEL, "_move_missing_keys_from_meta_to_device", (ANY, ANY, ANY, None, None), {}),
    (MODEL, "_initialize_missing_keys", (ANY, False), {}),
    (MODEL, "tie_weights", (ANY,), {"missing_keys": ANY, "recompute_mapping": False}),
    (MODEL, "set_experts_implementation", (ANY, "flashmoe"), {}),
    (moe.ExpertsInterface, "register", ("flashmoe", ANY), {}),
    (_device.DeviceContext, "__torch_function__", (ANY, ANY, ANY), {"args": (), "kwargs": {}}),
    (_pytree, "tree_leaves", (ANY,), {}),
    (_pytree, "tree_map_only", (ANY, ANY, ANY), {}),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[1])
def test_it_takes_what_the_loader_gives(
    call: tuple[object, str, tuple[object, ...], dict[str, object]],
) -> None:
    owner, name, args, kwargs = call
    inspect.signature(getattr(owner, name)).bind(*args, **kwargs)


def test_loading_takes_types_and_a_renaming() -> None:
    config = LoadStateDictConfig(dtype=torch.float32, dtype_plan={}, weight_mapping=[])
    assert (config.dtype, config.dtype_plan, config.weight_mapping) == (torch.float32, {}, [])


def test_what_is_marked_initialised_is_left_alone() -> None:
    """The loader marks the experts' parameters, which have no memory."""
    source = inspect.getsource(PreTrainedModel._initialize_missing_keys)
    source += inspect.getsource(initialization)
    assert "_is_hf_initialized" in source


def test_a_module_calls_the_forward_that_it_was_given() -> None:
    """Kernels of one token replace it on the module itself, and keep the class as it is."""
    linear = torch.nn.Linear(2, 2)
    setattr(linear, "forward", lambda inputs: inputs + 1)  # noqa: B010  a method, to mypy
    assert torch.equal(linear(torch.zeros(2)), torch.ones(2))
    assert torch.equal(torch.nn.Sequential(linear)(torch.zeros(2)), torch.ones(2))
