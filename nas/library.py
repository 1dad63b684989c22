# SPDX-License-Identifier: Apache-2.0
"""The library: every variant of every layer, started in closed form, then distilled block by block.

A variant gets the teacher's own input and learns the teacher's own output of that subblock (teacher-forced, decoupled;
Puzzle 2411.19146): no gradient crosses a layer, so layers and variants are independent jobs. The loss is the normalized
MSE. The last eighth of the windows is held out from all fitting: it chooses the ridge, and what training does not
improve there stays as the closed form made it.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from ..distill.losses import normalized_mse
from ..export.architecture import FFN, Attention
from . import experts
from .activations import CHUNK_WINDOWS, LayerData
from .attention_init import captured, head_scores, pooled, pruned
from .blocks import PARTS, Module, Part, fill, make
from .ffn_init import narrowed, narrowing_error, removal_order
from .formats import METHOD as FORMAT_METHOD
from .formats import Block, rounding_in, source_of
from .jobs import Job, Result, Store
from .nested import train_nested
from .recipe import Recipe
from .ridge import Grams
from .space import LayerSpace, SearchSpace, name_of
from .teacher import Teacher, text_digest

METHOD = 1
"""Raised when the same teacher, text and settings come out as other weights than before."""


def blocks_of(space: LayerSpace, part: Part) -> tuple[Block, ...]:
    return space.attention if part == "attention" else space.ffn


def replacements(space: SearchSpace) -> Iterator[tuple[int, Part, Block]]:
    """Every subblock that is not the teacher's own, layer by layer."""
    for index, layer in enumerate(space.layers):
        for part in PARTS:
            for block in blocks_of(layer, part)[1:]:
                yield index, part, block


def trained(space: SearchSpace) -> Iterator[tuple[int, Part, Block]]:
    """Those of them that the library holds; what is stored in another format is made of these when it is asked for."""
    return (found for found in replacements(space) if rounding_in(found[2]) is None)


def variant_job(teacher: Teacher, layer: int, part: Part, block: Block) -> Job:
    """What names a replacement: the job of the library, or for a rounded one what it is rounded from, and how."""
    rounding, source = rounding_in(block), source_of(block)
    if rounding is None:
        return library_job(teacher, layer, part, block)
    own = source == getattr(teacher.source.decoder.layers[layer], part)
    return Job(
        kind="rounded",
        key={
            "method": FORMAT_METHOD,
            "teacher": teacher.fingerprint,
            "layer": layer,
            "part": part,
            "of": "teacher" if own else library_job(teacher, layer, part, source).id,
            "bits": rounding.bits,
            "group": rounding.group,
        },
    )


def library_job(teacher: Teacher, layer: int, part: Part, block: Block) -> Job:
    own: dict[str, Any] = {}
    if isinstance(block, FFN) and block.kind == "moe":
        own = {"experts": experts.METHOD, "split": experts.SPLIT, "router": asdict(experts.RouterTraining())}
    return Job(
        kind="library",
        key={
            **own,
            "method": METHOD,
            "teacher": teacher.fingerprint,
            "text": text_digest(teacher.train),
            "layer": layer,
            "part": part,
            "block": name_of(block),
            "settings": _settings(teacher.recipe, part, block),
            "seed": teacher.recipe.seed,
        },
    )


def _settings(recipe: Recipe, part: Part, block: Block) -> dict[str, Any]:
    """What of the recipe decides the weights. Nested FFNs depend on all widths, which the space decides."""
    settings = asdict(recipe.library)
    if not settings.pop("nested") or part == "attention" or block.kind != "dense":
        return settings
    space = recipe.space
    return settings | {"nested": [*space.ffn_percent, space.multiple, *space.engines]}


