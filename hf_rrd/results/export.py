"""A model as one ONNX file that needs neither hf_rrd nor torch, in float32 or int8, checked against the model."""

import contextlib
import copy
import importlib.util
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, overload

import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_rrd.errors import described
from hf_rrd.files import written_whole
from hf_rrd.models.body import is_headless, main_input_of
from hf_rrd.models.embedding import Embedder
from hf_rrd.models.head import detach_head
from hf_rrd.models.teacher import load_teacher


@overload
def export_onnx(
    model: Any, path: str | Path, inputs: Mapping[str, Tensor], atol: float = 1e-4, quantize: None = None
) -> float: ...


@overload
def export_onnx(
    model: Any,
    path: str | Path,
    inputs: Mapping[str, Tensor],
    atol: float = 1e-4,
    *,
    quantize: Literal["int8"],
    min_agreement: float = 0.95,
) -> dict[str, float]: ...


def export_onnx(
    model: Any,
    path: str | Path,
    inputs: Mapping[str, Tensor],
    atol: float = 1e-4,
    quantize: str | None = None,
    min_agreement: float = 0.95,
) -> float | dict[str, float]:
    """Write a model to one ONNX file by transformers' own exporter, and compare the two by `check_onnx`.

    The file takes any number of examples, and texts and sound of any length that the model takes; images keep their
    size. It gives what the model gives in eval mode and float32, without hidden states, attentions, caches and the
    relational head. The model stays as it was.

    With `quantize="int8"` the weights of its products, its convolutions and its words are then rounded to 8 bits by
    onnxruntime, and the file is compared with the model once more, by `check_quantized`: a quarter of the bytes.

    Args:
        model: A transformers model, with a trainer's head or none, its adapters merged, of less than 2 GiB in float32;
            or a Hub name or folder.
        path: The file; an older one is replaced once the new one has passed.
        inputs: What the model's forward takes, without labels, (batch, ...) each; texts of 2 tokens or more. For int8
            some hundred examples: the figures are of them.
        atol: The largest absolute difference to accept, in float32.
        quantize: "int8" for 8 bits, None for float32.
        min_agreement: With `quantize`, the least share of equal predictions, or the least cosine, to accept.

    Returns:
        The largest absolute difference of an output; with `quantize` what `check_quantized` returns.

    Raises:
        ImportError: A package of the extra `onnx` is missing, or transformers is older than 5.13.
        TypeError: `model` is not a transformers model.
        ValueError: `inputs` do not suit, the model cannot be loaded or is too large, or the file differs from it.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"`quantize` must be None or 'int8', got {quantize!r}.")
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
        difference = check_onnx(temporary, model, inputs, atol)
        if quantize is None:
            return difference
        _quantize(temporary)
        return check_quantized(temporary, model, inputs, min_agreement)


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
    outputs = [_outputs(path, plain, batch) for batch in (given, shorter)]
    differences = torch.tensor([_difference(*each) for each in outputs], dtype=torch.float64)
    if not (differences <= atol).all():  # NaN is no pass
        raise ValueError(
            f"the ONNX file must give what {type(model).__name__} gives to {atol:g}, got differences up to "
            f"{differences.max():.3g}. Export it again, or raise `atol` where the outputs are large."
        )
    return differences.max().item()


def check_quantized(
    path: str | Path, model: Any, inputs: Mapping[str, Tensor], min_agreement: float = 0.95
) -> dict[str, float]:
    """Compare a quantised ONNX file with its model in float32, on `inputs` as one batch.

    The scale of an activation is that of its batch, so other batches differ a little more or less.

    Args:
        path: The file.
        model, inputs, min_agreement: As `export_onnx` has them.

    Returns:
        `difference`, the largest absolute one of an output, and: of a classifier `agreement`, the share of equal
        predictions, and `probability_difference`, the largest difference of a probability; of a model without a head
        `cosine`, the smallest of an example's embeddings; of any other `cosine`, the smallest of an output as a whole.

    Raises:
        ValueError: `inputs` do not suit, the file does not run, or agreement or cosine is below `min_agreement`.
    """
    model = load_teacher(model, argument="model")
    plain, given, _ = _plain(model, inputs)
    found, wanted = _outputs(path, plain, given)
    figures, likeness = {"difference": _difference(found, wanted)}, "cosine"
    if "logits" in wanted and wanted["logits"].shape[-1] > 1:
        likeness, logits, mask = "agreement", [found["logits"], wanted["logits"]], given.get("attention_mask")
        if mask is not None and mask.shape == logits[0].shape[:-1]:  # a prediction for each token
            logits = [each[mask != 0] for each in logits]
        several = plain.config.problem_type == "multi_label_classification"
        classes = [each > 0 if several else each.argmax(-1) for each in logits]
        shares = [each.sigmoid() if several else each.softmax(-1) for each in logits]
        figures["agreement"] = (classes[0] == classes[1]).float().mean().item()
        figures["probability_difference"] = (shares[0] - shares[1]).abs().max().item()
    else:
        if is_headless(plain):
            pool = Embedder(plain).pool
            pairs = [(pool(SimpleNamespace(**found), given), pool(SimpleNamespace(**wanted), given))]
        else:
            pairs = [(found[name].reshape(1, -1), wanted[name].reshape(1, -1)) for name in wanted]
        figures["cosine"] = min(torch.cosine_similarity(a, b).min().item() for a, b in pairs)
    if not (figures[likeness] >= min_agreement and figures["difference"] < torch.inf):  # NaN is no pass
        came = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        raise ValueError(
            f"the int8 file must be like {type(model).__name__}: {likeness} of {min_agreement:g} or more, got {came}. "
            "Pass more examples as `inputs`, lower `min_agreement`, or keep float32."
        )
    return figures


class OnnxModel(nn.Module):
    """An ONNX file on the CPU as a module: its forward takes inputs by name and gives its outputs by name."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("an ONNX file is run by onnxruntime: pip install 'hf_rrd[onnx]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its classes have no base of their own
            raise ValueError(f"{path} cannot be loaded as an ONNX file: {error}") from error
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # says where its inputs go

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The outputs of a batch; inputs that the file does not take are left out."""
        values = self.session.run(None, {spec.name: inputs[spec.name].numpy() for spec in self.session.get_inputs()})
        return {
            spec.name: torch.from_numpy(each) for spec, each in zip(self.session.get_outputs(), values, strict=True)
        }


def _quantize(path: Path) -> None:
    """Round the weights of a file to 8 bits, with a scale for each channel of a product."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    program = onnx.load(str(path))
    # Or a warning asks for constants to be folded and shapes to be known, which the exporter has done.
    program.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    silent = logging.NullHandler()
    logging.root.addHandler(silent)  # or onnxruntime gives the root logger one that prints, for good
    try:
        # 7 bits in products: 8 may overflow on a CPU without VNNI, and the file would be another there.
        quantize_dynamic(program, path, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)
    finally:
        logging.root.removeHandler(silent)


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


def _outputs(path: str | Path, plain: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By name, the outputs of the file and of the model."""
    try:
        found = OnnxModel(path)(**inputs)
    except ImportError:
        raise
    except Exception as error:  # those of onnxruntime have no base of their own
        raise ValueError(f"the ONNX file does not run on {described(inputs)}: {error}") from error
    with torch.no_grad():
        wanted = {name: value for name, value in plain(**inputs).items() if isinstance(value, Tensor)}
    if any(name not in found or found[name].shape != value.shape for name, value in wanted.items()):
        raise ValueError(f"the ONNX file must give {described(wanted)}, got {described(found)}.")
    return found, wanted


def _difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest absolute difference of an output."""
    return torch.stack([(found[name] - wanted[name]).abs().max() for name in wanted]).max().item()
