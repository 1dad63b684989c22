# SPDX-License-Identifier: Apache-2.0
"""`refound plan-serving` and `refound simulate-serving`, from a model's own routing to plans, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from refound.cli import main
from refound.nas.moe.trace import RoutingTrace, model_sha256, read_trace, write_trace
from refound.nas.serving.affinity import hops_of
from refound.nas.serving.devices import read_devices
from refound.nas.serving.placement import capacities, contiguous
from refound.nas.serving.plans import Settings, judged_part, make_plans, open_subject
from refound.nas.serving.scenarios import scenarios
from safetensors.numpy import save_file

from ...export.models import decoder, write_model
from .traces import chained

DEVICES = "gpus = 2\nmemory_gb = 0.05\nhost_gb = 0.1\n[experts]\nexpert_mb = 0.5\nhidden_kb = 1\n"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def written(folder: Path, **changes: object) -> tuple[Path, Path]:
    """(a trace of 4 layers of 8 experts, the devices)."""
    experts, ids = chained(layers=4, experts=8, tokens=480, faith=0.7, seed=0, top_k=2)
    base = RoutingTrace(model="ab" * 32, experts=8, choice=experts, tokens=ids, starts=np.arange(0, 481, 40))
    write_trace(folder / "trace.safetensors", replace(base, **changes))  # type: ignore[arg-type]
    (folder / "devices.toml").write_text(DEVICES)
    return folder / "trace.safetensors", folder / "devices.toml"


def routed(path: Path, windows: torch.Tensor) -> RoutingTrace:
    """What the model in `path` routes, by its own routers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, output: found.append(output[2]))
    with torch.no_grad():
        model(windows)
    return RoutingTrace(
        model=model_sha256(path),
        experts=model.model.layers[0].mlp.gate.weight.shape[0],
        choice=torch.stack(found).numpy().astype(np.int16),
        tokens=windows.flatten().numpy().astype(np.int32),
        starts=np.arange(len(windows) + 1, dtype=np.int64) * windows.shape[1],
    )


