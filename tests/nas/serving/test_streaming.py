# SPDX-License-Identifier: Apache-2.0
"""A model whose experts come from disk computes, to the bit, what it does with all of them in memory."""

import contextlib
from pathlib import Path

import pytest
import torch
from refound.export.architecture import FFN
from refound.export.directory import open_directory
from refound.nas.serving.errors import CapacityError, MismatchError
from refound.nas.serving.expert_store import ExpertFiles, ExpertStore, StreamConfig
from refound.nas.serving.streaming import open_streamed

from ...export.models import decoder, with_layer, write_model

IDS = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(0))


def resident(path: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("read_ahead", [0, 1, 2])
def test_streamed_outputs_are_those_of_the_resident_model(tmp_path: Path, family: str, read_ahead: int) -> None:
    """12 experts in all, of which 2 fit on the device and 3 in host memory."""
    path = write_model(tmp_path / "model", decoder(family, layers=3))
    with open_streamed(path, StreamConfig(device_slots=2, host_slots=3, read_ahead=read_ahead)) as (model, store):
        found = model(IDS).logits
        assert torch.equal(found, resident(path, IDS))
        assert torch.equal(model(IDS[:1, :5]).logits, resident(path, IDS[:1, :5]))
        held = sum(weight.nbytes for weight in model.parameters())
        assert held + 12 * store.files.expert_bytes == sum(
            stored.nbytes for stored in dict(_all(path)).values()
        )  # experts are in no parameter
        counts = store.counts
        assert counts.asked == counts.on_device + counts.in_host + counts.from_disk
        assert counts.from_disk > 0 if read_ahead == 0 else counts.in_host > 0
        assert (counts.read_ahead > 0) == (read_ahead > 0)


def _all(path: Path) -> list[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    return list(load_file(path / "model.safetensors").items())


def test_dense_layers_bfloat16_and_greedy_decoding(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = with_layer(decoder("qwen3_moe", layers=3, tied=True), 1, ffn=FFN(width=96))
    path = write_model(tmp_path / "model", made)
    kinds = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with open_streamed(path, StreamConfig(device_slots=1, host_slots=1), dtype=torch.bfloat16) as (model, _):
        assert torch.equal(model(IDS).logits, resident(path, IDS, torch.bfloat16))
        whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, experts_implementation="eager")
        assert torch.equal(model.generate(IDS[:, :6], **kinds), whole.generate(IDS[:, :6], **kinds))


def test_enough_slots_read_every_expert_once(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", decoder("mixtral", layers=3))
    with open_streamed(path, StreamConfig(device_slots=12, host_slots=12, read_ahead=0)) as (model, store):
        for _ in range(3):
            model(IDS)
        assert store.counts.from_disk == 12  # all are needed by so many tokens
        assert store.counts.on_device == store.counts.asked - 12


def test_a_read_that_fails_leaves_nothing_half_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "model", decoder("mixtral", layers=3))
    wanted = resident(path, IDS)
    config = StreamConfig(device_slots=2, host_slots=3, read_ahead=1)
    with open_streamed(path, config) as (model, _):
        read, calls = ExpertFiles.read, []

        def fails_once(self: ExpertFiles, key: tuple[int, int], buffers: tuple[torch.Tensor, ...]) -> None:
            calls.append(key)
            if len(calls) == 5:
                buffers[0].fill_(float("nan"))
                raise OSError("the disk is gone")
            read(self, key, buffers)

        monkeypatch.setattr(ExpertFiles, "read", fails_once)
        # whoever asks for it is told; if it was read ahead for nobody yet, it is read again when it is needed
        with contextlib.suppress(OSError):
            model(IDS)
        assert len(calls) >= 5
        assert torch.equal(model(IDS).logits, wanted)


def test_what_is_expected_stays_until_it_is_used(tmp_path: Path) -> None:
    """Two host slots: reading a third expert ahead must not push out the first, which is needed before it."""
    path = write_model(tmp_path / "model", decoder("mixtral", layers=1))
    files = ExpertFiles(open_directory(path, tokenizer=False), torch.float32)
    store = ExpertStore(files, StreamConfig(device_slots=1, host_slots=2), torch.device("cpu"))
    coming = [(0, 0), (0, 1), (0, 2)]
    for _ in range(2):
        store.expect(coming)
        for reading in list(store._reading.values()):
            reading.result()
    assert store.counts.read_ahead == 2
    for key in coming[:2]:
        wanted = files.buffers(torch.device("cpu"))
        files.read(key, wanted)
        assert all(torch.equal(one, other) for one, other in zip(store.get(key), wanted, strict=True))
    assert (store.counts.from_disk, store.counts.in_host) == (0, 2)
    store.get(coming[2])
    assert store.counts.from_disk == 1
    store.close()


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense", decoder())
    with pytest.raises(MismatchError, match="has no experts"), open_streamed(dense, StreamConfig()):
        pass
    path = write_model(tmp_path / "model", decoder("mixtral", layers=2))
    with pytest.raises(CapacityError, match="0 device slots"), open_streamed(path, StreamConfig(device_slots=0)):
        pass
