"""Step 7: what is saved is what was trained, and plain diffusers loads it; the upload takes only what it may."""

from __future__ import annotations

import ast
import base64
import dataclasses
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from families import READS_FLAT_CLIP, write
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbnb import export, miniature
from dbnb.adapters import adapted_modules, add_adapters, trainable_parameters
from dbnb.config import AdapterSettings, DreamBoothConfig
from dbnb.drawing import build_pipeline
from dbnb.models import load_components
from dbnb.validation import draw


def _shake(components, seed=0, scale=0.05):
    """Give the adapters weights that matter, without training."""
    rng = torch.Generator().manual_seed(seed)
    for module in adapted_modules(components).values():
        for name, p in trainable_parameters(module):
            if "lora_A" not in name:  # B, and DoRA's magnitudes
                p.data += scale * torch.randn(p.shape, generator=rng)


def _draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a photo of a sks dog", num_inference_steps=3, generator=torch.Generator().manual_seed(0), guidance_scale=3.0
    ).images[0]
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize(
    "options",
    [
        dict(rank=4),
        dict(rank=4, train_text_encoder=True),
        dict(rank=4, lora_alpha=8, train_text_encoder=True, text_encoder_rank=2, text_encoder_lora_alpha=1),
        dict(rank=4, train_text_encoder=True, use_rslora=True),
        dict(rank=4, train_text_encoder=True, use_dora=True),
        dict(rank=4, lora_layers="all"),
        dict(rank=4, lora_layers="all", lora_alpha=8, train_text_encoder=True),
        dict(rank=4, lora_layers="all", use_rslora=True),
        dict(rank=4, lora_layers="all", use_dora=True),
        dict(rank=4, lora_layers="all", lora_dropout=0.3),
        dict(rank=4, lora_layers="to_q,conv1,conv_shortcut"),
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()),
)
def test_saved_adapters_draw_the_same_picture_in_plain_diffusers(components, tmp_path, options):
    base = _draw(build_pipeline(components))
    add_adapters(components, **options)
    _shake(components)
    trained = _draw(build_pipeline(components))
    path = export.save_adapters(components, tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(miniature.path())
    plain.scheduler = build_pipeline(components).scheduler
    plain.load_lora_weights(tmp_path, weight_name=path.name)
    assert np.abs(_draw(plain) - trained).max() <= 1
    assert np.abs(base - trained).max() > 10
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("lora_layers, use_rslora", [("attention", False), ("all", False), ("all", True)])
@pytest.mark.parametrize("train_text_encoder", [False, pytest.param(True, marks=READS_FLAT_CLIP)])
def test_the_kohya_file_draws_the_same_picture_through_diffusers_own_reader(
    components, tmp_path, train_text_encoder, lora_layers, use_rslora
):
    add_adapters(
        components,
        AdapterSettings(
            rank=4,
            lora_alpha=8,
            lora_layers=lora_layers,
            train_text_encoder=train_text_encoder,
            text_encoder_rank=2,
            text_encoder_lora_alpha=1,
            use_rslora=use_rslora,
        ),
    )
    _shake(components)
    path = export.save_kohya(components, tmp_path)
    with safe_open(path, "pt") as file:
        alphas = {key.split("_")[1]: file.get_tensor(key).item() for key in file.keys() if key.endswith(".alpha")}
    grown = (2.0, 2.0**0.5) if use_rslora else (1.0, 1.0)  # alpha / sqrt(rank) as a reader's alpha / rank
    assert alphas == pytest.approx({"unet": 8.0 * grown[0]} | ({"te1": grown[1]} if train_text_encoder else {}))
    plain = StableDiffusionPipeline.from_pretrained(miniature.path())
    plain.scheduler = build_pipeline(components).scheduler
    plain.load_lora_weights(tmp_path, weight_name=path.name)
    assert np.abs(_draw(plain) - _draw(build_pipeline(components))).max() <= 1


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_each_half_of_the_file_matters(components, tmp_path, part):
    add_adapters(components, rank=4, train_text_encoder=True)
    _shake(components, scale=0.1)
    whole = _draw(export.reload_pipeline(components, export.save_adapters(components, tmp_path)))
    tensors = load_file(tmp_path / export.WEIGHT_NAME)
    with safe_open(tmp_path / export.WEIGHT_NAME, "pt") as file:
        metadata = file.metadata()
    (tmp_path / "half").mkdir()
    half = tmp_path / "half" / export.WEIGHT_NAME
    save_file({key: value for key, value in tensors.items() if not key.startswith(f"{part}.")}, half, metadata)
    assert np.abs(_draw(export.reload_pipeline(components, half)) - whole).max() > 10


def test_a_file_that_is_no_adapter_of_this_base_is_refused_and_changes_nothing(components, tmp_path):
    add_adapters(components, rank=4, train_text_encoder=True)
    _shake(components)
    path = export.save_adapters(components, tmp_path)
    whole, tensors = path.read_bytes(), load_file(path)
    plain = StableDiffusionPipeline.from_pretrained(miniature.path())
    before = _draw(plain)
    other = tmp_path / "other.safetensors"

    def refused(kind, words, file=other):
        with pytest.raises(kind, match=words):
            export.load_adapter(plain, file)

    refused(FileNotFoundError, "does not exist", tmp_path / "gone.safetensors")
    (tmp_path / "adapter.bin").write_bytes(whole)
    refused(ValueError, "could run code", tmp_path / "adapter.bin")
    rng = random.Random(0)
    for _ in range(60):  # the header alone says how long the file is
        other.write_bytes(whole[: rng.randrange(len(whole))])
        refused(ValueError, "cannot be read")
    save_file({"weight": torch.zeros(2)}, other)
    refused(ValueError, "no LoRA layers")
    save_file({key: torch.cat([value, value], dim=1) for key, value in tensors.items()}, other)
    refused(ValueError, "another base")
    save_file({key.replace("attentions.0", "attentions.7"): value for key, value in tensors.items()}, other)
    refused(ValueError, "do not fit")
    assert np.array_equal(_draw(plain), before)
    export.load_adapter(plain, path)
    assert not np.array_equal(_draw(plain), before)


def test_keys_are_canonical_and_metadata_is_there(components, tmp_path):
    add_adapters(components, rank=4, lora_alpha=8, train_text_encoder=True)
    with safe_open(export.save_adapters(components, tmp_path), "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert {key.split(".")[0] for key in keys} == {"unet", "text_encoder"}
    assert all(k.startswith("text_encoder.text_model.encoder") for k in keys if k.startswith("text_encoder"))
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 8


def test_a_file_that_reloads_to_another_picture_is_refused(components, concept, config, tmp_path):
    add_adapters(components, rank=4)
    path = export.save_adapters(components, tmp_path)
    assert export.verify_reload(components, path, concept, config.sampling) <= 2
    _shake(components)
    with pytest.raises(ValueError, match="another picture"):
        export.verify_reload(components, path, concept, config.sampling)


@pytest.mark.parametrize("fault", ["a tensor", "alpha", "a missing half"])
def test_what_in_a_file_is_not_what_was_trained_is_named(components, concept, config, tmp_path, fault):
    add_adapters(components, rank=4, lora_alpha=8, train_text_encoder=True)
    _shake(components)
    path = export.save_adapters(components, tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if fault == "a tensor":
        tensors[next(iter(tensors))][0, 0] += 0.01
    elif fault == "alpha":
        metadata["lora_adapter_metadata"] = metadata["lora_adapter_metadata"].replace(
            'lora_alpha": 8', 'lora_alpha": 9'
        )
    else:
        tensors = {key: value for key, value in tensors.items() if "text_encoder" not in key}
        numbers = json.loads(metadata["lora_adapter_metadata"])
        kept = {key: value for key, value in numbers.items() if "text_encoder" not in key}
        metadata["lora_adapter_metadata"] = json.dumps(kept)
    save_file(tensors, path, metadata)
    said = {
        "a tensor": "1 of .* tensors are not",
        "alpha": "scaled by 2.25 instead of 2",
        "a missing half": "no adapter",
    }
    with pytest.raises(ValueError, match=f"another picture .*{said[fault]}"):
        export.verify_reload(components, path, concept, config.sampling)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_right_file_is_right(concept, config, tmp_path, dtype):
    components = load_components("miniature", weight_dtype=dtype)
    add_adapters(components, rank=4, train_text_encoder=True)
    _shake(components, scale=0.3)  # strong: what rounding makes of it, the sampler multiplies
    config = dataclasses.replace(config, num_inference_steps=8, resolution=64)
    export.verify_reload(components, export.save_adapters(components, tmp_path), concept, config.sampling)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "if"])
@pytest.mark.parametrize("kind", ["use_rslora", "use_dora"])
@pytest.mark.parametrize("lora_layers", ["attention", "all"])
def test_every_kind_of_adapter_predicts_the_same_when_it_is_reloaded(
    concept, config, tmp_path, family, kind, lora_layers
):
    components = load_components(write(family, tmp_path / "base"))
    add_adapters(
        components,
        AdapterSettings(
            lora_layers=lora_layers, rank=9, lora_alpha=2, train_text_encoder=True, text_encoder_rank=4, **{kind: True}
        ),
    )
    _shake(components, scale=0.1)
    path = export.save_adapters(components, tmp_path)
    small = dataclasses.replace(config, resolution=32)
    assert export.verify_reload(components, path, concept, small.sampling) <= 2
    plain = DiffusionPipeline.from_pretrained(components.base, use_safetensors=True)
    plain.load_lora_weights(tmp_path, weight_name=path.name)
    outputs = []
    for pipeline in (build_pipeline(components), plain):
        hook = pipeline.unet.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
        pipeline.scheduler = build_pipeline(components).scheduler
        draw(components, ["a photo of sks dog"], small.sampling, seeds=[1], pipeline=pipeline)
        hook.remove()
    assert torch.allclose(outputs[0], outputs[len(outputs) // 2], atol=1e-5)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_adapter_files_may_be_read_by_whom_other_files_may(components, tmp_path, umask, mode):
    add_adapters(components, rank=2)
    before = os.umask(umask)
    try:
        paths = [export.save_adapters(components, tmp_path), export.save_kohya(components, tmp_path)]
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in paths] == [mode, mode]


def test_a_kohya_file_refuses_what_it_has_no_place_for(components, tmp_path):
    add_adapters(components, rank=2, use_dora=True)
    with pytest.raises(ValueError, match="does not write DoRA"):
        export.save_kohya(components, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["sd1", "sdxl", "if"])
def test_no_published_file_holds_a_path_of_this_machine(concept, config, tmp_path, family):
    base = write(family, tmp_path / "secret place" / "base")
    config = dataclasses.replace(config, base=str(base), resolution=32, instance_data_dir=str(tmp_path / "photos"))
    components = load_components(base)
    add_adapters(components, rank=2, train_text_encoder=True)
    output = Path(config.output_dir)
    output.mkdir()
    export.save_adapters(components, output)
    if family != "if":
        export.save_kohya(components, output)
    export.model_card(concept, config, None, has_text_encoder=True).save(output / "README.md")
    for name in export.push_to_hub(output, "me/toy", dry_run=True):
        content = (output / name).read_bytes()
        for path in (str(tmp_path), "secret place", str(Path.home()), str(concept.paths[0].parent)):
            assert path.encode() not in content, (name, path)
    assert "base_model: " not in (output / "README.md").read_text()


_PROMPTS = [
    'a "sks" dog',
    "a \\sks\\ dog",
    "a `sks` dog",
    "a ``sks`` dog",
    "a sks\ndog",
    "a sks\n---\ndog",
    "a sks\n\n# dog",
    "a <b>sks</b> dog",
    "a [sks](http://x) dog",
    "a *sks* _dog_",
    "a sks | dog",
    "'''sks''' dog",
    "a sks {dog} $x$ %s",
    "ein Foto von sks Hündchen",
    "一只 sks 狗",
    "a sks dog\u3000\u00a0",
]


@pytest.mark.parametrize("prompt", _PROMPTS)
def test_a_card_is_whole_whatever_the_words_are(concept, config, tmp_path, prompt):
    strange = dataclasses.replace(concept, identifier=prompt, class_word=prompt, instance_prompt=prompt)
    config = dataclasses.replace(config, instance_prompt=prompt, base="owner/name")
    export.model_card(strange, config, None, has_text_encoder=True).save(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "owner/name"
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "diffusers"
    tokens = MarkdownIt("commonmark").parse(body)
    (snippet,) = (token.content for token in tokens if token.type == "fence")
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if getattr(node.func, "id", "") == "pipeline")
    assert ast.literal_eval(call.args[0]) == f"{prompt} on the beach"
    headings = [tokens[i + 1].children for i, token in enumerate(tokens) if token.type == "heading_open"]
    words = " ".join(prompt.split())
    assert ["".join(child.content for child in headings[0])] == [f"{words} {words}: a DreamBooth LoRA"]
    assert {child.type for child in headings[0]} <= {"text", "text_special"}
    assert [children[0].content for children in headings[1:]] == ["Settings", "Use"]
    inline = [child for token in tokens[:12] if token.type == "inline" for child in token.children]
    assert words in [child.content for child in inline if child.type == "code_inline"]


def test_a_repository_without_a_name_gets_one_that_the_hub_takes():
    for identifier, class_word, expected in (
        ("sks", "dog", "sks-dog"),
        ("sks", "toy dog", "sks-toy-dog"),
        ("<s0>", "狗", "s0"),
        ("狗", "狗", "dreambooth-lora"),
        ("a..b", "--dog.", "a-b-dog"),
        ("x" * 200, "dog", "x" * 90),
    ):
        config = DreamBoothConfig()
        config.identifier, config.class_word = identifier, class_word
        assert export.hub_id(config) == expected
        validate_repo_id(expected)
    assert export.hub_id(DreamBoothConfig(hub_model_id="me/toy")) == "me/toy"


def test_the_hub_is_asked_before_anything_is_trained(monkeypatch):
    for repo_id in ("a/b/c", "me/toy dog", "me/-"):
        with pytest.raises(ValueError, match=f"--hub_model_id '{repo_id}' is not a valid repository name"):
            export.check_hub(repo_id)
    with pytest.raises(OSError, match="--push_to_hub would fail .*`hf auth login`"):  # the tests are offline
        export.check_hub("me/toy")


def test_a_repository_of_others_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(export.HfApi, "whoami", lambda self: {"name": "me", "orgs": [{"name": "school"}]})
    for repo_id in ("toy", "me/toy", "school/toy"):
        export.check_hub(repo_id)
    with pytest.raises(ValueError, match="'them/toy' belongs to 'them', and the token to 'me': .* me/ or school/"):
        export.check_hub("them/toy")


def test_without_adapters_there_is_nothing_to_save(components, tmp_path):
    with pytest.raises(ValueError, match="add_adapters"):
        export.save_adapters(components, tmp_path)


def test_the_card_has_settings_and_metrics_and_no_path_of_this_machine(concept, config):
    states = {state: {"subject_fidelity": 0.5} for state in ("before", "after", "floor", "ceiling")}
    text = str(export.model_card(concept, config, states, has_text_encoder=False))
    for words in ("| rank | 4 |", "| subject_fidelity | 0.500 |", "a photo of sks dog", "consent", "| seed | 0 |"):
        assert words in text
    assert config.output_dir not in text and str(concept.paths[0].parent) not in text


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; what is committed lands in `server.files`."""

    def log_message(self, *args):
        pass

    def _answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        self._answer({"id": "me/toy", "sha": "0" * 40, "siblings": [], "name": "me"})

    def do_POST(self):
        body = self._body()
        if self.server.refuses:
            self.send_error(401)
            return
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path.endswith("/api/repos/create"):
            self._answer({"url": f"http://127.0.0.1:{self.server.server_port}/me/toy", "id": "me/toy"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer({"files": [f | {"uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            self._answer({"commitUrl": "commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self._answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, with a token for it in the environment."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.files, server.tokens, server.refuses = {}, set(), False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_push_uploads_just_the_published_files_with_the_real_client(tmp_path, hub):
    for name in (*export.PUBLISHED, "config.json", "log.jsonl"):
        (tmp_path / name).write_text("---\ntags: [lora]\n---\n" if name == "README.md" else name)
    for folder in ("checkpoint-2", "logs", "samples", "previous"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text("private")
    assert export.push_to_hub(tmp_path, "me/toy", dry_run=True) == list(export.PUBLISHED)
    assert not hub.files
    export.push_to_hub(tmp_path, "me/toy", endpoint=f"http://127.0.0.1:{hub.server_port}")
    assert set(hub.files) == set(export.PUBLISHED)
    assert hub.files["metrics.json"] == b"metrics.json" and hub.tokens == {"Bearer hf_test"}
    assert not any(b"hf_test" in content for content in hub.files.values())


@pytest.mark.parametrize("answers", [False, True], ids=["no network", "the token is refused"])
def test_a_failed_upload_leaves_everything_and_says_how_to_repeat_it(tmp_path, hub, answers):
    folder = tmp_path / "my run"
    folder.mkdir()
    for name in (export.WEIGHT_NAME, "metrics.json", "config.json"):
        (folder / name).write_text(name)
    (folder / "README.md").write_text("---\ntags: [lora]\n---\n")
    endpoint, hub.refuses = f"http://127.0.0.1:{hub.server_port}", True
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        silent = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    with pytest.raises(OSError, match="all results are in .*my run, and this repeats just the upload: ") as caught:
        export.push_to_hub(folder, "me/toy", endpoint=endpoint if answers else silent)
    assert "\n" not in str(caught.value) and len(list(folder.iterdir())) == 4 and not hub.files
    # What it says does just that.
    command = shlex.split(str(caught.value).split("just the upload: ")[1])
    hub.refuses = False
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
    hf = Path(sys.executable).parent / command[0]
    subprocess.run([hf, *command[1:]], env=environment, check=True, capture_output=True, timeout=120)
    assert set(hub.files) == {export.WEIGHT_NAME, "metrics.json", "README.md"}