def test_a_placement_is_realized_by_the_permuted_model(tmp_path: Path) -> None:
    """The permuted model's own routing, on devices that share experts out in order, makes the planned hops."""
    model = write_model(tmp_path / "model", decoder("qwen3_moe", layers=3))
    windows = torch.randint(0, 384, (8, 24), generator=torch.Generator().manual_seed(1))
    trace = routed(model, windows)
    write_trace(tmp_path / "trace.safetensors", trace)
    (tmp_path / "devices.toml").write_text("gpus = 2\nmemory_gb = 0.001\n")
    out, placed = tmp_path / "plans", tmp_path / "placed"
    words = ("plan-serving", tmp_path / "trace.safetensors", "--devices", tmp_path / "devices.toml", "--model", model)
    done = run(*words, "--out", out, "--permute", placed, "--map", "sglang", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    device_of = np.array(json.loads((out / "placement.json").read_text())["plan"]["device_of"])
    again = routed(placed, windows)
    usual = contiguous(3, capacities(4, 2))
    planned = hops_of(trace.choice, device_of, np.zeros(2, int))
    realized = hops_of(again.choice, usual, np.zeros(2, int))
    assert realized == planned and planned != hops_of(trace.choice, usual, np.zeros(2, int))
    rows = json.loads((out / "sglang.json").read_text())["physical_to_logical_map"]
    assert [sorted(row) for row in rows] == [[0, 1, 2, 3]] * 3
    assert json.loads((placed / "refound.json").read_text())["permuted_from"] == trace.model
    assert told["plans"]["placement"]["predicted"]["with"]["cross_device"] <= 1
    # a trace of the one is none of the other
    refused = run(
        "simulate-serving", tmp_path / "trace.safetensors", "--devices", tmp_path / "devices.toml", "--model", placed
    )
    assert refused.exit_code == 3 and "the trace of another model" in refused.stderr


def test_bits_are_planned_and_served_where_they_can_be(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", decoder("mixtral", layers=2))
    trace = routed(model, torch.randint(0, 384, (8, 24), generator=torch.Generator().manual_seed(1)))
    write_trace(tmp_path / "trace.safetensors", trace)
    (tmp_path / "devices.toml").write_text("gpus = 2\nmemory_gb = 0.001\n")
    words = (tmp_path / "trace.safetensors", "--devices", tmp_path / "devices.toml", "--model", model)
    done = run("plan-serving", *words, "--out", tmp_path / "plans", "--bits", 5)
    assert done.exit_code == 0, done.output
    assert "bits in vllm: no: experts of one layer differ" in done.stdout
    told = json.loads((tmp_path / "plans" / "bits.json").read_text())
    assert told["proven"] and told["predicted"]["with"] <= told["predicted"]["without"]
    assert told["plan"]["mean_bits"] <= 5 and told["measured"]["with"] > 0
    assert told["made_on"]["windows"] == 16 and told["made_on"]["sha256"] != told["judged_on"]["sha256"]
    replayed = run("simulate-serving", *words, "--plans", tmp_path / "plans", "--json")
    assert replayed.exit_code == 0, replayed.output
    assert "bits" in [one["name"] for one in json.loads(replayed.stdout)["scenarios"]]
    # sound without the model too, whose weights of 32 bits no table of devices tells
    table = tmp_path / "table.toml"
    table.write_text("gpus = 2\nmemory_gb = 0.001\n[experts]\nexpert_mb = 0.05\nhidden_kb = 0.2\n")
    alone = run("simulate-serving", words[0], "--devices", table, "--plans", tmp_path / "plans", "--steps", 3)
    assert alone.exit_code == 0, alone.output
    told["plan"]["bits"][0][0] = 5
    (tmp_path / "plans" / "bits.json").write_text(json.dumps(told))
    refused = run("simulate-serving", *words, "--plans", tmp_path / "plans")
    assert refused.exit_code == 3 and "among (2, 3, 4, 8, 32)" in refused.stderr
    few = run("plan-serving", *words, "--out", tmp_path / "few", "--bits", 1)
    assert few.exit_code == 3 and "fewer than the narrowest width" in few.stderr
    assert "placing experts" not in few.stderr  # told before the work


def test_plans_are_made_kept_and_replayed(tmp_path: Path) -> None:
    trace, devices = written(tmp_path)
    plans, page = tmp_path / "plans", tmp_path / "report.html"
    done = run("plan-serving", trace, "--devices", devices, "--out", plans, "--batch", 3)
    assert done.exit_code == 0, done.output
    assert "hops that cross devices" in done.stdout
    told = json.loads((plans / "caching.json").read_text())
    assert told["made_on"] == [0, 6] and told["judged_on"] == [6, 12]
    for part in ("predicted", "measured"):
        assert told[part]["belady"] >= told[part]["lru"]
        assert told[part]["belady-predicted"] <= told[part]["belady"]
    done = run("simulate-serving", trace, "--devices", devices, "--plans", plans, "--html", page, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    by_name = {one["name"]: one for one in told["scenarios"]}
    assert by_name["placement"]["hops"] < by_name["tokens move"]["hops"]
    assert by_name["batching"]["unique"] < by_name["as engines do"]["unique"]
    assert by_name["as engines do"]["tokens"] == 240  # only what was held out
    kept = run("simulate-serving", trace, "--devices", devices, "--plans", plans, "--html", page)
    assert kept.exit_code == 1 and "--overwrite" in kept.stderr
    html = page.read_text()
    assert html.count("<svg") == 5 and "http" not in html and "<script" not in html
    # made on the spot, the same plans say the same
    other = run("simulate-serving", trace, "--devices", devices, "--batch", 3, "--json")
    assert json.loads(other.stdout)["scenarios"] == told["scenarios"]
    text = run("simulate-serving", trace, "--devices", devices, "--steps", 5)
    assert text.exit_code == 0 and "5 steps, 30 tokens" in text.stdout


def test_plans_of_another_trace_are_judged_on_other_text(tmp_path: Path) -> None:
    """The same text cut into other windows, and further on what the plans have not seen."""
    trace, devices = written(tmp_path)
    whole, plans = read_trace(trace), tmp_path / "plans"
    starts = np.array([0, 160, 320, 480])
    other = tmp_path / "other.safetensors"
    write_trace(other, replace(whole, starts=starts))
    assert run("plan-serving", trace, "--devices", devices, "--out", plans).exit_code == 0  # on its first 240 tokens
    done = run("simulate-serving", other, "--devices", devices, "--plans", plans, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["scenarios"][0]["tokens"] == 160
    write_trace(other, whole.part(0, 6))
    refused = run("simulate-serving", other, "--devices", devices, "--plans", plans)
    assert refused.exit_code == 2 and "text that the plans were made on" in refused.stderr


def test_settings_beside_plans_are_no_silent_nothing(tmp_path: Path) -> None:
    trace, devices = written(tmp_path)
    refused = run("simulate-serving", trace, "--devices", devices, "--plans", tmp_path, "--batch", 3, "--look-ahead", 2)
    assert refused.exit_code == 2 and "--batch, --look-ahead: the plans in --plans" in refused.stderr


def test_slots_reach_the_replay(tmp_path: Path) -> None:
    trace, devices = written(tmp_path)
    words = (trace, "--devices", devices, "--steps", 20, "--json")
    few, all_of = (
        json.loads(run("simulate-serving", *words, *more).stdout)["scenarios"][0]["hit_rate"]
        for more in (("--slots", 2), ())
    )
    assert few < all_of == 1


def test_what_is_planned_knows_nothing_of_what_is_judged(tmp_path: Path) -> None:
    """Hosts keep what the plans' part used, though the rest uses other experts; each device has slots of its own."""
    trace, devices = written(tmp_path)
    whole = read_trace(trace)
    choice = np.where(np.arange(480)[None, :, None] < 240, whole.choice % 4, 4 + whole.choice % 4)
    choice[:, :, 1] = np.where(choice[:, :, 1] == choice[:, :, 0], choice[:, :, 0] ^ 1, choice[:, :, 1])
    write_trace(trace, replace(whole, choice=choice.astype(np.int16)))
    devices.write_text(DEVICES.replace("host_gb = 0.1", "host_gb = 0.008"))  # 16 of 32 experts
    subject = open_subject(trace, read_devices(devices), None)
    plans = make_plans(subject, Settings(slots=4))
    usual, _ = scenarios(subject, judged_part(subject, plans), plans, 5)[0]
    assert usual.in_host[:, :4].all() and not usual.in_host[:, 4:].any()
    # each of the two devices holds its four experts of a layer: all that is loaded is what each sees first
    assert plans.told["caching"]["measured"]["lru"] == pytest.approx(1 - 16 / (4 * 240 * 2))


def test_memory_that_holds_not_all_experts_makes_plans_matter(tmp_path: Path) -> None:
    trace, devices = written(tmp_path)
    devices.write_text(DEVICES.replace("memory_gb = 0.05", "memory_gb = 0.0061"))  # 3 of 4 experts of a layer
    told = json.loads(run("simulate-serving", trace, "--devices", devices, "--batch", 1, "--json").stdout)
    by_name = {one["name"]: one for one in told["scenarios"]}
    usual = by_name["as engines do"]
    assert 0 < usual["hit_rate"] < 1
    assert by_name["pre-gating, bound"]["step_ms"]["mean"] < usual["step_ms"]["mean"]
    # what can be had takes nothing from the future, so it is another figure than that of a router never wrong
    assert by_name["Belady"]["hit_rate"] < by_name["Belady, bound"]["hit_rate"]
    assert by_name["all plans"]["seconds"] < usual["seconds"]


def test_plans_of_another_model_are_refused(tmp_path: Path) -> None:
    trace, devices = written(tmp_path)
    plans = tmp_path / "plans"
    assert run("plan-serving", trace, "--devices", devices, "--out", plans).exit_code == 0
    again = run("plan-serving", trace, "--devices", devices, "--out", plans)
    assert again.exit_code == 1 and "--overwrite" in again.stderr
    (tmp_path / "other").mkdir()
    other, _ = written(tmp_path / "other", model="cd" * 32)
    refused = run("simulate-serving", other, "--devices", devices, "--plans", plans)
    assert refused.exit_code == 3 and "made for another model (abababababab… and not cdcdcdcdcdcd…)" in refused.stderr
    (tmp_path / "four.toml").write_text(DEVICES.replace("gpus = 2", "gpus = 4"))
    refused = run("simulate-serving", trace, "--devices", tmp_path / "four.toml", "--plans", plans)
    assert refused.exit_code == 3 and "other devices than these 4" in refused.stderr
    (tmp_path / "apart.toml").write_text(DEVICES.replace("gpus = 2", "nodes = 2\ngpus = 1"))
    refused = run("simulate-serving", trace, "--devices", tmp_path / "apart.toml", "--plans", plans)
    assert refused.exit_code == 3 and "(2 nodes of 1)" in refused.stderr


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("placement.json", lambda told: told["plan"]["device_of"][0].pop()),
        ("placement.json", lambda told: told["plan"]["device_of"][0].__setitem__(0, 7)),
        ("coclusters.json", lambda told: told["plan"]["home"].pop()),
        ("batching.json", lambda told: told["plan"].pop("batch") and told["plan"].__setitem__("bach", 8)),
        ("caching.json", lambda told: told["plan"].pop("look_ahead")),
        ("placement.json", lambda told: told.pop("planned_text")),
        ("prediction.json", lambda told: told.__setitem__("judged_on", ["a", 2])),
        ("placement.json", lambda told: told.__setitem__("judged_on", [0, 99])),
    ],
)
def test_damaged_plans_are_refused(tmp_path: Path, file: str, change: object) -> None:
    trace, devices = written(tmp_path)
    plans = tmp_path / "plans"
    assert run("plan-serving", trace, "--devices", devices, "--out", plans).exit_code == 0
    told = json.loads((plans / file).read_text())
    change(told)  # type: ignore[operator]
    (plans / file).write_text(json.dumps(told))
    refused = run("simulate-serving", trace, "--devices", devices, "--plans", plans)
    assert refused.exit_code == 3 and "make" in refused.stderr.lower(), refused.output
    (plans / file).write_text("{")
    assert run("simulate-serving", trace, "--devices", devices, "--plans", plans).exit_code == 3


def test_bad_input_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    trace, devices = written(tmp_path)
    raw = trace.read_bytes()

    def refused(words: tuple[object, ...], code: int, *told: str) -> None:
        done = run("simulate-serving", *words)
        assert done.exit_code == code, done.output
        assert all(one in done.stderr for one in told), done.stderr
        assert "Traceback" not in done.output

    (tmp_path / "cut.safetensors").write_bytes(raw[:-100])
    refused((tmp_path / "cut.safetensors", "--devices", devices), 3, "is damaged")
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)) * 4)
    refused((tmp_path / "noise.safetensors", "--devices", devices), 3, "cut short within its header")
    refused((tmp_path / "none.safetensors", "--devices", devices), 3, "cannot be read")
    _write_raw(tmp_path / "wide.safetensors", experts=1)
    refused((tmp_path / "wide.safetensors", "--devices", devices), 3, "a token takes 2 of 1 experts")
    small = tmp_path / "small.toml"
    small.write_text("gpus = 2\nmemory_gb = 0.003\nhost_gb = 0.001\n[experts]\nexpert_mb = 0.5\nhidden_kb = 1\n")
    refused((trace, "--devices", small), 3, "0.02 GB", "hold 0.01 GB")
    small.write_text("gpus = 2\nmemory_gb = 1\n")
    refused((trace, "--devices", small), 2, "Name the model with --model")
    small.write_text("gpu = 2\nmemory_gb = 1\n")
    refused((trace, "--devices", small), 2, "unknown key gpu; did you mean 'gpus'?")
    small.write_text(DEVICES.replace("gpus = 2", "gpus = 9"))
    refused((trace, "--devices", small), 2, "at most 8 devices")
    single = tmp_path / "single"
    single.mkdir()
    alone, _ = written(single, starts=np.array([0, 480]))
    refused((alone, "--devices", devices), 2, "the trace has one sequence")
    done = run("plan-serving", trace, "--devices", devices, "--out", tmp_path / "p", "--permute", tmp_path / "q")
    assert done.exit_code == 2 and "--model must name it" in done.stderr
    done = run("plan-serving", trace, "--devices", devices, "--out", tmp_path / "p", "--map", "sglang")
    assert done.exit_code == 2 and "--model must name it" in done.stderr and not (tmp_path / "p").exists()


def _write_raw(path: Path, experts: int) -> None:
    tensors = {
        "experts": np.tile(np.array([0, 1], np.int16), (2, 4, 1)),
        "tokens": np.zeros(4, np.int32),
        "starts": np.array([0, 2, 4]),
    }
    told = {"format": "refound-routing-trace-1", "model": "ab" * 32, "layers": "2", "top_k": "2"}
    save_file(tensors, path, metadata={**told, "experts": str(experts)})


def test_help_says_what_is_needed() -> None:
    for command in ("plan-serving", "simulate-serving"):
        done = run(command, "--help")
        assert done.exit_code == 0 and "--devices" in done.stdout
