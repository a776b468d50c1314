"""The course's web site: every notebook has its page, and the live page draws what diffusers draws.

What needs a browser is skipped where the extra `[book]`, npm or Chromium is missing.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from dbnb import export, miniature, toybox
from dbnb.adapters import add_adapters, trainable_parameters
from dbnb.config import DreamBoothConfig
from dbnb.drawing import fast_solver
from dbnb.models import load_components

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


def _module(name):
    """One of the folder's scripts, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _module("build")


@pytest.mark.parametrize("path", build.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_is_its_notebook_with_two_links(path):
    before, after = nbformat.read(path, as_version=4), build.page(path)
    owner_and_name = build.repository()
    title, _, rest = before.cells[0].source.partition("\n")
    assert title.startswith("# ")
    assert after.cells[0].source.startswith(f"{title}\n\n<div") and after.cells[0].source.endswith(f"</div>\n{rest}")
    links = re.findall('href="(.*?)"', after.cells[0].source)
    assert links == [
        f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{path.name}",
        path.name,
    ]
    assert [cell.source for cell in after.cells[1:]] == [cell.source for cell in before.cells[1:]]
    for old, new in zip(before.cells, after.cells, strict=True):
        for one, other in zip(old.get("outputs", []), new.get("outputs", []), strict=True):
            assert one == other or build.WIDGET in one.data


def test_a_repository_is_an_owner_and_a_name():
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", build.repository())


def test_the_workflow_publishes_what_the_command_builds():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["build"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == ['pip install -c constraints/linux-cpu.txt -e ".[book]"', "python docs/build.py"]
    assert all(command in (ROOT / "README.md").read_text(encoding="utf-8") for command in commands)
    [upload] = [step for step in steps if step.get("uses", "").startswith("actions/upload-pages-artifact")]
    assert upload["with"]["path"] == "docs/_build/html"


def test_the_lock_holds_what_the_package_file_asks_for():
    asked = json.loads((DOCS / "package.json").read_text(encoding="utf-8"))["dependencies"]
    packages = json.loads((DOCS / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert packages[""]["dependencies"] == asked
    assert all(packages[f"node_modules/{name}"]["integrity"] for name in asked)


def _adapter(folder, *, rank, lora_layers, seed):
    """An adapter file whose weights matter, without training."""
    components, generator = load_components("miniature"), torch.Generator().manual_seed(seed)
    add_adapters(components, rank=rank, lora_alpha=2.0 * rank, lora_layers=lora_layers, seed=seed)
    for name, parameter in trainable_parameters(components.unet):
        if "lora_B" in name:
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    return export.save_adapters(components, folder)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    return _adapter(tmp_path_factory.mktemp("adapter") / "all", rank=4, lora_layers="all", seed=0)


@pytest.fixture(scope="session")
def site(tmp_path_factory, adapter):
    """The site as the command builds it, but for the training: folder."""
    for name in ("furo", "myst_nb", "onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason='needs pip install -e ".[book]"')
    if not (shutil.which("npm") or (DOCS / "node_modules").is_dir()):
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(DOCS / "build.py"), "--adapter", str(adapter), "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder / "html"


def test_the_graphs_answer_as_the_parts_do(site, adapter):
    import onnxruntime

    components = load_components("miniature")
    pipeline = _pipeline(adapter, strength=0.7)
    model, generator = site / "playground" / "model", torch.Generator().manual_seed(0)

    def answer(name, **inputs):
        session = onnxruntime.InferenceSession(model / f"{name}.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, {key: np.asarray(value) for key, value in inputs.items()})[0]

    ids = components.tokenizer("a photo of sks dog", padding="max_length", return_tensors="np").input_ids
    with torch.no_grad():
        states = pipeline.text_encoder(torch.tensor(ids))[0]
    assert np.abs(answer("text_encoder", ids=ids.astype(np.int32)) - states.numpy()).max() < 0.02

    channels, size = components.unet.config.in_channels, components.unet.config.sample_size
    latents = torch.randn(2, channels, size, size, generator=generator)
    states = states.expand(2, -1, -1)
    tensors = {}
    for name, layer in pipeline.unet.named_modules():
        for half in ("A", "B"):
            if hasattr(layer, "lora_A") and len(layer.lora_A):
                [weights] = getattr(layer, f"lora_{half}").values()
                scale = 2.0 if half == "B" else 1.0
                tensors[f"unet.{name}.lora_{half}.weight"] = scale * weights.weight.detach().numpy()
    inputs = {"sample": latents.numpy(), "timestep": np.float32(500), "states": states.numpy()}
    with torch.no_grad():
        wanted = pipeline.unet(latents, 500, states).sample.numpy()
        picture = pipeline.vae.decode(latents[:1] / pipeline.vae.config.scaling_factor).sample
    found = answer("unet", **inputs, **tensors, strength=np.float32(0.7))
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(answer("unet", **inputs, **tensors, strength=np.float32(0)) - wanted).max() > 0.05
    picture = (picture / 2 + 0.5).clamp(0, 1).numpy()
    assert np.abs(answer("decoder", latents=latents[:1].numpy()) - picture).max() < 1e-4


def test_what_the_page_loads_to_draw_is_at_most_35_megabytes(site):
    assert sum(path.stat().st_size for path in (site / "playground").rglob("*") if path.is_file()) <= 35e6


def test_both_namings_of_an_adapters_halves_are_read(adapter, tmp_path):
    pytest.importorskip("onnx", reason='needs pip install -e ".[book]"')
    read = _module("export_onnx").read_adapter
    layers = read(_adapter(tmp_path / "attention", rank=2, lora_layers="attention", seed=1))
    assert layers and set(layers) < set(read(adapter))
    assert all(shape["A"][0] == shape["B"][1] == 2 for shape in layers.values())


def test_an_adapter_that_the_page_cannot_draw_with_is_refused_in_a_sentence(tmp_path):
    pytest.importorskip("onnx", reason='needs pip install -e ".[book]"')
    components = load_components("miniature")
    add_adapters(components, rank=2, train_text_encoder=True)
    with pytest.raises(ValueError, match="of the UNet alone: train without --train_text_encoder"):
        _module("export_onnx").read_adapter(export.save_adapters(components, tmp_path))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def address(site):
    """The site behind a plain server, which sends no header that a static host would not."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser(site):
    api = pytest.importorskip("playwright.sync_api", reason='needs pip install -e ".[book]"')
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, address):
    """A new tab, and what went wrong in it: `tab.complaints`. Nothing may be asked of any other server."""
    with browser.new_context(viewport=DESKTOP) as context:
        tab = context.new_page()
        tab.set_default_timeout(180_000)
        tab.complaints = []
        tab.on("console", lambda message: message.type == "error" and tab.complaints.append(message.text))
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.on("requestfailed", lambda request: tab.complaints.append(f"{request.url}: {request.failure}"))
        tab.on("request", lambda request: _is_here(request.url, address) or tab.complaints.append(request.url))
        yield tab


def _is_here(url, address):
    return url.startswith((address, "data:", "blob:"))


@pytest.fixture
def live(tab, address):
    """The live page, ready to draw."""
    tab.goto(f"{address}playground/index.html")
    tab.evaluate("window.dbnb.ready")
    yield tab
    assert tab.complaints == []


def _drawn(live, **options):
    """What the page draws: (H, W, 3) in 0 to 255."""
    got = live.evaluate(
        "async (o) => { const p = await dbnb.draw(o); return [p.height, p.width, Array.from(p.pixels)] }", options
    )
    return np.array(got[2]).reshape(got[0], got[1], 3)


def _pipeline(adapter, strength):
    """Plain diffusers with the adapter at a strength."""
    pipeline = DiffusionPipeline.from_pretrained(miniature.path(), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    export.load_adapter(pipeline, adapter)
    pipeline.set_adapters(pipeline.get_active_adapters(), [strength])
    return pipeline


def _difference(live, pipeline, *, prompt, steps, guidance, strength, seed, fresh):
    """Grey levels, on average, between the page's picture and diffusers' from the same noise.

    `fresh`: both draw with fresh noise at each step from the same seed; else both start from the same latents.
    """
    config, generator = pipeline.unet.config, torch.Generator().manual_seed(seed)
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator}
    options = {"prompt": prompt, "steps": steps, "guidance": guidance, "strength": strength}
    if fresh:
        pipeline.scheduler, options["seed"] = fast_solver(pipeline.scheduler), seed
    else:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        call["latents"] = torch.randn(shape, generator=generator)
        options["noise"] = call["latents"].flatten().tolist()
    size = config.sample_size * pipeline.vae_scale_factor
    picture = np.asarray(pipeline(prompt, height=size, width=size, **call).images[0], dtype=int)
    return np.abs(_drawn(live, **options) - picture).mean()


@pytest.mark.parametrize(
    "prompt, strength, guidance, steps",
    [
        ("a photo of sks dog", 1.0, 2.5, 10),
        ("a photo of sks dog on the beach", 0.0, 2.5, 10),
        ("A red, Spotted cat with a blue hat", 0.5, 7.5, 16),
        ("a photo of a teapot at night", 1.5, 1.0, 4),
        ("", 1.0, 3.0, 2),
    ],
)
@pytest.mark.parametrize("fresh", [False, True], ids=["from latents", "from a seed"])
def test_the_picture_is_diffusers_picture(live, adapter, prompt, strength, guidance, steps, fresh):
    pipeline = _pipeline(adapter, strength)
    options = {"prompt": prompt, "steps": steps, "guidance": guidance, "strength": strength, "fresh": fresh}
    assert _difference(live, pipeline, seed=3, **options) < 4


def test_noise_may_hold_that_of_each_step_too(live):
    config = load_components("miniature").unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    generator = torch.Generator().manual_seed(7)
    noise = [torch.randn(shape, generator=generator).tolist() for _ in range(1 + 3)]
    options = {"prompt": "a photo of a cat", "steps": 3}
    of_seed = _drawn(live, **options, seed=7).astype(int)
    # The page computes this noise with its own logarithm and cosine, whose last digit may differ.
    assert np.abs(_drawn(live, **options, noise=noise) - of_seed).max() <= 1
    assert np.abs(_drawn(live, **options, noise=noise[:1]) - of_seed).max() > 1


def test_the_pages_tokenizer_is_the_bases(live):
    tokenizer = load_components("miniature").tokenizer
    texts = [
        "",
        "a photo of sks dog",
        "A  RED dog's hat;\t12 cats!!",
        "it's we're I'll " + "dog " * 40,
        "café e\u0301 ü 你好 🐶 \u00a0x",
        "<|endoftext|> a <|startoftext|>dog",
        "---'s ''ll _ zwx ohwx",
        *(f"{opening} {kind} {place}" for opening in ("a", "my") for kind in toybox.KINDS for place in toybox.SCENES),
    ]
    wanted = tokenizer(texts, padding="max_length", truncation=True).input_ids
    found = live.evaluate(
        """async (texts) => {
          const { Tokenizer } = await import("./tokenizer.js");
          const [file, model] = await Promise.all(
            ["tokenizer", "model"].map(async (name) => (await fetch(`model/${name}.json`)).json()));
          const tokenizer = new Tokenizer(file, model.tokenizer);
          return texts.map((text) => Array.from(tokenizer.encode(text)));
        }""",
        texts,
    )
    assert found == wanted


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_the_pages_timesteps_are_diffusers(live, spacing):
    scheduler = DPMSolverMultistepScheduler(timestep_spacing=spacing, steps_offset=1)
    counts = [1, 2, 3, 7, 10, 16, 25, 48]
    wanted = []
    for count in counts:
        scheduler.set_timesteps(count)
        wanted.append(scheduler.timesteps.tolist())
    schedule = {"alphas_cumprod": [0.5] * 1000, "timestep_spacing": spacing, "steps_offset": 1}
    found = live.evaluate(
        """async ([schedule, counts]) => {
          const { timesteps } = await import("./solver.js");
          return counts.map((count) => timesteps(schedule, count));
        }""",
        [schedule, counts],
    )
    assert found == wanted


@pytest.mark.parametrize(
    "options, why",
    [
        ({"steps": 0}, "steps=0 must be a whole number"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"seed": -1}, "seed=-1 must be a whole number"),
        ({"strength": "much"}, "strength=much must be a number"),
        ({"noise": [0.5] * 7}, "noise has 7 numbers and should have"),
        ({"prompt": None}, "prompt must be a text"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(live, options, why):
    said = live.evaluate("(o) => dbnb.draw(o).then(() => '', (e) => e.message)", {"prompt": "a dog"} | options)
    assert why in said
    assert _drawn(live, prompt="a photo of a dog", steps=1).any()  # and the next one is drawn


def test_the_page_says_when_the_browser_cannot(tab, address):
    tab.add_init_script("delete globalThis.WebAssembly")
    tab.goto(f"{address}playground/index.html")
    assert tab.locator("#status").inner_text() == "This browser cannot draw here: it lacks WebAssembly."
    assert tab.evaluate("dbnb.ready.catch((error) => error.message)") == "it lacks WebAssembly"


def test_without_scripts_the_page_says_what_it_needs(browser, address):
    with browser.new_context(java_script_enabled=False) as context:
        tab = context.new_page()
        tab.goto(f"{address}playground/index.html")
        assert "it needs a current browser, JavaScript" in tab.locator("#status").inner_text()


def _settled(live):
    """The picture, once what has been changed is drawn."""
    live.locator('#canvas[aria-busy="false"]').wait_for()
    return live.evaluate("document.getElementById('canvas').toDataURL()")


def test_the_controls_draw(live):
    seen = [_settled(live)]
    assert live.locator("#film canvas").count() == DreamBoothConfig().num_inference_steps
    for change in (
        lambda: live.locator("#strength").fill("0"),
        lambda: live.locator("#guidance").fill("6"),
        lambda: live.locator("#steps").fill("4"),
        lambda: live.get_by_role("button", name="Another seed").click(),
        lambda: live.get_by_role("button", name="on the moon").click(),
        lambda: live.locator("#identifier").uncheck(),
    ):
        change()
        seen.append(_settled(live))
    assert len(set(seen)) == len(seen)
    assert live.locator("#film canvas").count() == 4
    assert live.locator("#prompt").input_value() == "a photo of a dog on the moon"
    live.locator("#identifier").check()
    live.get_by_role("button", name="at night").click()
    assert live.locator("#prompt").input_value() == "a photo of sks dog at night"


def test_the_page_opens_an_adapter_of_ones_own(live, tmp_path):
    own = _adapter(tmp_path / "own", rank=2, lora_layers="attention", seed=1)
    before = _settled(live)
    live.locator("#adapter").set_input_files(own)
    assert _settled(live) != before
    options = {"prompt": "a photo of sks dog", "steps": 10, "guidance": 2.5, "strength": 1.0, "seed": 5, "fresh": True}
    assert _difference(live, _pipeline(own, 1.0), **options) < 4
    (tmp_path / "no.safetensors").write_bytes(b"no adapter at all")
    live.locator("#adapter").set_input_files(tmp_path / "no.safetensors")
    live.locator("#caption", has_text="no.safetensors cannot be drawn with: it is no safetensors file.").wait_for()
    assert _difference(live, _pipeline(own, 1.0), **options) < 4  # the one before stays


def _pages(site):
    """All but the one that only leads to the first."""
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    return sorted(pages - {"index.html"})


def test_every_notebook_has_a_page_and_the_first_page_is_the_live_one(tab, site, address):
    assert {f"notebooks/{path.stem}.html" for path in build.NOTEBOOKS} <= set(_pages(site))
    for path in build.NOTEBOOKS:
        assert (site / "notebooks" / path.name).read_bytes() == path.read_bytes()
    tab.goto(address)
    tab.wait_for_url("**/playground/index.html")
    entries = tab.locator(".sidebar-tree a").evaluate_all("links => links.map((link) => link.textContent.trim())")
    assert entries[0] == tab.locator("h1").inner_text() == "Draw with the miniature"
    assert len(entries) == 1 + len(build.NOTEBOOKS) + 1 and entries[-1] == "Glossary"


def test_every_page_opens_on_a_desk_and_on_a_phone(tab, site, address):
    for name in _pages(site):
        tab.set_viewport_size(DESKTOP)
        tab.goto(address + name, wait_until="networkidle")
        for size in (DESKTOP, PHONE):
            tab.set_viewport_size(size)
            width = tab.evaluate("document.documentElement.scrollWidth")
            assert width <= size["width"], f"{name} is {width} pixels wide"
        silent = tab.locator("img:not([alt]), img[alt='']").evaluate_all("images => images.map((i) => i.outerHTML)")
        assert silent == [], name
        assert tab.complaints == [], name


def test_every_link_leads_somewhere(tab, site, address):
    targets, ids = {}, {}
    for name in _pages(site):
        tab.goto(address + name)
        targets[name] = tab.locator("a[href]").evaluate_all("links => links.map((link) => link.href)")
        ids[name] = set(tab.locator("[id]").evaluate_all("all => all.map((one) => one.id)"))
    outside = set()
    for name, links in targets.items():
        for link in links:
            if not link.startswith(address):
                outside.add(link)
                continue
            path, anchor = urlsplit(urljoin(address + name, link)).path.lstrip("/"), urlsplit(link).fragment
            assert (site / unquote(path)).is_file() or path == "", f"{name}: {link}"
            assert not anchor or unquote(anchor) in ids[unquote(path)], f"{name}: {link}"
    assert all(link.startswith("https://") for link in outside)
    assert f"https://github.com/{build.repository()}" in outside


def test_search_finds_a_notebook_by_its_words(tab, address):
    tab.goto(f"{address}search.html?q=identifier")
    tab.locator("#search-results li a").first.wait_for()
    found = tab.locator("#search-results li a").evaluate_all("links => links.map((link) => link.href)")
    assert any("notebooks/01_instance_data.html" in link for link in found)


def test_the_book_is_dark_where_the_reader_wants_it_dark(tab, address):
    shades = {}
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        tab.goto(f"{address}playground/index.html")
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        shades[scheme] = np.mean([int(number) for number in re.findall(r"\d+", colour)[:3]])
    assert shades["dark"] < 60 < 200 < shades["light"]
