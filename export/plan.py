# SPDX-License-Identifier: Apache-2.0
"""What an export would write: settings, and the plan that follows from them. Nothing is written here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .alike import alike
from .architecture import Decoder
from .compressed import BITS, Rounding, is_rounded, rounding_of
from .configs import uniform_obstacles
from .convert import CONVERTED, GRAPH_BYTES, GRAPH_FILES, WEIGHT_FILES
from .directory import ModelDirectory
from .engines import ENGINES, Layout
from .errors import EngineFitError, ExportUsageError, ModelDirectoryError
from .fit import Finding, adapt, check_fit, final_form, form_for, needs_plugin
from .forms import REMOTE_FILES, Form, forms_of
from .gguf_file import FILE_TYPES, file_entries
from .plugin import WHEEL
from .relayout import Relayout, relayout

SHARD_BYTES = 4_000_000_000
QUANTIZE = ("none", "bf16", *FILE_TYPES, *BITS)
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_SLACK_BYTES = 1 << 20  # headers, configuration, card


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What was asked for."""

    model: Path
    engines: tuple[str, ...]
    out: Path
    """Each layout gets a directory of its own in it."""
    quantize: str = "none"
    """`none`: Hugging Face directories keep the types of the source, GGUF is f32. Or one of `QUANTIZE`."""
    verify: bool | None = None
    """None: with the engines that are installed. True: all must be. False: none, and the export says so."""
    overwrite: bool = False
    tokenizer: bool = True
    """Without one only token ids can be served."""
    plain: bool = False
    """Write layers that differ as layers that are alike, so that no modelling code goes along to be trusted."""
    family: str = ""
    """Experts are written in this family's layout. Empty: in the source's."""
    origin: str = ""
    """What `model` was made of, where it is not the user's own: a checkpoint, or a job's memory."""

    @property
    def name(self) -> str:
        """Of the model, for people."""
        return self.out.absolute().name.removesuffix("-export") if self.origin else self.model.absolute().name

    def __post_init__(self) -> None:
        if self.quantize not in QUANTIZE:
            raise ExportUsageError(f"--quantize {self.quantize!r} is none of {', '.join(QUANTIZE)}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One directory of the export: one layout, for one or several engines."""

    layout: Layout
    engines: tuple[str, ...]
    directory: Path
    decoder: Decoder
    weights: str
    """source, f32, bf16, f16 or a key of `BITS` in a Hugging Face directory; a key of `FILE_TYPES` in GGUF."""
    shards: tuple[tuple[str, tuple[str, ...]], ...]
    """(file, tensors in it)."""
    files: tuple[tuple[str, int], ...]
    """(name, bytes): exact for weights, about right for the small ones."""
    form: Form = "uniform"
    """Of the configuration; in GGUF all but `uniform` is `deci`."""
    plugin: bool = False
    """vLLM's goes along, see `plugin`."""
    plain: bool = False
    """Layers were made alike for it."""
    relayout: Relayout | None = None
    """How the source's weights are called otherwise; `decoder` is as they are called here."""
    rounding: Rounding | None = None
    """Of weights that are keys of `BITS`."""

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)

    @property
    def model_path(self) -> Path:
        """What an engine is given: the directory, or the file in it."""
        return self.directory / self.shards[0][0] if self.layout == "gguf" else self.directory

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "form": self.form,
            "engines": list(self.engines),
            "path": str(self.model_path),
            "weights": self.weights,
            "files": [{"name": name, "bytes": size} for name, size in self.files],
            "bytes": self.bytes,
        }


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    parts: tuple[Part, ...]
    findings: tuple[Finding, ...]
    """What is written in another form that computes the same."""
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """On disk, at most: a directory that an exporter starts from stands beside what it makes of it."""
        times = [2 if part.layout in CONVERTED else 1 for part in self.parts]
        written = sum(part.bytes * count for part, count in zip(self.parts, times, strict=True))
        return written + _SLACK_BYTES * len(self.parts)


def make_plan(config: ExportConfig, source: ModelDirectory) -> ExportPlan:
    """Decide what to write.

    Raises:
        EngineFitError: if an engine or `config.family` cannot represent the model, with a line for each obstacle.
        ModelDirectoryError: if there is no tokenizer and an engine serves nothing without.
        ExportUsageError: if the weights' format is not for a layout.
    """
    moved = relayout(source.decoder, config.family) if config.family not in ("", source.decoder.family) else None
    decoder = moved.decoder if moved else source.decoder
    if config.plain:
        decoder = _plain(decoder)
    findings = [finding for name in config.engines for finding in check_fit(decoder, name)]
    refuse(findings)
    parts = []
    layouts: tuple[Layout, ...] = ("huggingface", "gguf", "openvino", "onnx")
    for layout in layouts:
        engines = tuple(name for name in config.engines if ENGINES[name].layout == layout)
        if engines and layout == "gguf" and not any(file.name.startswith("tokenizer") for file in source.companions):
            raise ModelDirectoryError(
                f"{source.path} has no tokenizer, and llama.cpp ends itself on a model without a vocabulary. Copy the "
                "tokenizer's files there, or leave llama.cpp out"
            )
        parts += [
            _part(config, source, layout, together, directory, adapt(decoder, together, form), moved)
            for directory, form, together in _groups(decoder, layout, engines)
        ]
    if config.quantize != "none" and not any(part.weights == config.quantize for part in parts):
        raise ExportUsageError(f"--quantize {config.quantize} is for none of {', '.join(config.engines)}")
    return ExportPlan(parts=tuple(parts), findings=tuple(findings), notes=source.notes)