class LibraryMaker:
    """Computes library jobs. Jobs of the same layer should follow one another: its activations are kept."""

    def __init__(self, teacher: Teacher, space: SearchSpace, store: Store, activation_jobs: list[Job]) -> None:
        self._teacher, self._space, self._store, self._activations = teacher, space, store, activation_jobs
        self._data: LayerData | None = None
        self._kept: dict[int, torch.Tensor] = {}
        self._grams: dict[str, torch.Tensor] = {}
        self._nested: dict[int, dict[str, torch.Tensor]] = {}
        self._told: dict[str, Any] = {}

    def compute(self, layer: int, part: Part, block: Block) -> Result:
        """The variant's weights by their names within a layer, in the teacher's type; its losses as facts."""
        if block.kind == "none":
            return {}, {"loss": 1.0, "start": 1.0}
        data = self._layer(layer)
        self._told = {}
        # copies: what is trained in place must not be the teacher's own
        begin = {name: tensor.clone() for name, tensor in self._start(data, block).items()}
        module = fill(make(self._teacher.source.decoder, block), begin).moved(self._teacher.device)
        start = self._loss(data, part, module)
        loss = start
        if self._teacher.recipe.library.steps and start > 0:
            before = {name: tensor.clone() for name, tensor in module.weights().items()}
            if self._teacher.recipe.library.nested and isinstance(block, FFN) and block.kind == "dense":
                fill(module, self._nested_weights(data)[block.width])
            else:
                self._train(data, part, module)
            loss = self._loss(data, part, module)
            if not loss < start:
                module, loss = fill(module, before), start
        weights = {name: tensor.to(self._teacher.dtype) for name, tensor in module.weights().items()}
        bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
        if bad:
            return {}, {"infeasible": f"{bad[0]} came out as NaN or infinity"}
        return weights, {"loss": loss, "start": start, **self._told}

    def _layer(self, index: int) -> LayerData:
        if self._data is None or self._data.index != index:
            self._data = None  # before the next is read: two layers' activations need not be held
            self._data = LayerData(self._teacher, self._store, self._activations, index)
            self._kept, self._grams, self._nested = {}, {}, {}
        return self._data

    def _start(self, data: LayerData, block: Block) -> dict[str, torch.Tensor]:
        weights = {name: tensor.float() for name, tensor in self._teacher.layer_weights[data.index].items()}
        if block.kind == "linear":
            return self._linear(data, block, weights)
        if isinstance(block, Attention):
            return self._fewer_heads(data, block, weights)
        if block.kind == "moe":
            recipe, teacher = self._teacher.recipe, self._teacher.source.decoder
            begin, self._told = experts.carve(
                teacher, block, data, weights, ridges=recipe.library.ridge, seed=recipe.seed
            )
            return begin
        return self._narrower(data, block, weights)

    def _narrower(self, data: LayerData, block: FFN, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ridges = self._teacher.recipe.library.ridge
        if not self._kept:
            mine = [ffn for ffn in self._space.layers[data.index].ffn[1:] if rounding_in(ffn) is None]
            widths = [ffn.width for ffn in mine if ffn.kind == "dense"]
            self._grams = {"fit": data.ffn_gram(data.fit), "held": data.ffn_gram(data.held)}
            middle = sorted(ridges)[len(ridges) // 2]
            self._kept = removal_order(self._grams["fit"], weights["mlp.down_proj.weight"], widths, middle)
        kept = self._kept[block.width]
        candidates = [narrowed(weights, self._grams["fit"], kept, ridge) for ridge in ridges]
        return min(candidates, key=lambda found: narrowing_error(weights, found, self._grams["held"], kept))

    def _nested_weights(self, data: LayerData) -> dict[int, dict[str, torch.Tensor]]:
        """Of all widths of the layer, trained at the first that is asked for."""
        if not self._nested:
            recipe = self._teacher.recipe
            weights = {name: tensor.float() for name, tensor in self._teacher.layer_weights[data.index].items()}
            seed = recipe.seed + data.index
            self._nested = train_nested(data, weights, self._grams["fit"], self._kept, recipe.library, seed)
        return self._nested

    def _linear(self, data: LayerData, block: Block, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs, targets = data.of("attention" if isinstance(block, Attention) else "ffn")
        fit, held = Grams(), Grams()
        fit.add(inputs[data.fit], targets[data.fit])
        held.add(inputs[data.held], targets[data.held])
        matrix = self._best_ridge(fit, held)[1].float()
        if isinstance(block, FFN):
            norm = "post_attention_layernorm.weight"
            return {norm: weights[norm], "mlp.linear_mlp.weight": matrix}
        norm = "input_layernorm.weight"
        return {norm: weights[norm], "self_attn.linear_attn.weight": matrix}

    def _best_ridge(self, fit: Grams, held: Grams, prior: torch.Tensor | None = None) -> tuple[float, torch.Tensor]:
        """(error on the held-out windows, matrix)."""
        found = [fit.solve(ridge, prior) for ridge in self._teacher.recipe.library.ridge]
        return min(((held.error(matrix), matrix) for matrix in found), key=lambda one: one[0])

    def _fewer_heads(
        self, data: LayerData, block: Attention, weights: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        decoder = self._teacher.source.decoder
        before = decoder.layers[data.index].attention.kv_heads
        inputs = data.attention[0][data.fit]
        with torch.no_grad():
            values, _ = captured(data.layer.self_attn, inputs[:CHUNK_WINDOWS], position_embeddings=data.positions)
            scores = head_scores(values.flatten(0, 1), data.layer.self_attn.o_proj.weight, before).cpu()
        candidates = [
            pruned(weights, scores, heads=decoder.heads, head_dim=decoder.head_dim, kv_heads=block.kv_heads),
            pooled(weights, before=before, kv_heads=block.kv_heads),
        ]
        refitted = [self._refit_output(data, block, candidate) for candidate in candidates]
        return min(refitted, key=lambda found: found[0])[1]

    def _refit_output(
        self, data: LayerData, block: Attention, weights: dict[str, torch.Tensor]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """(error, weights) with the output projection that is best for these heads."""
        begin = {name: tensor.clone() for name, tensor in weights.items()}
        module = fill(make(self._teacher.source.decoder, block), begin).moved(self._teacher.device)
        inputs, targets = data.attention
        sums = []
        for windows in (data.fit, data.held):
            grams = Grams()
            with torch.no_grad():
                both = zip(inputs[windows].split(CHUNK_WINDOWS), targets[windows].split(CHUNK_WINDOWS), strict=True)
                for part, target in both:
                    values, _ = captured(module.body, part, position_embeddings=data.positions)
                    grams.add(values, target)
            sums.append(grams)
        fit, held = sums
        error, output = self._best_ridge(fit, held, weights["self_attn.o_proj.weight"])
        return error, {**weights, "self_attn.o_proj.weight": output.float()}

    def _loss(self, data: LayerData, part: Part, module: Module) -> float:
        """On the held-out windows."""
        inputs, targets = data.of(part)
        with torch.no_grad():
            return normalized_mse(self._answer(data, part, module, inputs[data.held]), targets[data.held]).item()

    def _answer(self, data: LayerData, part: Part, module: Module, inputs: torch.Tensor) -> torch.Tensor:
        if part == "ffn":
            return module.body(inputs)
        return module.body(hidden_states=inputs, attention_mask=None, position_embeddings=data.positions)[0]

    def _train(self, data: LayerData, part: Part, module: Module) -> None:
        settings = self._teacher.recipe.library
        inputs, targets = (whole[data.fit] for whole in data.of(part))
        usable = len(inputs)
        body: Any = module.body
        body.requires_grad_(True)
        optimizer = torch.optim.AdamW(body.parameters(), lr=settings.lr, weight_decay=0.0, foreach=False)
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (1 - step / settings.steps)
            rows = [(step * settings.batch + row) % usable for row in range(min(settings.batch, usable))]
            loss = normalized_mse(self._answer(data, part, module, inputs[rows]), targets[rows])
            if isinstance(body, experts.MoeFFN) and body.balance is not None:
                loss = loss + experts.BALANCE * body.balance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        body.requires_grad_(False)
