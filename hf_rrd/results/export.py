"""A model as one ONNX file that needs neither hf_rrd nor torch, checked against the model itself."""

import contextlib
import copy
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import PreTrainedModel

from hf_rrd.errors import described
from hf_rrd.files import written_whole
from hf_rrd.models.body import main_input_of
from hf_rrd.models.head import detach_head
from hf_rrd.models.teacher import load_teacher


def export_onnx(model: Any, path: str | Path, inputs: Mapping[str, Tensor], atol: float = 1e-4) -> float:
    """Write a model to one ONNX file by transformers' own exporter, and compare the two by `check_onnx`.

    The file takes any number of examples, and texts and sound of any length that the model takes; images keep their
    size. It gives what the model gives in eval mode and float32, without hidden states, attentions, caches and the
    relational head. The model stays as it was.

    Args:
        model: A transformers model, with a trainer's head or none, its adapters merged, of less than 2 GiB in float32;
            or a Hub name or folder.
        path: The file; an older one is replaced once the new one has passed.
        inputs: What the model's forward takes, without labels, (batch, ...) each; texts of 2 tokens or more.
        atol: The largest absolute difference to accept.

    Returns:
        The largest absolute difference of an output.

    Raises:
        ImportError: A package of the extra `onnx` is missing, or transformers is older than 5.13.
        TypeError: `model` is not a transformers model.
        ValueError: `inputs` do not suit, the model cannot be loaded or is too large, or the file differs from it.
    """
    packages = ("transformers.exporters", "onnx", "onnxruntime", "onnxscript")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"`export_onnx` needs transformers 5.13 or newer, got {transformers.__version__}, and ONNX. Missing: "
            f"{', '.join(missing)}. Try: pip install -U 'hf_rrd[onnx]'"
        )
    import onnx_ir
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = load_teacher(model, argument="model")
    plain, given, free = _plain(model, inputs)
    # Twice the examples: torch.export takes a size of 1 for a constant.
    traced = {name: torch.cat([value, value]) for name, value in given.items()}
    shapes = {name: dict.fromkeys(dims, torch.export.Dim.AUTO) for name, dims in free.items()}
    with contextlib.redirect_stdout(io.StringIO()):  # torch.onnx prints how far it is
        exported = OnnxExporter().export(plain, traced, OnnxConfig(dynamic=True, dynamic_shapes=shapes))
    program = exported.program if hasattr(exported, "program") else exported.model  # before transformers 5.23
    with written_whole(path) as temporary:
        onnx_ir.save(program, temporary)
        return check_onnx(temporary, model, inputs, atol)


def check_onnx(path: str | Path, model: Any, inputs: Mapping[str, Tensor], atol: float = 1e-4) -> float:
    """Compare an ONNX file with its model, on `inputs` and on their first example, a text without its first token.

    Arguments, result and errors are those of `export_onnx`; nothing is written.
    """
    model = load_teacher(model, argument="model")
    plain, given, free = _plain(model, inputs)
    # The last token stays: BART's classifier needs it.
    shorter = {name: value[:1, 1:] if 1 in free[name] else value[:1] for name, value in given.items()}
    if "attention_mask" in shorter:  # the mean over no token at all is no number
        shorter["attention_mask"] = torch.ones_like(shorter["attention_mask"])
    differences = torch.tensor([_difference(path, plain, batch) for batch in (given, shorter)], dtype=torch.float64)
    if not (differences <= atol).all():  # NaN is no pass
        raise ValueError(
            f"the ONNX file must give what {type(model).__name__} gives to {atol:g}, got differences up to "
            f"{differences.max():.3g}. Export it again, or raise `atol` where the outputs are large."
        )
    return differences.max().item()


def _plain(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor], dict[str, list[int]]]:
    """A copy of the model in eval mode and its inputs, in float32 on the CPU, and which dimensions of each are free.

    Free are the batch and the length of a text; images and spectrograms keep their size.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a PreTrainedModel, got {name}. Merge adapters: `model.merge_and_unload()`.")
    size = 4 * sum(weight.numel() for weight in model.parameters())
    if size > 2**31 - 2**25:  # protobuf ends at 2 GiB, and the graph itself needs some
        raise ValueError(f"`model` must have less than 2 GiB of weights in float32, got {size / 2**30:.1f} in {name}.")
    columns = inputs if isinstance(inputs, Mapping) else {}
    main = columns.get(main_input_of(model))
    sizes = {len(value) if isinstance(value, Tensor) and value.dim() else 0 for value in columns.values()}
    if main is None or "labels" in inputs or len(sizes) != 1 or 0 in sizes or (main.dim() == 2 and main.shape[1] < 2):
        raise ValueError(
            f"`inputs` must be tensors of as many examples, without labels, among them `{main_input_of(model)}`, a "
            f"text of 2 tokens or more, got {described(inputs)}."
        )
    plain: Any = copy.deepcopy(model)
    detach_head(plain)
    plain = extract_model_from_parallel(plain, keep_fp32_wrapper=False)  # without the autocast of a trainer with bf16
    plain.config.update({"use_cache": False, "output_hidden_states": False, "output_attentions": False})
    plain.config.return_dict = True
    if plain.config._attn_implementation not in ("eager", "sdpa"):  # kernels that ONNX does not know
        plain.set_attn_implementation("eager")
    tensors = {name: value.detach().cpu() for name, value in inputs.items()}
    given = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    is_text = {name: value.dim() == 2 and value.shape == main.shape for name, value in given.items()}
    return plain.cpu().float().eval(), given, {name: [0, 1] if is_text[name] else [0] for name in given}


def _difference(path: str | Path, plain: Any, inputs: dict[str, Tensor]) -> float:
    """The largest absolute difference of an output of the file from the model's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        values = session.run(None, {spec.name: inputs[spec.name].numpy() for spec in session.get_inputs()})
    except Exception as error:  # its classes have no base of their own
        raise ValueError(f"the ONNX file does not run on {described(inputs)}: {error}") from error
    found = {spec.name: torch.from_numpy(value) for spec, value in zip(session.get_outputs(), values, strict=True)}
    with torch.no_grad():
        wanted = {name: value for name, value in plain(**inputs).items() if isinstance(value, Tensor)}
    if any(name not in found or found[name].shape != value.shape for name, value in wanted.items()):
        raise ValueError(f"the ONNX file must give {described(wanted)}, got {described(found)}.")
    return torch.stack([(found[name] - wanted[name]).abs().max() for name in wanted]).max().item()
