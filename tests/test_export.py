"""Step 7: what is saved is what was trained, and plain diffusers loads it; the upload takes only what it may."""

from __future__ import annotations

import base64
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from packaging import version
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbnb import export, miniature
from dbnb.adapters import adapted_modules, add_adapters, trainable_parameters
from dbnb.prior import build_pipeline


def _shake(components, seed=0, scale=0.05):
    """Give the adapters weights that matter, without training."""
    rng = torch.Generator().manual_seed(seed)
    for module in adapted_modules(components).values():
        for name, p in trainable_parameters(module):
            if "lora_B" in name:
                p.data.normal_(0, scale, generator=rng)


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


_READS_FLAT_CLIP = pytest.mark.skipif(
    version.parse(diffusers.__version__) < version.parse("0.40"),
    reason="diffusers 0.39 finds no ranks of a text encoder without a `text_model` level, unless metadata say them",
)


@pytest.mark.parametrize("lora_layers", ["attention", "all"])
@pytest.mark.parametrize("train_text_encoder", [False, pytest.param(True, marks=_READS_FLAT_CLIP)])
def test_the_kohya_file_draws_the_same_picture_through_diffusers_own_reader(
    components, tmp_path, train_text_encoder, lora_layers
):
    add_adapters(
        components,
        rank=4,
        lora_alpha=8,
        lora_layers=lora_layers,
        train_text_encoder=train_text_encoder,
        text_encoder_rank=2,
        text_encoder_lora_alpha=1,
    )
    _shake(components)
    path = export.save_kohya(components, tmp_path)
    with safe_open(path, "pt") as file:
        alphas = {key.split("_")[1]: file.get_tensor(key).item() for key in file.keys() if key.endswith(".alpha")}
    assert alphas == {"unet": 8.0} | ({"te1": 1.0} if train_text_encoder else {})
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
    assert export.verify_reload(components, path, concept, config) <= 2
    _shake(components)
    with pytest.raises(ValueError, match="another picture"):
        export.verify_reload(components, path, concept, config)


def test_without_adapters_there_is_nothing_to_save(components, tmp_path):
    with pytest.raises(ValueError, match="add_adapters"):
        export.save_adapters(components, tmp_path)


def test_the_card_has_settings_and_metrics_and_no_path_of_this_machine(concept, config):
    states = {state: {"subject_fidelity": 0.5} for state in ("before", "after", "floor", "ceiling")}
    text = str(export.model_card(concept, config, states, has_text_encoder=False))
    for words in ("| rank | 4 |", "| subject_fidelity | 0.500 |", "a photo of a sks dog", "consent", "| seed | 0 |"):
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


def test_push_uploads_just_the_published_files_with_the_real_client(tmp_path, monkeypatch):
    import huggingface_hub.constants

    for name in (*export.PUBLISHED, "config.json", "log.jsonl"):
        (tmp_path / name).write_text("---\ntags: [lora]\n---\n" if name == "README.md" else name)
    for folder in ("checkpoint-2", "logs", "samples"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text("private")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.files, server.tokens = {}, set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert export.push_to_hub(tmp_path, "me/toy", dry_run=True) == list(export.PUBLISHED)
        assert not server.files
        export.push_to_hub(tmp_path, "me/toy", endpoint=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert set(server.files) == set(export.PUBLISHED)
    assert server.files["metrics.json"] == b"metrics.json" and server.tokens == {"Bearer hf_test"}
    assert not any(b"hf_test" in content for content in server.files.values())