def _plain(decoder: Decoder) -> Decoder:
    found = decoder if "uniform" in forms_of(decoder) else alike(decoder)
    if found is None:
        raise EngineFitError(
            "the model does not fit: no weights make these layers alike (linear subblocks, experts or windows that "
            "differ). Leave --plain out; the modelling code that goes along is refound's own"
        )
    return found


def _groups(
    decoder: Decoder, layout: Layout, engines: tuple[str, ...]
) -> list[tuple[str, Form | None, tuple[str, ...]]]:
    """(directory, form, engines): one for all of a layout, and a second for those that want another form."""
    chosen: dict[Form | None, list[str]] = {}
    for name in engines:
        chosen.setdefault(form_for(decoder, name), []).append(name)
    names = [layout, *(f"{layout}-{form or 'alike'}".replace("_", "-") for form in list(chosen)[1:])]
    return [(name, form, tuple(found)) for name, (form, found) in zip(names, chosen.items(), strict=False)]


def refuse(findings: list[Finding]) -> None:
    """Raise EngineFitError if something has no exact equivalent."""
    if bad := [finding for finding in findings if finding.exact is None]:
        lines = [f"{ENGINES[finding.engine].title}: {finding}" for finding in bad]
        more = f"\n  and {len(lines) - 12} more" if len(lines) > 12 else ""
        raise EngineFitError("the model does not fit:\n  " + "\n  ".join(lines[:12]) + more)


def _part(
    config: ExportConfig,
    source: ModelDirectory,
    layout: Layout,
    engines: tuple[str, ...],
    directory: str,
    decoder: Decoder,
    moved: Relayout | None,
) -> Part:
    form = final_form(decoder, engines)
    refuse([finding for name in engines for finding in check_fit(decoder, name, form)])
    plugin = "vllm" in engines and needs_plugin(decoder, "vllm", form)
    rounding = None
    companions = [(file.name, file.stat().st_size) for file in source.companions]
    small = [("README.md", 2000), ("refound.json", 4000)]
    if layout == "gguf":
        weights = config.quantize if config.quantize in FILE_TYPES else "f32"
        name = f"model-{weights}.gguf"
        entries = file_entries(decoder, weights)
        shards = ((name, tuple(entry.name for entry in entries)),)
        files = [(name, sum(entry.bytes for entry in entries)), *small]
    elif layout in CONVERTED:
        weights = "f32"
        shards, sizes = _shards(source, decoder, weights, moved.sources if moved else {}, None)
        known = [name for name in GRAPH_FILES[layout] if companions or "tokenizer" not in name]
        graph = [(name, GRAPH_BYTES // len(known)) for name in known]
        weight_file = (WEIGHT_FILES[layout], sum(size for _, size in sizes))
        files = [weight_file, *graph, ("config.json", 2000), *companions, *small]
    else:
        weights = config.quantize if config.quantize in ("f32", "bf16", "f16", *BITS) else "source"
        rounding = _rounding(decoder, weights)
        shards, sizes = _shards(source, decoder, weights, moved.sources if moved else {}, rounding)
        remote = [(name, 4000) for name in REMOTE_FILES[form]] + ([(WHEEL, 4000)] if plugin else [])
        index = [("model.safetensors.index.json", 100 * len(decoder.tensors()))] if len(shards) > 1 else []
        files = [*sizes, ("config.json", 2000), *index, *remote, *companions, *small]
    return Part(
        layout=layout,
        engines=engines,
        directory=config.out / directory,
        decoder=decoder,
        weights=weights,
        shards=shards,
        files=tuple(files),
        form=form,
        plugin=plugin,
        plain=config.plain and bool(uniform_obstacles(source.decoder)),
        relayout=moved,
        rounding=rounding,
    )


def _rounding(decoder: Decoder, weights: str) -> Rounding | None:
    if weights not in BITS:
        return None
    found = rounding_of(decoder, weights)
    if isinstance(found, str):
        raise EngineFitError(f"the model does not fit: {found}")
    return found


def _shards(
    source: ModelDirectory,
    decoder: Decoder,
    weights: str,
    renamed: Mapping[str, str],
    rounding: Rounding | None,
) -> tuple[tuple[tuple[str, tuple[str, ...]], ...], list[tuple[str, int]]]:
    groups: list[tuple[list[str], int]] = [([], 0)]
    for name, spec in decoder.tensors().items():
        stored = source.tensors.get(renamed.get(name, name))
        fixed = {"f32": 4, "f16": 2}.get(weights, 2 if rounding or weights == "bf16" else 0)
        width = fixed or _WIDTHS[stored.dtype if stored else source_type(source)]
        size_bytes = spec.size * width
        if rounding and is_rounded(name, spec.shape):
            size_bytes = rounding.bytes_of(spec.size)
        if groups[-1][0] and groups[-1][1] + size_bytes > SHARD_BYTES:
            groups.append(([], 0))
        names, total = groups[-1]
        groups[-1] = ([*names, name], total + size_bytes)
    count = len(groups)
    named = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    named = named if count > 1 else ["model.safetensors"]
    shards = tuple((file, tuple(names)) for file, (names, _) in zip(named, groups, strict=True))
    return shards, [(file, total) for file, (_, total) in zip(named, groups, strict=True)]


def source_type(source: ModelDirectory) -> str:
    """The type of the embedding, which is what made-up weights get."""
    return source.tensors["model.embed_tokens.weight"].dtype
