"""A checkpoint as a stateful OpenVINO model, which OpenVINO GenAI serves with paged attention and continuous batching.

The usual export tool wants an older transformers; for a causal LM with a plain key-value cache these steps suffice:

1. the forward pass is traced with keys and values of the past as inputs, and of past and present as outputs,
2. those pairs become state, empty at first, re-ordered by `beam_idx`: the shape that OpenVINO GenAI looks for.
"""

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from erlib.lm import models

if TYPE_CHECKING:
    import openvino
    from transformers import PreTrainedModel

FOLDER = "openvino"  # within an exported model


def convertible(folder: Path) -> bool:
    """Whether a checkpoint's cache holds keys and values of every layer and nothing else: no sliding window."""
    from transformers import AutoConfig, DynamicCache

    return models.plain_cache(DynamicCache(config=AutoConfig.from_pretrained(folder)))


def write(folder: Path, out: Path) -> None:
    """Convert a checkpoint at full precision (fp32) into `out`, with its settings and tokenizer.

    Raises ValueError for a model whose cache holds more than keys and values of every layer.
    """
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    traced = _trace(model)
    states = [f"{layer}.{kind}" for layer in range(model.config.num_hidden_layers) for kind in ("key", "value")]
    _name(traced, model, states)
    _reorder(traced, first=3)
    apply_make_stateful_transformation(traced, {f"past_key_values.{state}": f"present.{state}" for state in states})
    _start_empty(traced, heads=model.config.num_key_value_heads, width=_width(model))
    traced.validate_nodes_and_infer_types()
    out.mkdir(parents=True, exist_ok=True)
    openvino.save_model(traced, out / "openvino_model.xml", compress_to_fp16=False)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / file, out / file)


def _width(model: "PreTrainedModel") -> int:
    """Width of a key or value of one head."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class _Step(torch.nn.Module):
    """One forward pass as a pure function: tokens, mask, positions, past → logits, past with present."""

    def __init__(self, model: "PreTrainedModel"):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,  # (B, T)
        attention_mask: torch.Tensor,  # (B, P + T)
        position_ids: torch.Tensor,  # (B, T)
        past: list[torch.Tensor],  # keys and values of each layer (B, heads, P, width)
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        if not models.plain_cache(cache):
            raise ValueError("only models with a plain key-value cache in every layer can be converted")
        for layer, keys, values in zip(cache.layers, past[::2], past[1::2], strict=True):
            layer.is_initialized = True
            layer.update = _append(layer, keys, values)
        total, new = attention_mask.shape[1], input_ids.shape[1]
        causal = torch.arange(total)[None, :] <= torch.arange(new)[:, None] + (total - new)
        output = self.model(
            input_ids=input_ids,
            attention_mask=causal[None, None] & (attention_mask[:, None, None, :] > 0),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, *(state for layer in cache.layers for state in (layer.keys, layer.values))


def _append(layer: object, keys: torch.Tensor, values: torch.Tensor):  # noqa: ANN202 - a method's stand-in
    def update(new_keys: torch.Tensor, new_values: torch.Tensor, *_: object, **__: object) -> tuple:
        layer.keys, layer.values = torch.cat([keys, new_keys], dim=2), torch.cat([values, new_values], dim=2)
        return layer.keys, layer.values

    return update


def _trace(model: "PreTrainedModel") -> "openvino.Model":
    import openvino

    heads, width = model.config.num_key_value_heads, _width(model)
    example = {
        "input_ids": torch.ones(2, 4, dtype=torch.long),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "position_ids": torch.arange(3, 7).repeat(2, 1),
        "past": [torch.zeros(2, heads, 3, width) for _ in range(2 * model.config.num_hidden_layers)],
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: constants that do not depend on the example, deprecations
        return openvino.convert_model(_Step(model), example_input=example)


def _name(traced: "openvino.Model", model: "PreTrainedModel", states: list[str]) -> None:
    """Give inputs and outputs the names that OpenVINO GenAI knows, and free their batch and length."""
    import openvino

    heads, width = model.config.num_key_value_heads, _width(model)
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{state}" for state in states)]
    for place, name in zip(traced.inputs, inputs, strict=True):
        place.get_tensor().set_names({name})
        shape = [-1, heads, -1, width] if name.startswith("past") else [-1, -1]
        place.get_node().set_partial_shape(openvino.PartialShape(shape))
    for place, name in zip(traced.outputs, ["logits", *(f"present.{state}" for state in states)], strict=True):
        place.get_tensor().set_names({name})
    traced.validate_nodes_and_infer_types()


def _reorder(traced: "openvino.Model", *, first: int) -> None:
    """Let every state, an input from `first` on, be read through `beam_idx` (B,)."""
    import openvino
    from openvino import opset13

    beams = opset13.parameter(openvino.PartialShape([-1]), openvino.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    for state in traced.inputs[first:]:
        readers = state.get_target_inputs()
        ordered = opset13.gather(state.get_node(), beams, opset13.constant(0))
        for reader in readers:
            reader.replace_source_output(ordered.output(0))
    traced.add_parameters([beams])
    traced.validate_nodes_and_infer_types()


def _start_empty(traced: "openvino.Model", *, heads: int, width: int) -> None:
    """Let every state begin as (B, heads, 0, width): without a beginning no paged attention is put in its place."""
    from openvino import opset13

    size = opset13.shape_of(traced.input("input_ids"), output_type="i64")
    batch = opset13.gather(size, opset13.constant([0]), opset13.constant(0))
    shape = opset13.concat([batch, opset13.constant(np.array([heads, 0, width], dtype=np.int64))], 0)
    for node in traced.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([opset13.broadcast(opset13.constant(np.float32(0)), shape)])
